"""Inputs drawn from a seed end in one line and exit 2, or in what was asked.

`kit/fuzz.py` says what is asked of each, `kit/hostile/` makes them; a line of a failure is what
to type to see that one again. A hundred here; the thousands are a command of its own, as they take
a quarter of an hour: PYTHONPATH=.:tests python tests/kit/fuzz.py --seed 0 --count 1000
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
KINDS = len({*TYPED, *FILES, *RUNS})
SEED, EACH = 1, 6
"""The corpus's seed, and how many inputs of each kind."""


@pytest.mark.long
def test_a_bad_input_is_one_line_and_harms_nothing(tmp_path: Path) -> None:
    arguments = ["--seed", str(SEED), "--count", str(EACH * KINDS)]
    subprocess.run(
        [sys.executable, "tests/kit/fuzz.py", *arguments, "--out", tmp_path / "outcomes"],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([".", "tests"])},
        check=True,
        capture_output=True,
    )
    outcomes = [json.loads(line) for line in (tmp_path / "outcomes").read_text().splitlines()]
    assert len(outcomes) == EACH * KINDS
    wrong = [
        f"--seed {SEED} --kinds {outcome['kind']} --only {outcome['number']}: {outcome['wrong']}"
        for outcome in outcomes
        if outcome["wrong"]
    ]
    assert wrong == []
    # were every input refused, their damage might not be what they are refused for
    for kinds in (TYPED, FILES, RUNS):
        assert {outcome["code"] for outcome in outcomes if outcome["kind"] in kinds} == {0, 2}
