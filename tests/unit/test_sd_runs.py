"""Runs on Stable Diffusion teachers by the real command line, from prompts to files."""

import errno
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from kit.publishers import diffusers_unet, kohya_lora
from kit.sd_files import COLOURED_DIGITS, Tiny, micro_pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmd_train import networks, plan
from dmd_train.config import Config, load_config
from dmd_train.data import pairs, prompts
from dmd_train.distil import StepReport, distil
from dmd_train.files import write as files
from dmd_train.files.write import hash_of, read_safetensors
from dmd_train.iteration import Distillation
from dmd_train.method.recipe import read_recipe
from dmd_train.networks.text import TextEncoder
from dmd_train.prepare import carried_out, make_roles, prepare
from dmd_train.presets import PRESETS
from dmd_train.run.folder import RunFolder
from dmd_train.terminal import commands as cli

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
PROMPTS = ["a red fox", "a blue bird", "a green tree"]
SMALL: dict[str, Any] = {
    "preset": "sd15-one-step-lora",
    "device": "cpu",
    "steps": 3,
    "batch_size": 1,
    "micro_batch_size": 1,
    "critic_updates": 1,
    "lora_rank": 2,
    "gradient_checkpointing": False,
    "pairs": 3,
    "pair_batch_size": 1,
    "pair_steps": 2,
    "checkpoint_every": 100,
    "sample_every": 100,
}
LEARNS = {"learning_rate": 1e-3, "warmup_steps": 0}
"""Fast enough for a few steps to show."""

Command = Callable[..., Any]
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A diffusers folder of a few thousand weights, by family."""
    parent = tmp_path_factory.mktemp("micro")

    def made(family: str) -> Path:
        folder = parent / family
        return folder if folder.exists() else micro_pipeline(folder, family)

    return made


@pytest.fixture
def write(tmp_path: Path, micro: Tiny) -> Write:
    """Write run.yaml, whose output is run/ beside it. None leaves a key out."""

    def write(**settings: Any) -> Path:
        listed = tmp_path / "prompts.txt"
        listed.write_text("\n".join(PROMPTS))
        own = {
            "teacher": str(micro("sd1")),
            "prompts": str(listed),
            "output": str(tmp_path / "run"),
        }
        values = SMALL | own | settings
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
        return path

    return write


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second of drawing at the end of each run; the runs of the presets have it."""
    monkeypatch.setattr("dmd_train.run.curves.save_curves", lambda *_: None)


@pytest.fixture
def train(dmd: Command, no_curves: None, tmp_path: Path) -> Command:
    """Train to the end; gives the run folder."""

    def train(run_yaml: Path, *arguments: str) -> Path:
        outcome = dmd("train", run_yaml, *arguments)
        assert outcome.code == 0, outcome.out + outcome.err
        return tmp_path / "run"

    return train


def refused(outcome: Any, *words: object) -> None:
    """Exit code 2 and one line that says all of `words`."""
    code, out, err = outcome
    assert code == 2, out + err
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("error: ") and "Traceback" not in out + err
    for word in words:
        assert str(word) in err, err


def one_line(text: str) -> str:
    return " ".join(text.split())


