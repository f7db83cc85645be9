"""Bad input by the thousand, from a seed. Each ends in one line and exit 2, or in what was asked.

    PYTHONPATH=.:tests python tests/kit/fuzz.py --seed 0 --count 1000

Prints a line for each input that ended in another way, and the counts. The engine is imported once;
an input then costs a fork. It has a folder of its own beside others that it must leave alone.
`kit/hostile/` makes the inputs.
"""

import argparse
import collections
import hashlib
import json
import re
import shutil
import signal
import tempfile
from pathlib import Path
from random import Random
from typing import NamedTuple

from kit import hostile
from kit.attempt import MEMORY, PROOF, SECONDS, Maker, forked

LONGEST = 2000
"""Characters of a line on stderr, paths and all."""


class Outcome(NamedTuple):
    """How an input ended. wrong: in one phrase, None where it ended as it must."""

    kind: str
    number: int
    wrong: str | None
    code: int
    seconds: float
    said: str
    arguments: list[str]


def tried(kind: str, make: Maker, seed: int, number: int, room: Path) -> Outcome:
    """Input `number` of a kind, in a process of its own. room: an empty folder."""
    here, there = room / "here", room / "there"
    for folder in (here, there, room / "tmp"):
        folder.mkdir()
    (there / "thesis.txt").write_text("years of work")
    attempt = make(Random(f"{seed} {kind} {number}"), here)
    before = _contents(room)
    code, seconds, memory = forked(attempt.arguments, here)
    said, out = (_text(room / name) for name in ("stderr", "stdout"))
    after = _contents(room)
    wrong = _wrong(code, seconds, memory, said, out) or _harm(code, before, after, attempt.leaves)
    if wrong is None and code == 0:
        wrong = attempt.check(here)
    return Outcome(kind, number, wrong, code, seconds, said, attempt.arguments)


def _wrong(code: int, seconds: float, memory: int, said: str, out: str) -> str | None:
    """What is wrong with how it ended, None where nothing is."""
    if code in (-signal.SIGALRM, -signal.SIGXCPU) or seconds > SECONDS:
        return "hangs"
    if memory > MEMORY:
        return f"{memory / 2**30:.1f} GB"
    if "Traceback" in said + out:
        return "traceback"
    if code not in (0, 2):
        return f"exit {code}"
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", said + out):
        return "control characters"
    if code == 2 and len(said.strip().splitlines()) != 1:
        return f"{len(said.strip().splitlines())} lines"
    if max(map(len, said.splitlines()), default=0) > LONGEST:
        return f"a line of {max(map(len, said.splitlines()))} characters"
    return None


def _harm(
    code: int, before: dict[str, str], after: dict[str, str], leaves: tuple[str, ...]
) -> str | None:
    """What it did to files that are not its own, None where nothing."""
    if any(name.endswith(PROOF) for name in after):
        return "executed"
    allowed = tuple(f"here/{name}" for name in leaves)
    own = ("stdout", "stderr", "tmp/")
    for name in before.keys() | after.keys():
        if name.startswith(own) or before.get(name) == after.get(name):
            continue
        if not name.startswith(allowed or "/"):
            return f"{'changed' if name in before else 'left'} {name}"
    return None


def _contents(room: Path) -> dict[str, str]:
    """Every file below, by its name, and what is in it."""
    found = {}
    for path in room.rglob("*"):
        if path.is_symlink() or (not path.is_file() and not path.is_dir()):
            found[str(path.relative_to(room))] = "special"
        elif path.is_file() and path.parent != room:
            found[str(path.relative_to(room))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000, help="inputs, over all kinds")
    parser.add_argument("--kinds", nargs="*", help="left out: all")
    parser.add_argument("--only", type=int, help="this number alone; its folder is kept")
    parser.add_argument("--out", type=Path, help="a line of JSON for each outcome")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        makers = hostile.makers(Path(name) / "models")
        kinds = arguments.kinds or list(makers)
        each = range(-(-arguments.count // len(kinds)))
        if arguments.only is not None:
            each = range(arguments.only, arguments.only + 1)
        outcomes = []
        for kind in kinds:
            for number in each:
                room = Path(name) / "room"
                room.mkdir()
                outcome = tried(kind, makers[kind], arguments.seed, number, room)
                outcomes.append(outcome)
                if arguments.out:
                    with arguments.out.open("a") as file:
                        file.write(json.dumps(outcome._asdict()) + "\n")
                if outcome.wrong or arguments.only is not None:
                    print(kind, number, outcome.wrong, "|", *outcome.arguments, "|", flush=True)
                    print("   ", outcome.said.strip()[-600:].replace("\n", "\n    "), flush=True)
                if arguments.only is not None:
                    shutil.copytree(room, f"fuzz-{kind}-{number}", symlinks=True)
                shutil.rmtree(room)
    for kind in kinds:
        own = [outcome for outcome in outcomes if outcome.kind == kind]
        ways = collections.Counter(outcome.wrong for outcome in own if outcome.wrong)
        fine = sum(outcome.code == 0 and not outcome.wrong for outcome in own)
        print(
            f"{kind}: {len(own)} inputs, {sum(ways.values())} wrong, {fine} successes, "
            f"{sum(outcome.seconds for outcome in own):.0f} s",
            dict(ways) or "",
        )
    print(f"{len(outcomes)} inputs, {sum(o.wrong is not None for o in outcomes)} wrong")


if __name__ == "__main__":
    main()
