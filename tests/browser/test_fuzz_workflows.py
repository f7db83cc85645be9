"""Our workflows with damage drawn from a seed, opened in the page and run.

PYTHONPATH=.:tests python tests/kit/fuzz.py --seed 0 --count 100 --kinds workflows
"""

from __future__ import annotations

import pytest
from kit.canvas_attempt import WORKFLOWS, guarded, tries
from kit.comfy_page import ComfyPage

SEED, COUNT = 1, 12


@pytest.mark.parametrize("page", ["classic"], indirect=True)
def test_a_damaged_workflow_is_one_line_and_harms_nothing(page: ComfyPage) -> None:
    with guarded(page.server):
        outcomes = list(map(tries(page.server, page, SEED)[WORKFLOWS], range(COUNT)))
    wrong = [
        f"--seed {SEED} --kinds {WORKFLOWS} --only {outcome.number}: {outcome.wrong}"
        for outcome in outcomes
        if outcome.wrong
    ]
    assert wrong == []