def metrics(run: Path) -> list[dict[str, Any]]:
    """Without the seconds, which no two runs share."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def state(run: Path) -> dict[str, Tensor]:
    """The newest checkpoint."""
    return read_safetensors(sorted((run / "checkpoints").iterdir())[-1])[0]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def apart(one: dict[str, Tensor], other: dict[str, Tensor], part: str) -> float:
    """The relative distance of two states in the tensors of `part`, without the optimiser's."""
    keys = [k for k in other if k.startswith(part) and "@" not in k]
    assert keys and keys == [k for k in one if k.startswith(part) and "@" not in k]
    a, b = (torch.cat([of[k].double().flatten() for k in keys]) for of in (one, other))
    return float((a - b).norm() / b.norm())


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Ctrl-C during student update `after`, from 1."""
    iteration = Distillation.iteration

    def interrupted(self: Distillation, step: int, pairs: Any) -> dict[str, Tensor]:
        if step + 1 == after:
            os.kill(os.getpid(), signal.SIGINT)
        return iteration(self, step, pairs)

    monkeypatch.setattr(Distillation, "iteration", interrupted)


def calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[tuple[Any, ...]]:
    """The arguments of every call from now on."""
    made: list[tuple[Any, ...]] = []
    real = getattr(owner, name)

    def noted(*arguments: Any, **named: Any) -> Any:
        made.append(arguments)
        return real(*arguments, **named)

    monkeypatch.setattr(owner, name, noted)
    return made


def encoded(made: list[tuple[Any, ...]]) -> list[list[str]]:
    """What `TextEncoder.encode` was given, but for the empty prompt of guidance."""
    return [arguments[1] for arguments in made if arguments[1] != [""]]


# Every preset


PRESET_RUNS = {
    "sd15-one-step-lora": ("sd15", "sd1", "eps", {"batch_size": 2}),
    "sd15-one-step-full": ("sd15", "sd1", "eps", {}),
    "sd15-dmd2": ("micro", "sd1", "eps", {}),
    "sd15-paper": ("micro", "sd1", "eps", {"regression_loss": "pseudo-huber"}),
    "sd2-one-step-lora": ("sd2-v", "sd2", "v", {"steps": 3}),
    "sdxl-one-step-lora": ("sdxl", "sdxl", "eps", {"steps": 3, "regression_warmup_steps": 1}),
    # of their true layout, three networks and their moments take 5 GB
    "sd2-one-step-full": ("micro", "sd2", "v", {}),
    "sdxl-one-step-full": ("micro", "sdxl", "eps", {"regression_warmup_steps": 2}),
}


def test_there_is_a_run_below_for_every_preset_of_stable_diffusion() -> None:
    of_files = {name for name, preset in PRESETS.items() if preset.families}
    assert PRESET_RUNS.keys() == of_files - {"digits-one-step"}


@pytest.mark.parametrize("preset", PRESET_RUNS)
def test_a_few_iterations_of_a_preset_give_finite_losses_and_a_student_with_its_recipe(
    preset: str, tiny: Tiny, micro: Tiny, write: Write, dmd: Command, tmp_path: Path
) -> None:
    file, family, prediction, extra = PRESET_RUNS[preset]
    teacher = micro(family) if file == "micro" else tiny(file)
    weights = teacher / "unet" / "diffusion_pytorch_model.safetensors"
    weights = weights if teacher.is_dir() else teacher
    before = hash_of(weights)
    settings = {"teacher": str(teacher), "preset": preset, "resolution": 64, "steps": 5} | extra
    run_yaml = write(**settings, gradient_checkpointing=None)
    outcome = dmd("train", run_yaml)
    assert outcome.code == 0, outcome.out + outcome.err
    form = "lora" if preset.endswith("lora") else "unet"
    assert f"python -m dmd_train export {tmp_path}/run --as {form}" in one_line(outcome.out)

    run = tmp_path / "run"
    rows = metrics(run)
    assert [row["step"] for row in rows] == list(range(1, settings["steps"] + 1))
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert "critic/denoising" in rows[-1] and rows[-1]["critic/gradient_norm"] > 0
    assert ("student/regression" in rows[-1]) == (preset == "sd15-paper")
    assert (run / "curves.png").exists()

    assert hash_of(weights) == before
    tensors, metadata = read_safetensors(run / "student.safetensors")
    recipe = read_recipe(metadata, "student")
    assert recipe
    assert (recipe.family, recipe.prediction) == (family, prediction)
    assert recipe.timesteps == ((399,) if family == "sdxl" else (999,))
    assert recipe.teacher == teacher.stem and recipe.teacher_sha256 == before
    assert recipe.baked_guidance == PRESETS[preset].settings["guidance"]
    assert metadata["modelspec.resolution"] == "64x64"
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    assert all(value.isfinite().all() for value in tensors.values())
    if form == "lora":
        assert all(key.startswith("lora_unet_") for key in tensors)
    else:
        own = {k for k in tensors if k.startswith("model.diffusion_model.")}
        assert own == tensors.keys()
        if teacher.is_file():
            assert own == {k for k in load_file(teacher) if k.startswith("model.diffusion_model.")}
    values = state(run)
    # as many critic tensors as the student's; without an average, no third copy
    assert {key.split("/")[0] for key in values} == {"student", "critic"} | (
        {"ema"} if form == "lora" else set()
    )


@pytest.mark.parametrize("training", ["lora", "full"])
def test_iterations_move_critic_and_student_and_nothing_of_the_teacher(
    training: str, write: Write, no_curves: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = f"sd15-one-step-{training}"
    config = load_config(write(preset=preset, regression_weight=0.25, **LEARNS), [])
    loaded = networks.load_teacher(config, CPU)
    assert loaded.text
    network: Any = loaded.network
    parts = [network.module, network.decoder, *loaded.text.modules]
    before = [{k: v.clone() for k, v in part.state_dict().items()} for part in parts]
    with RunFolder(config) as run:
        ready = carried_out(prepare(run, loaded), lambda _: None)
        distillation, made = ready.state, ready.pairs
        roles = distillation.roles
        start = {
            name: {k: v.detach().clone() for k, v in getattr(roles, name).parameters.items()}
            for name in ("critic", "student")
        }
        for step in range(2):
            distillation.iteration(step, made)
    for part, old in zip(parts, before, strict=True):
        now = {
            key.replace(".base_layer", ""): value
            for key, value in part.state_dict().items()
            if ".lora_" not in key
        }
        assert same(now, old)
    for name, old in start.items():
        parameters = getattr(roles, name).parameters
        assert all(not torch.equal(parameters[key], value) for key, value in old.items())
        assert (len(parameters) == len(before[0])) == (training == "full")
    assert not any(p.requires_grad for part in parts[1:] for p in part.parameters())


def test_the_student_that_is_saved_is_the_average(write: Write, train: Command) -> None:
    run = train(write(steps=6, **LEARNS))
    saved, kept = load_file(run / "student.safetensors"), state(run)
    inner = "mid_block.resnets.0.conv1.lora_B.student.weight"
    average, last = kept[f"ema/{inner}"], kept[f"student/{inner}"]
    assert (average - last).norm() > 0.01 * last.norm()
    assert torch.equal(saved["lora_unet_mid_block_resnets_0_conv1.lora_up.weight"], average.half())


# Pairs


def test_the_warm_up_learns_from_pairs_alone_and_the_critic_waits(
    write: Write, train: Command
) -> None:
    settings = {"steps": 4, "regression_warmup_steps": 2, "regression_weight": 0.25}
    rows = metrics(train(write(**settings)))
    warm = {"step", "student/regression", "student/gradient_norm"}
    whole = warm | {
        "student/distribution_matching",
        "critic/denoising",
        "critic/gradient_norm",
    }
    assert [set(row) for row in rows] == [warm, warm, whole, whole]


def test_pairs_are_made_once(
    write: Write, dmd: Command, train: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_yaml = write(regression_weight=0.25)
    made = calls(monkeypatch, pairs, "sample_teacher")
    outcome = dmd("pairs", run_yaml)
    assert outcome.code == 0 and "run/pairs: 3 pairs" in one_line(outcome.out), outcome
    assert len(made) == 3
    shards = sorted((tmp_path / "run/pairs").iterdir())
    before = [(file.stat().st_mtime_ns, file.read_bytes()) for file in shards]
    assert dmd("pairs", run_yaml).code == 0
    rows = metrics(train(run_yaml))
    assert all("student/regression" in row for row in rows)
    assert len(made) == 3
    assert [(file.stat().st_mtime_ns, file.read_bytes()) for file in shards] == before


def test_ctrl_c_while_pairs_are_made_keeps_whole_files_and_the_same_command_goes_on(
    write: Write, dmd: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pairs, "BYTES", 1)
    run_yaml = write(pairs=10, pair_batch_size=4, regression_weight=0.25)
    assert dmd("pairs", run_yaml).code == 0
    folder = tmp_path / "run/pairs"
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert len(whole) == 3
    shutil.rmtree(folder)

    sample, made = pairs.sample_teacher, [0]

    def interrupted(*arguments: Any) -> Tensor:
        made[0] += 1
        if made[0] == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return sample(*arguments)

    monkeypatch.setattr(pairs, "sample_teacher", interrupted)
    outcome = dmd("pairs", run_yaml)
    assert outcome.code == 128 + signal.SIGINT
    assert "pairs: 8 of 10 kept; the same command goes on." in one_line(outcome.out)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        name: content for name, content in whole.items() if name < "shard-00002"
    }
    assert dmd("pairs", run_yaml).code == 0
    assert made[0] == 3
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == whole


# Stop and go on


def test_a_stopped_lora_run_goes_on_to_bit_identical_weights(
    write: Write,
    dmd: Command,
    train: Command,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    settings = {"steps": 5, "checkpoint_every": 2, "regression_weight": 0.25, "batch_size": 2}
    run_yaml = write(**settings, **LEARNS)
    run = train(run_yaml)
    whole, student = state(run), load_file(run / "student.safetensors")
    rows = metrics(run)
    shutil.rmtree(run)

    with monkeypatch.context() as patch:
        interrupt(patch, after=3)
        outcome = dmd("train", run_yaml)
    assert outcome.code == 128 + signal.SIGINT
    assert f"stopped and saved. Go on with: {cli.PYTHON} -m dmd_train train {run_yaml}" in one_line(
        outcome.out
    )
    assert [row["step"] for row in metrics(run)] == [1, 2, 3]
    outcome = dmd("train", run_yaml)
    assert outcome.code == 0 and "going on from step 3" in one_line(outcome.out)
    assert same(state(run), whole)
    assert same(load_file(run / "student.safetensors"), student)
    assert metrics(run) == rows


def reports_of(config: Config, run: RunFolder) -> Iterator[StepReport]:
    """As `train` has them."""
    loaded = networks.load_teacher(config, CPU)
    return distil(carried_out(prepare(run, loaded), lambda _: None))


def test_checkpoints_deleted_while_a_run_goes_on_are_written_again(
    write: Write, train: Command, tmp_path: Path
) -> None:
    run_yaml = write(steps=6, checkpoint_every=2, **LEARNS)
    run = train(run_yaml)
    whole, student = state(run), load_file(run / "student.safetensors")
    shutil.rmtree(run)
    seen = []
    config = load_config(run_yaml, [])
    with RunFolder(config) as folder:
        for report in reports_of(config, folder):
            seen.append(sorted(int(f.stem[5:]) for f in folder.checkpoints.glob("*")))
            if report.step == 3:
                shutil.rmtree(folder.checkpoints)
    assert seen == [[], [2], [2], [4], [4], [4, 6]]
    assert same(state(run), whole)
    assert same(load_file(run / "student.safetensors"), student)


# Bad input


def lora_file(path: Path) -> None:
    save_file(kohya_lora("sd1"), path)


def inpainting_file(path: Path) -> None:
    save_file(diffusers_unet("sd1", in_channels=9), path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lora_file, ["a LoRA", "Give SD 1.x"]),
        (inpainting_file, ["inpainting", "Give "]),
    ],
)
def test_a_file_that_cannot_teach_is_refused(
    make: Callable[[Path], None], words: list[str], write: Write, dmd: Command, tmp_path: Path
) -> None:
    path = tmp_path / "models" / "wrong.safetensors"
    path.parent.mkdir()
    make(path)
    for command in ("train", "plan"):
        refused(dmd(command, write(teacher=str(path))), path, *words)


@pytest.mark.parametrize("training", ["lora", "full"])
def test_a_student_is_refused_as_a_teacher(
    training: str, write: Write, train: Command, dmd: Command, tmp_path: Path
) -> None:
    student = train(write(preset=f"sd15-one-step-{training}", steps=1)) / "student.safetensors"
    moved = tmp_path / "models" / "moved.safetensors"
    moved.parent.mkdir()
    student.rename(moved)
    said = "a LoRA" if training == "lora" else "already a 1-step student"
    outcome = dmd("train", write(teacher=str(moved), output=str(tmp_path / "other")))
    refused(outcome, moved, said, "Give ")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\n  \n\n", ["holds no prompts", "Write one a line, or leave `prompts` out"]),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", ["not a text file", "Write one prompt a line"]),
        (b"a\0b", ["not a text file", "Write one prompt a line"]),
        (None, ["No such file or directory", "Write one prompt a line"]),
    ],
)
def test_a_file_without_prompts_is_refused(
    content: bytes | None, words: list[str], write: Write, dmd: Command, tmp_path: Path
) -> None:
    listed = tmp_path / "listed.txt"
    if content is not None:
        listed.write_bytes(content)
    for command in ("train", "plan"):
        refused(dmd(command, write(prompts=str(listed))), listed, *words)


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    """As if these packages were not installed, and torchvision, unless among them, were."""
    spec = importlib.util.find_spec("json")
    found = importlib.util.find_spec

    def find_spec(name: str, *arguments: Any) -> Any:
        if name in missing:
            return None
        return spec if name == "torchvision" else found(name, *arguments)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


LPIPS = {"regression_loss": "lpips", "regression_weight": 0.25}


@pytest.mark.parametrize(
    ("settings", "missing", "words"),
    [
        ({"preset": "sd2-one-step-lora"}, [], ["sd2-one-step-lora", "sd1", "sd15-one-step-lora"]),
        ({"preset": "digits-one-step"}, [], ["digits-one-step", "sd15-one-step-full"]),
        ({"preset": "sd15-onestep-lora"}, [], ["Did you mean 'sd15-one-step-lora'?"]),
        ({"resolution": 100}, [], ["resolution: 100 is no multiple of 64"]),
        (LPIPS, ["torchvision"], ["torchvision", "regression_loss: pseudo-huber"]),
        (LPIPS, [], ["vgg16-397923af.pth", "Download", "regression_loss: pseudo-huber"]),
        ({"trackers": ["wandb"]}, ["wandb"], ["trackers: wandb", "pip install wandb"]),
        ({"optimizer": "adamw-8bit"}, ["bitsandbytes"], ["adamw-8bit", "pip install bitsandbytes"]),
        ({"conditioning_timestep": 1000}, [], ["conditioning_timestep", "1000"]),
        ({"decoder": "prompts.txt"}, [], ["prompts.txt", "not a whole safetensors file"]),
    ],
)
def test_a_setting_that_cannot_be_is_refused_before_anything_is_made(
    settings: dict[str, Any],
    missing: list[str],
    words: list[str],
    write: Write,
    dmd: Command,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    without(monkeypatch, *missing)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    run_yaml = write(**settings)
    refused(dmd("plan", run_yaml), *words)
    refused(dmd("train", run_yaml), *words)
    assert not (tmp_path / "run/pairs").exists() and not (tmp_path / "run/text").exists()


def test_a_decoder_that_is_no_taesd_is_refused(write: Write, dmd: Command, tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    save_file({"decoder.conv_in.weight": torch.zeros(4, 4)}, path)
    refused(dmd("train", write(decoder=str(path))), path, "no TAESD decoder", "leave decoder out")


def test_an_export_that_cannot_be_is_refused(
    write: Write, dmd: Command, train: Command, tmp_path: Path
) -> None:
    run_yaml = write(preset="sd15-one-step-full", steps=1)
    run = tmp_path / "run"
    refused(dmd("export", run, "--as", "unet"), "run.yaml", "no such file")
    run.mkdir()
    shutil.copy(run_yaml, run)
    refused(dmd("export", run, "--as", "unet"), run, "no checkpoint yet", "Train it first")
    train(run_yaml)
    refused(dmd("export", run, "--as", "lora"), run, "training: full", "--as unet")
    refused(dmd("export", run, "--as", "checkpoint"), "a folder", "--as unet")
    assert not list(run.glob("student-*"))


def test_an_export_onto_a_full_disk_is_one_line_and_leaves_the_older_export(
    write: Write, dmd: Command, train: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(write(steps=1))
    assert dmd("export", run, "--as", "lora").code == 0
    path = run / "student-lora.safetensors"
    older, listed = path.read_bytes(), sorted(file.name for file in run.iterdir())

    def fills_the_disk(tensors: Any, temporary: Path, metadata: Any) -> None:
        Path(temporary).write_bytes(b"half of the ne")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "save_file", fills_the_disk)
    refused(dmd("export", run, "--as", "lora"), path, "No space left on device", "Make room")
    assert path.read_bytes() == older
    refused(dmd("export", run, "--as", "unet"), "No space left on device")
    assert sorted(file.name for file in run.iterdir()) == listed


# Prompts


def test_prompts_over_77_tokens_are_told_in_one_line_and_trained_on(
    write: Write, dmd: Command, no_curves: None, tmp_path: Path
) -> None:
    listed = tmp_path / "listed.txt"
    long = ["a very " + "long " * 40 + name for name in ("dog", "cat")]
    listed.write_text("\n".join(["a red fox", *long]))
    # regression, so that prompts are needed twice
    outcome = dmd("train", write(prompts=str(listed), regression_weight=0.25, steps=1))
    assert outcome.code == 0, outcome.err
    warned = [line for line in outcome.out.splitlines() if "warning" in line]
    assert len(warned) == 1, outcome.out
    assert f"{listed}: 2 of 3 prompts have more than 77 tokens" in warned[0]
    assert "'a very long long" in warned[0]


def test_a_prompt_counts_once_and_a_blank_line_not_at_all(tmp_path: Path) -> None:
    listed = tmp_path / "listed.txt"
    listed.write_bytes("\ufeffa fox\r\n\r\n  a fox  \n\t\nthe Ümlaut\na fox\n".encode())
    assert prompts.read_prompts(listed) == ["a fox", "the Ümlaut"]


def test_without_prompts_the_shipped_list_is_read(
    write: Write, train: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = prompts.read_prompts(None)
    assert len(shipped) >= 1000 and shipped == prompts.SHIPPED.read_text().strip().split("\n")
    made = calls(monkeypatch, TextEncoder, "encode")
    monkeypatch.setattr(prompts, "SHIPPED", ROOT / "LICENSE")
    train(write(prompts=None, steps=1))
    assert [prompt for batch in encoded(made) for prompt in batch] == prompts.read_prompts(
        ROOT / "LICENSE"
    )


def test_prompts_are_encoded_once_for_pairs_and_every_training(
    write: Write, dmd: Command, no_curves: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_yaml = write(regression_weight=0.25)
    made = calls(monkeypatch, TextEncoder, "encode")
    assert dmd("pairs", run_yaml).code == 0
    assert encoded(made) == [PROMPTS]
    assert dmd("train", run_yaml).code == 0
    assert encoded(made) == [PROMPTS]


def test_other_prompts_under_the_same_name_are_refused_where_a_run_has_begun(
    write: Write, dmd: Command, no_curves: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_yaml = write()
    with monkeypatch.context() as patch:
        interrupt(patch, after=1)
        assert dmd("train", run_yaml).code == 128 + signal.SIGINT
    (tmp_path / "prompts.txt").write_text("a yellow car\n")
    refused(dmd("train", run_yaml), tmp_path / "run/text", "from other prompts", "another output")


def test_prompts_encoded_while_training_give_the_same_student_but_for_float16(
    write: Write, train: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_yaml = write(steps=4, regression_weight=0.25, **LEARNS)
    run = train(run_yaml)
    on_disk = state(run)
    shutil.rmtree(run)
    monkeypatch.setattr(prompts, "ON_DISK", 0)
    made = calls(monkeypatch, TextEncoder, "encode")
    live = state(train(run_yaml))
    assert not (run / "text").exists() and len(encoded(made)) > 4 * 3
    distance = apart(live, on_disk, "ema/")
    assert 0 < distance < 2e-3  # 2e-4 here


# plan and presets


def everything_in(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


def test_plan_tells_what_a_run_takes_and_leaves_nothing_behind(
    write: Write, dmd: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run_yaml = write(regression_weight=0.25)
    before = everything_in(tmp_path)
    outcome = dmd("plan", run_yaml)
    assert outcome.code == 0, outcome.err
    assert everything_in(tmp_path) == before
    said = outcome.out
    config = load_config(run_yaml, [])
    roles = make_roles(networks.load_teacher(config, CPU).network, config)
    trained = sum(p.numel() for p in roles.student.parameters.values()) / 1e6
    assert f"lora, {trained:.1f} M parameters" in said
    for row in ("peak memory", "peak RAM", "disk", "an iteration", "pairs", "the run, 3 steps"):
        assert row in said
    assert "GiB" in said and " min " in said and "yes" in said and "NO" not in said


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
    write: Write,
    dmd: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "_ram_room", lambda: 1)
    monkeypatch.setattr(plan, "ITERATIONS", 1)
    outcome = dmd("plan", write(**settings))
    assert outcome.code == 0, outcome.err
    assert "NO" in outcome.out and advice in outcome.out


def test_presets_prints_every_number_with_its_source(
    dmd: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    lines = dmd("presets").out.splitlines()
    for name, preset in PRESETS.items():
        start = next(i for i, line in enumerate(lines) if line.startswith(f"{name}: "))
        assert preset.about in lines[start]
        table = lines[start + 4 : start + 4 + len(preset.choices)]
        for line, (key, choice) in zip(table, preset.choices.items(), strict=True):
            cells = [cell.strip() for cell in line.strip("│┃ ").split("│")]
            assert cells == [key, str(choice.value), choice.source]
            assert choice.source.strip() and key in Config.model_fields


# trackers


def test_tensorboard_writes_into_the_run_folder_and_changes_no_number(
    write: Write, train: Command, tmp_path: Path
) -> None:
    settings = {"sample_every": 2, "steps": 2}
    run = train(write(**settings))
    plain = metrics(run)
    assert not list(run.rglob("events.*"))
    shutil.rmtree(run)
    train(write(**settings, trackers=["tensorboard"]))
    assert metrics(run) == plain
    events = [file for file in run.rglob("events.*") if b"samples" in file.read_bytes()]
    assert events and all(b"critic/denoising" in file.read_bytes() for file in events)
    assert everything_in(tmp_path) == everything_in(run) | {
        str(tmp_path / name) for name in ("prompts.txt", "run.yaml", "run")
    }


# sample


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, micro: Tiny) -> Callable[[str], Path]:
    """The run folder of a student of micro("sd1"), by training."""
    parent = tmp_path_factory.mktemp("students")

    def trained(training: str) -> Path:
        run = parent / training
        if not run.exists():
            own = {"teacher": str(micro("sd1")), "preset": f"sd15-one-step-{training}"}
            values = SMALL | LEARNS | own | {"output": str(run), "prompts": str(parent / "p.txt")}
            (parent / "p.txt").write_text("\n".join(PROMPTS))
            run_yaml = parent / "run.yaml"
            run_yaml.write_text(yaml.safe_dump(values))
            cli.app(["train", str(run_yaml)], standalone_mode=False)
        return run

    return trained


def latent(path: Path) -> Tensor:
    return load_file(path)["latent_tensor"]


def test_samples_take_the_prompts_by_turns_and_another_seed_gives_others(
    student: Callable[[str], Path], dmd: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = student("lora") / "student.safetensors"
    made = calls(monkeypatch, TextEncoder, "encode")

    def drawn(name: str, *arguments: object) -> Tensor:
        outcome = dmd("sample", file, "--out", name, *arguments)
        assert outcome.code == 0, outcome.err
        return latent(tmp_path / name)

    two = ("--prompt", "a red fox", "--prompt", "a blue bird")
    both = drawn("both.latent", *two, "--count", 4)
    assert both.shape == (4, 4, 8, 8) and both.dtype == torch.float32
    assert encoded(made) == [["a red fox", "a blue bird"] * 2]
    again = drawn("again.latent", *two, "--count", 4)
    other = drawn("other.latent", *two, "--count", 4, "--seed", 1)
    fox = drawn("fox.latent", "--prompt", "a red fox", "--count", 4)
    assert torch.equal(again, both)
    assert not torch.isclose(other, both).any(dim=-1).all()
    torch.testing.assert_close(fox[[0, 2]], both[[0, 2]], rtol=1e-4, atol=1e-5)
    assert not torch.equal(fox[1], both[1])


def test_a_lora_outside_its_run_folder_needs_its_base_and_no_other(
    student: Callable[[str], Path], micro: Tiny, dmd: Command, tmp_path: Path
) -> None:
    inside = student("lora") / "student.safetensors"
    moved = tmp_path / "moved.safetensors"
    shutil.copy(inside, moved)
    asked = ("--prompt", "a red fox", "--count", 1)
    refused(dmd("sample", moved, "--out", "x.latent", *asked), moved, "--base FILE")
    outcome = dmd("sample", moved, "--out", "x.latent", *asked, "--base", micro("sdxl"))
    refused(outcome, moved, "sd1", "is sdxl", "own base")
    assert not (tmp_path / "x.latent").exists()
    for name, file, base in (("x", moved, ["--base", micro("sd1")]), ("y", inside, [])):
        outcome = dmd("sample", file, "--out", f"{name}.latent", *asked, *base)
        assert outcome.code == 0, outcome.err
    assert torch.equal(latent(tmp_path / "x.latent"), latent(tmp_path / "y.latent"))


def test_a_whole_student_draws_pictures_too(
    student: Callable[[str], Path], dmd: Command, tmp_path: Path
) -> None:
    file = student("full") / "student.safetensors"
    outcome = dmd("sample", file, "--out", "x", "--prompt", "a red fox", "--count", 2)
    assert outcome.code == 0, outcome.err
    assert [path.name for path in sorted((tmp_path / "x").iterdir())] == ["00000.png", "00001.png"]


def test_a_class_for_a_text_model_and_a_prompt_for_the_digits_are_refused(
    student: Callable[[str], Path], dmd: Command
) -> None:
    file = student("lora") / "student.safetensors"
    refused(dmd("sample", file, "--out", "x.png", "--class", 7), file, "--prompt")
    refused(dmd("sample", file, "--out", "x.png"), file, "--prompt")
    digits = networks.DIGITS_TEACHER
    refused(dmd("sample", digits, "--out", "x.png", "--prompt", "seven"), digits, "--class 7")
    refused(dmd("sample", digits, "--out", "x.latent"), "draw pixels, not latents")


# Two processes


def start_two(run_yaml: Path) -> "subprocess.Popen[str]":
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen(
        [*launch, "-m", "dmd_train", "train", str(run_yaml)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("teacher", ["digits", "coloured-digits"])
def test_two_processes_give_the_weights_of_one(
    teacher: str, write: Write, write_run: Write, train: Command, tmp_path: Path
) -> None:
    if teacher == "digits":
        run_yaml = write_run(tmp_path, steps=4, sample_every=4, checkpoint_every=2)
    else:
        settings = {"teacher": str(COLOURED_DIGITS), "batch_size": 2, "pair_batch_size": 2}
        run_yaml = write(**settings, regression_weight=0.25, sample_every=3, **LEARNS)
    process = start_two(run_yaml)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert one_line(output).count("finished. Next:") == 1  # said by one of them
    run = tmp_path / "run"
    two, rows = state(run), metrics(run)
    shards = {file: file.read_bytes() for file in run.glob("pairs/*")}
    assert list(run.glob("samples/*.png")) and shards
    shutil.rmtree(run)
    one = state(train(run_yaml))
    for part in ("student/", "critic/", "ema/"):
        assert apart(two, one, part) < 1e-5
    for got, expected in zip(rows, metrics(run), strict=True):
        assert got == pytest.approx(expected, rel=1e-3)
    assert {file: file.read_bytes() for file in run.glob("pairs/*")} == shards


def test_a_run_begun_by_two_processes_and_stopped_goes_on_in_one(
    write: Write, train: Command, tmp_path: Path
) -> None:
    run_yaml = write(steps=10, batch_size=2, checkpoint_every=1, **LEARNS)
    run = tmp_path / "run"
    process = start_two(run_yaml)
    while not list(run.glob("checkpoints/step-*")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.terminate()
    output = one_line(process.communicate(timeout=120)[0])
    assert process.returncode != 0 and "stopped and saved. Go on with: " in output
    stopped = metrics(run)[-1]["step"]
    assert stopped < 10
    assert (run / f"checkpoints/step-{stopped:08d}.safetensors").exists()
    assert (run / "student.safetensors").exists()
    mixed = state(train(run_yaml))
    shutil.rmtree(run)
    one = state(train(run_yaml))
    for part in ("student/", "critic/", "ema/"):
        assert apart(mixed, one, part) < 1e-5
