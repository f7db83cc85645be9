"""Full training with every network spread over the processes."""

from pathlib import Path

import pytest
import torch
import yaml
from kit.command_line import Command
from kit.tiny import config
from kit.tiny_sd import tiny_sd
from kit.two_processes import in_two_processes
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from dmd_train.errors import UserError
from dmd_train.method.processes import Processes
from dmd_train.prepare import make_roles

ROOT = Path(__file__).parents[2]
RUN = {
    "teacher": str(ROOT / "tests/assets/coloured-digits"),
    "prompts": "prompts.txt",
    "preset": "sd15-one-step-full",
    "device": "cpu",
    "cpu_threads": 1,
    "steps": 2,
    "batch_size": 2,
    "micro_batch_size": 1,
    "critic_updates": 1,
    "timesteps": [999, 499],
    "warmup_steps": 0,
    "pair_steps": 2,
    "checkpoint_every": 1,
    "sample_every": 2,
    "images": "own",
    "adversarial_weight": 1.0,
}


def flat(path: Path) -> Tensor:
    weights = load_file(path)
    return torch.cat([weights[key].flatten().double() for key in sorted(weights)])


@pytest.mark.long
def test_two_processes_with_sharded_networks_give_the_weights_and_state_of_one(
    dmd: Command, tmp_path: Path
) -> None:
    for number, colour in enumerate(("red", "white")):  # the head is spread, too
        picture = Image.new("RGB", (64, 64), colour)
        Path("own").mkdir(exist_ok=True)
        picture.save(f"own/{number}.png")
        Path(f"own/{number}.txt").write_text(f"a {colour} square")
    Path("prompts.txt").write_text("a red seven on blue\na green circle on black\n")
    Path("run.yaml").write_text(yaml.safe_dump(RUN | {"output": "two"}))
    # as `accelerate launch --use_fsdp` starts them
    code, output = in_two_processes(Path("said"), "train", "run.yaml", ACCELERATE_USE_FSDP="true")
    assert code == 0, output
    assert dmd("train", "run.yaml", "--set", "output=one").code == 0
    for file in ("student.safetensors", "checkpoints/step-00000002.safetensors"):
        one, other = flat(Path("one", file)), flat(Path("two", file))
        assert float((one - other).norm() / one.norm()) <= 1e-5
    assert Path("two/samples/step-00000002.png").exists()


def test_adapters_are_not_sharded_and_the_error_says_what_to_leave_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Processes, "is_sharded", True)
    with pytest.raises(UserError, match=r"FSDP is for training: full .* Leave --use_fsdp out"):
        make_roles(tiny_sd(), config(training="lora"))
