"""`plan` measures a run, leaves nothing behind, and says what to change when it is too large."""

from pathlib import Path
from typing import Any

import pytest
import torch
from kit.command_line import Command, WriteRun
from kit.sd_runs import PROMPTS

from dmd_train import plan
from dmd_train.config import load_config
from dmd_train.files.shards import Shards
from dmd_train.networks.load import load_teacher
from dmd_train.prepare import make_roles

CPU = torch.device("cpu")


def everything_in(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


def test_plan_tells_what_a_run_takes_and_leaves_nothing_behind(
    write_sd_run: WriteRun, dmd: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run_yaml = write_sd_run(regression_weight=0.25)
    before = everything_in(tmp_path)
    outcome = dmd("plan", run_yaml)
    assert outcome.code == 0, outcome.err
    assert everything_in(tmp_path) == before
    said = outcome.out
    config = load_config(run_yaml, [])
    roles = make_roles(load_teacher(config, CPU).network, config)
    trained = sum(p.numel() for p in roles.student.parameters.values()) / 1e6
    assert f"lora, {trained:.1f} M parameters" in said
    for row in ("peak memory", "peak RAM", "disk", "an iteration", "pairs", "the run, 3 steps"):
        assert row in said
    assert "GiB" in said and " min " in said and "yes" in said and "NO" not in said


def test_plan_counts_pairs_and_prompts_by_the_bytes_that_they_take(
    write_sd_run: WriteRun, dmd: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(plan, "ITERATIONS", 1)
    six = tmp_path / "six.txt"
    six.write_text("\n".join([*PROMPTS, "a fourth", "a fifth", "a sixth"]))

    def disk(**settings: Any) -> int:
        return plan.measure(load_config(write_sd_run(**settings), []), CPU).disk

    least, of_six, of_pairs = disk(), disk(prompts=str(six)), disk(regression_weight=0.25)
    assert dmd("pairs", tmp_path / "run.yaml").code == 0
    text, made = Shards(tmp_path / "run/text"), Shards(tmp_path / "run/pairs")
    assert len(text) == len(PROMPTS) == 3
    assert of_six - least == text.column("text").nbytes
    assert of_pairs - least == made.column("noise").nbytes + made.column("image").nbytes


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"micro_batch_size": 0}, "micro_batch_size: 1"),
        ({}, "gradient_checkpointing: true"),
        ({"gradient_checkpointing": True}, "lora_rank: 4"),
        ({"gradient_checkpointing": True, "preset": "sd15-one-step-full"}, "LoRA preset"),
    ],
)
def test_plan_says_no_to_a_run_that_is_too_large_and_which_setting_to_change(
    settings: dict[str, Any],
    advice: str,
    write_sd_run: WriteRun,
    dmd: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "memory_of", lambda device: 1)
    monkeypatch.setattr(plan, "ITERATIONS", 1)
    outcome = dmd("plan", write_sd_run(**settings))
    assert outcome.code == 0, outcome.err
    assert "NO" in outcome.out and advice in outcome.out
