"""Our nodes in a real ComfyUI with inputs drawn from a seed, as anybody may post them.

`kit/canvas_attempt.py` says what is asked of each; the hundreds are a command of its own:
PYTHONPATH=.:tests python tests/kit/fuzz.py --seed 0 --count 300 --kinds nodes
"""

from __future__ import annotations

from kit.canvas_attempt import NODES, guarded, tries
from kit.comfy_host import Server
from kit.graphs import queue_lives

SEED, COUNT = 1, 30


def test_a_bad_input_of_a_node_is_one_line_and_harms_nothing(server: Server) -> None:
    with guarded(server):
        outcomes = list(map(tries(server, None, SEED)[NODES], range(COUNT)))
    wrong = [
        f"--seed {SEED} --kinds {NODES} --only {outcome.number}: {outcome.wrong}"
        for outcome in outcomes
        if outcome.wrong
    ]
    assert wrong == []
    assert {outcome.code for outcome in outcomes} >= {0, 2}
    queue_lives(server)
