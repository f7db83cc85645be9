"""Bad input by the thousand, from a seed. Each ends in one line and exit 2, or in what was asked.

    PYTHONPATH=.:tests python tests/kit/fuzz.py --seed 0 --count 1000
    PYTHONPATH=.:tests python tests/kit/fuzz.py --seed 0 --count 300 --kinds nodes workflows

Prints a line for each input that ended in another way, and the counts. On the command line the
engine is imported once; an input then costs a fork. It has a folder of its own beside others that
it must leave alone. Nodes and workflows are tried in a real ComfyUI, workflows through its page.
`kit/hostile/` makes the inputs.
"""

import argparse
import collections
import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from kit import command_attempt, hostile
from kit.canvas_attempt import CANVAS, on_the_canvas
from kit.outcome import Outcome

Try = Callable[[int], Outcome]
"""The input of this number."""


@contextmanager
def on_the_command_line(seed: int, keep: bool) -> Iterator[dict[str, Try]]:
    """By kind. keep: the folder of an input, in the working directory."""
    with tempfile.TemporaryDirectory() as name:
        makers = hostile.makers(Path(name) / "models")

        def tried(kind: str, number: int) -> Outcome:
            room = Path(name) / "room"
            room.mkdir()
            outcome = command_attempt.tried(kind, makers[kind], seed, number, room)
            if keep:
                shutil.copytree(room, f"fuzz-{kind}-{number}", symlinks=True)
            shutil.rmtree(room)
            return outcome

        yield {kind: partial(tried, kind) for kind in makers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000, help="inputs, over all kinds")
    parser.add_argument(
        "--kinds", nargs="*", help=f"left out: all but {' and '.join(CANVAS)}", default=[]
    )
    parser.add_argument("--only", type=int, help="this number alone; its folder is kept")
    parser.add_argument("--out", type=Path, help="a line of JSON for each outcome")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as open_until_the_end:
        tries: dict[str, Try] = {}
        if not arguments.kinds or set(arguments.kinds) - set(CANVAS):
            keep = arguments.only is not None
            commands = on_the_command_line(arguments.seed, keep)
            tries |= open_until_the_end.enter_context(commands)
        if set(arguments.kinds) & set(CANVAS):
            canvas = on_the_canvas(arguments.seed, set(arguments.kinds))
            tries |= open_until_the_end.enter_context(canvas)
        kinds = arguments.kinds or list(tries)
        each = range(-(-arguments.count // len(kinds)))
        if arguments.only is not None:
            each = range(arguments.only, arguments.only + 1)
        outcomes = []
        for kind in kinds:
            for number in each:
                outcome = tries[kind](number)
                outcomes.append(outcome)
                if arguments.out:
                    with arguments.out.open("a") as file:
                        file.write(json.dumps(outcome._asdict()) + "\n")
                if outcome.wrong or arguments.only is not None:
                    print(kind, number, outcome.wrong, "|", *outcome.arguments, "|", flush=True)
                    print("   ", outcome.said.strip()[-600:].replace("\n", "\n    "), flush=True)
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
