"""A thousand inputs drawn from a seed end in one line and exit 2, or in what was asked.

`kit/fuzz.py` says what is asked of each, `kit/hostile.py` makes them; a line of a failure is what
to type to see that one again. The quick tenth has another seed, so that none is tried twice.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

TYPED = ("yaml", "set", "options", "prompts", "special")
FILES = (
    *("bytes", "header", "student", "network", "metadata", "adm", "lora", "unet", "checkpoint"),
    *("pickle", "folder", "decoder"),
)
RUNS = ("run",)
WAITING: tuple[str, ...] = ()
"""Kinds that still end in other ways."""


@pytest.mark.parametrize(
    ("seed", "each"), [(1, 6), pytest.param(0, 60, marks=pytest.mark.long)], ids=["quick", "all"]
)
@pytest.mark.parametrize("kinds", [TYPED, FILES, RUNS], ids=["typed", "files", "runs"])
def test_a_bad_input_is_one_line_and_harms_nothing(
    kinds: tuple[str, ...], seed: int, each: int, tmp_path: Path
) -> None:
    tried = [kind for kind in kinds if kind not in WAITING]
    if not tried:
        pytest.skip("all of these are waiting")
    arguments = ["--seed", str(seed), "--count", str(each * len(tried)), "--kinds", *tried]
    subprocess.run(
        [sys.executable, "tests/kit/fuzz.py", *arguments, "--out", tmp_path / "outcomes"],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([".", "tests"])},
        check=True,
        capture_output=True,
    )
    outcomes = [json.loads(line) for line in (tmp_path / "outcomes").read_text().splitlines()]
    assert len(outcomes) == each * len(tried)
    wrong = [
        f"--seed {seed} --kinds {outcome['kind']} --only {outcome['number']}: {outcome['wrong']}"
        for outcome in outcomes
        if outcome["wrong"]
    ]
    assert wrong == []
    # were every input refused, their damage might not be what they are refused for
    assert {outcome["code"] for outcome in outcomes} == {0, 2}
