"""Hostile input: files, settings and options, drawn by a random number generator.

`makers` gives, by kind, what puts one input's files into a folder. Half of the damage is to the
bytes, half to what they say.
"""

import importlib
import json
import os
import pickle
import shutil
import struct
import warnings
import zipfile
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from kit.adm import adm_state
from kit.fuzz import PROOF, Attempt, Maker, _forked
from kit.sd_files import micro_pipeline
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from dmd_train.files.read import read_safetensors
from dmd_train.method.lora import kohya_name
from dmd_train.method.recipe import Recipe
from dmd_train.networks.load import DIGITS_TEACHER
from dmd_train.networks.load import save as save_network

Weights = dict[str, Tensor]

NEEDED_BY_COMMANDS = (
    "dmd_train.terminal.commands",
    "dmd_train.networks.sd_load",
    "dmd_train.networks.imagenet64",
    "dmd_train.run.curves",
    "dmd_train.run.metrics",
    "peft",
    "sklearn.datasets",
)
"""Imported once, before the first fork."""

STUDENT = Recipe(family="sd1", prediction="eps", timesteps=(499,), noise_scale=1.0)

RUN = {
    "teacher": "digits",
    "output": "run",
    "steps": 4,
    "batch_size": 2,
    "pairs": 12,
    "pair_batch_size": 4,
    "pair_steps": 2,
    "critic_updates": 1,
    "checkpoint_every": 2,
    "sample_every": 4,
}
SD_RUN = RUN | {
    "preset": "sd15-one-step-lora",
    "lora_rank": 1,
    "steps": 1,
    "batch_size": 1,
    "pairs": 1,
    "pair_batch_size": 1,
    "pair_steps": 1,
    "regression_weight": 0,
    "sample_every": 1,
    "checkpoint_every": 1,
    "resolution": 64,
    "device": "cpu",
}

CONTROL = "a\x1b[31mred\x1b]0;owned\x07\r\nerror: fine"
STRANGE: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    7,
    10**5,
    10**9,
    2**63,
    10**30,
    -(10**30),
    0.5,
    1e-300,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "many",
    CONTROL,
    "\0",
    "\ud800",
    "x" * 1_000_000,
    "../../there/thesis.txt",
    "/dev/zero",
    [],
    [0],
    [-1, 10**9],
    [[[[]]]],
    list(range(200_000)),
    {},
    {"a": {"b": None}},
)
"""Values where others are meant."""


def makers(models: Path) -> dict[str, Maker]:
    """By kind. models: an empty folder, for what is damaged copies of which."""
    for module in NEEDED_BY_COMMANDS:
        importlib.import_module(module)
    torch.set_num_threads(1)
    pipeline = micro_pipeline(models / "pipeline")
    (pipeline / "prompts.txt").write_text("a 3\n")
    unet, _ = read_safetensors(pipeline / "unet/diffusion_pytorch_model.safetensors")
    lora = _lora_of(unet)
    adm = adm_state(8, [128], 1, set(), 10)
    digits, about_digits = read_safetensors(DIGITS_TEACHER)
    student = about_digits | Recipe(
        family="digits", prediction="edm", timesteps=(999,), noise_scale=80.0
    ).to_metadata("digits", (1, 8, 8))
    own, about_own = _edm_unet(models / "edm.safetensors")
    of_sd = ["--base", str(pipeline), "--prompt", "a red 3"]
    told = STUDENT.to_metadata("micro", (3, 64, 64))
    run = _finished_run(models / "finished")
    return {
        "yaml": _yaml,
        "set": _set,
        "options": partial(_options, run),
        "prompts": partial(_prompts, pipeline),
        "special": partial(_special, pipeline),
        "bytes": partial(_bytes, DIGITS_TEACHER.read_bytes()),
        "header": partial(_header, digits, student),
        "student": partial(_weights, digits, student, []),
        "network": partial(_weights, own, about_own, []),
        "metadata": partial(_metadata, own, about_own),
        "adm": partial(_weights, adm, {}, []),
        "lora": partial(_weights, lora, told, of_sd),
        "unet": partial(_weights, unet, told, of_sd),
        "checkpoint": partial(_weights, _single_file(pipeline, unet), told, ["--prompt", "a 3"]),
        "pickle": partial(_pickle, adm),
        "folder": partial(_folder, pipeline),
        "decoder": partial(_decoder, pipeline),
        "run": partial(_run, run),
    }


def _lora_of(unet: Weights) -> Weights:
    tensors = {}
    for name in [key.removesuffix(".weight") for key in unet if key.endswith("to_k.weight")]:
        out, inside = unet[f"{name}.weight"].shape
        key = kohya_name(name)
        tensors[f"{key}.lora_down.weight"] = torch.ones(2, inside) / inside
        tensors[f"{key}.lora_up.weight"] = torch.ones(out, 2)
        tensors[f"{key}.alpha"] = torch.tensor(1.0)
    return tensors


def _edm_unet(path: Path) -> tuple[Weights, dict[str, str]]:
    from dmd_train.networks.edm_unet import edm_unet

    network = edm_unet(
        classes=3,
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
    )
    save_network(path, network)
    return read_safetensors(path)


def _single_file(pipeline: Path, unet: Weights) -> Weights:
    """In LDM's names, with room for all of CLIP's tokens."""
    from diffusers import UNet2DConditionModel

    from dmd_train.networks.ldm_names import LDM, unet_names

    config = UNet2DConditionModel.load_config(pipeline / "unet")
    with torch.device("meta"):
        names = unet_names(unet, UNet2DConditionModel.from_config(config).config)
    weights = {LDM + names[key]: value for key, value in unet.items()}
    clip, _ = read_safetensors(pipeline / "text_encoder/model.safetensors")
    prefix = "cond_stage_model.transformer."
    few = next(key for key in clip if key.endswith("token_embedding.weight"))
    clip[few] = clip[few].repeat(49408 // len(clip[few]) + 1, 1)[:49408].half()
    return weights | {
        prefix + (key if key.startswith("text_model.") else f"text_model.{key}"): value
        for key, value in clip.items()
    }


def _finished_run(folder: Path) -> Path:
    """A folder with a run.yaml and its run, which is finished."""
    folder.mkdir(parents=True)
    _settings(folder, RUN)
    room = folder / "here"
    room.mkdir()
    shutil.move(folder / "run.yaml", room)
    code, *_ = _forked(["train", "run.yaml"], room)
    assert code == 0, (folder / "stderr").read_text()
    return room


def _settings(folder: Path, values: dict[str, Any]) -> None:
    (folder / "run.yaml").write_text(yaml.safe_dump(values))


def _sd_run(pipeline: Path) -> dict[str, Any]:
    return SD_RUN | {"teacher": str(pipeline), "prompts": str(pipeline / "prompts.txt")}


def _strange(random: Random) -> Any:
    return random.choice(STRANGE)


# ---- what is typed

NASTY_YAML = (
    "a: &a [x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n"
    "d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d]\n"
    "f: &f [*e,*e,*e,*e,*e,*e,*e,*e]\nteacher: [*f,*f,*f,*f,*f,*f,*f,*f]\noutput: run\n",
    "&a\nteacher: *a\noutput: run\n",
    "steps: 1\nsteps: 2\nteacher: digits\noutput: run\n",
    "steps: " + "9" * 5000,
    "[" * 3000,
    "{a: " * 3000,
    "- " * 3000,
    "? " * 3000,
    "!!python/object/apply:os.system ['touch executed']",
    "teacher: !!python/object/apply:os.system ['touch executed']",
    "--- a\n--- b\n",
    "\ufeffteacher: digits\n",
    "a" * 2_000_000,
    "'" * 10,
    "\t\tx: 1",
    "%YAML 9.9\n---\nx: 1",
    "x: !foo bar",
    "<<: [1]",
    "? [a]\n: b\n",
    "null",
    "42",
    "~: ~",
    "{}",
)
NASTY_VALUES = (
    "2024-99-99",
    "2024-01-01",
    "2024-01-01 00:00:00",
    "!!int x",
    "!!int ''",
    "!!float x",
    "!!bool x",
    "!!timestamp abc",
    "!!binary '???'",
    "!!set {a}",
    "!!omap [a]",
    "!!python/name:os.system",
    "!!python/object/apply:os.system ['touch executed']",
    "9" * 5000,
    "1e999",
    ".inf",
    ".nan",
    "-.inf",
    "0x" + "f" * 5000,
    "1:2:3:4",
    "[" * 2000,
    "&a [*a]",
    "[*x]",
    "{a: b",
    "'\\x1b[31m'",
    '"\\e[31m\\r\\n\\0"',
    '"\\ud800"',
    "|\n  a\n  b",
    "nul",
    "CON",
    ".",
    "..",
    "''",
    "/",
    "x" * 300,
    "x" * 100_000,
    "~",
    "yes",
    "[yes, no]",
    "{a: 1}",
    "-0",
    "1_000",
    "010",
    "0o7",
    "1" * 400,
    "-1",
    "0",
    "1e12",
    "1000000000000",
    "9223372036854775808",
)
SETTINGS = (
    "teacher",
    "prompts",
    "output",
    "preset",
    "seed",
    "device",
    "cpu_threads",
    "precision",
    "training",
    "lora_rank",
    "lora_alpha",
    "resolution",
    "optimizer",
    "steps",
    "batch_size",
    "micro_batch_size",
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "clip_norm",
    "ema_decay",
    "critic_updates",
    "guidance",
    "t_min",
    "t_max",
    "timesteps",
    "regression_weight",
    "regression_warmup_steps",
    "regression_loss",
    "pairs",
    "pair_batch_size",
    "pair_sampler",
    "pair_steps",
    "decoder",
    "checkpoint_every",
    "sample_every",
    "trackers",
    "stepz",
)


def _yaml(random: Random, folder: Path) -> Attempt:
    text = yaml.safe_dump(RUN)
    match random.randrange(4):
        case 0:
            text = random.choice(NASTY_YAML)
        case 1:
            key = random.choice(SETTINGS)
            lines = [line for line in text.splitlines() if not line.startswith(f"{key}:")]
            text = "\n".join([*lines, f"{key}: {random.choice(NASTY_VALUES)}"])
        case 2:
            values = RUN | {random.choice(SETTINGS): _plain(_strange(random))}
            text = yaml.safe_dump(values)
        case 3:
            data = bytearray(text.encode())
            for _ in range(random.randrange(1, 6)):
                data[random.randrange(len(data))] = random.randrange(256)
            (folder / "run.yaml").write_bytes(data)
            return Attempt(["train", "run.yaml"], ("run/", "run"))
    (folder / "run.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    return Attempt([random.choice(["train", "plan", "pairs"]), "run.yaml"], ("run/", "run"))


def _plain(value: Any) -> Any:
    """What YAML can hold: it has no lone surrogates."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _set(random: Random, folder: Path) -> Attempt:
    _settings(folder, RUN)
    key, value = random.choice(SETTINGS), random.choice(NASTY_VALUES)
    change = random.choice([f"{key}={value}"] * 8 + [key, f"={value}", f"{CONTROL}=1", "a.b=1"])
    command = random.choice(["train", "plan", "pairs"])
    return Attempt([command, "run.yaml", "--set", change[:100_000]], ("run/", "run"))


def _options(run: Path, random: Random, folder: Path) -> Attempt:
    shutil.copytree(run, folder, dirs_exist_ok=True)
    (folder / "notes.txt").write_text("mine")
    (folder / "mine.safetensors").write_bytes(b"weights of mine")
    (folder / "mine").mkdir()
    (folder / "mine/notes.txt").write_text("mine")
    number = random.choice(["-1", "0", "1", "7", "10", "1000000000", "9" * 30, "9" * 5000, "nan"])
    number = random.choice([number, "", CONTROL, "2.5", str(2**63), str(2**64), "٣", "0x10"])
    text = random.choice(["", CONTROL, "\udcff", "x" * 100_000, "{}", "a\nb", "../x", "-"])
    out = random.choice(
        [
            *("out.npy", "out.png", "out", "out.latent", "out.jpg", "notes.txt", "mine"),
            *("no/such/folder/x.png", "x" * 300 + ".png", f"{CONTROL}.png", "\udcff.png", "", "/"),
            *("/proc/x.npy", "run.yaml/x.png", "mine.safetensors", "run", "notes.txt/x.npy"),
            *(".", "/dev/full"),
        ]
    )
    teacher = str(DIGITS_TEACHER)
    arguments = random.choice(
        [
            ["sample", teacher, "--out", out, "--count", "1"],
            ["sample", teacher, "--out", "out.npy", "--count", number],
            ["sample", teacher, "--out", "out.npy", "--seed", number, "--count", "1"],
            ["sample", teacher, "--out", "out.npy", "--class", number, "--count", "1"],
            ["sample", teacher, "--out", "out.npy", "--prompt", text],
            ["sample", text, "--out", "out.npy"],
            ["sample", teacher, "--base", text, "--out", "out.npy", "--count", "1"],
            ["evaluate", text],
            ["export", "run", "--as", text],
            ["export", text, "--as", "lora"],
            ["export", "run", "--as", "unet", "--out", out],
            ["export", "run", "--as", "lora", "--dtype", text],
            ["teacher", "digits", "--steps", "1", "--out", out],
            ["teacher", "digits", "--steps", "1", "--seed", number, "--out", "out.safetensors"],
            ["train", text],
            ["train", "run.yaml", text],
            ["train", "run.yaml", f"--{text}"],
            [text],
            ["train"],
        ]
    )
    arguments = [argument.replace("\0", "") for argument in arguments]
    # nothing that is there may change: the run is finished
    return Attempt(arguments, ("out", "x", "no/", CONTROL[:1], "\udcff"))


def _prompts(pipeline: Path, random: Random, folder: Path) -> Attempt:
    path = folder / "prompts.txt"
    name = "prompts.txt"
    match random.randrange(12):
        case 0:
            path.write_bytes(random.randbytes(1000))
        case 1:
            path.write_bytes(b"a" * 50_000_000)
        case 2:
            path.write_bytes(b"\n" * 1_000_000)
        case 3:
            path.write_text("a\0b")
        case 4:
            path.write_text("\ud800", errors="surrogatepass")
        case 5:
            path.write_text(f"a {CONTROL}\nb")
        case 6:
            path.mkdir()
        case 7:
            os.mkfifo(path)
        case 8:
            name = random.choice(["/dev/zero", "/dev/full", ".", "x" * 5000, CONTROL, "none"])
        case 9:
            path.write_text("\n".join(f"{i}" * 3 for i in range(30)), encoding="utf-16")
        case 10:
            path.write_text(" ".join(["red"] * random.choice([200, 200_000])))
        case 11:
            path.symlink_to(path)
    _settings(folder, _sd_run(pipeline) | {"prompts": name})
    return Attempt(["train", "run.yaml"], ("run/", "run"))


def _special(pipeline: Path, random: Random, folder: Path) -> Attempt:
    """What is no file, wherever a file is meant."""
    suffix = random.choice([".safetensors", ".bin", ".ckpt", ""])
    name = f"model{suffix}"
    path = folder / name
    match random.randrange(8):
        case 0:
            path.mkdir()
        case 1:
            os.mkfifo(path)
        case 2:
            name = random.choice(["/dev/zero", "/dev/null", "/dev/stdin", "/proc/self/mem", "/dev"])
        case 3:
            path.symlink_to(path)
        case 4:
            name = "x" * random.choice([300, 5000]) + suffix
        case 5:
            name = random.choice(["", ".", "..", "/", "~", CONTROL, "\udcff", "a/../b", "{0}%s"])
        case 6:
            path.symlink_to(random.choice(["/dev/zero", "/dev/stdin", "nowhere", folder.parent]))
        case 7:
            path.write_bytes(b"")
    command = random.choice(["sample", "base", "train", "plan", "decoder", "evaluate", "run.yaml"])
    match command:
        case "sample":
            return Attempt(["sample", name, "--out", "out.npy"])
        case "base":
            lora = folder / "lora.safetensors"
            save_file(
                {"lora_unet_x_attn2_to_k.lora_down.weight": torch.ones(2, 768)},
                lora,
                STUDENT.to_metadata("x", (3, 64, 64)),
            )
            return Attempt(["sample", str(lora), "--base", name, "--prompt", "a", "--out", "o.npy"])
        case "evaluate":
            return Attempt(["evaluate", name])
        case "run.yaml":
            return Attempt([random.choice(["train", "plan", "pairs"]), name])
        case "decoder":
            _settings(folder, _sd_run(pipeline) | {"decoder": _plain(name)})
            return Attempt(["train", "run.yaml"], ("run/", "run"))
    _settings(folder, RUN | {"teacher": _plain(name)})
    return Attempt([command, "run.yaml"], ("run/", "run"))


# ---- files of weights


def _given(random: Random, folder: Path, name: str, extra: list[str]) -> Attempt:
    """A command that reads this file."""
    if not extra and random.random() < 0.3:
        _settings(folder, RUN | {"teacher": name, "steps": 1})
        return Attempt([random.choice(["train", "plan"]), "run.yaml"], ("run/", "run"))
    return Attempt(["sample", name, *extra, "--count", "1", "--out", "out.npy"], ("out.npy",))


def _bytes(whole: bytes, random: Random, folder: Path) -> Attempt:
    """The embedded teacher with damaged bytes."""
    data = bytearray(whole)
    length = struct.unpack("<Q", whole[:8])[0]
    match random.randrange(8):
        case 0:
            del data[random.randrange(len(data)) :]
        case 1:
            data += random.randbytes(random.randrange(1, 100))
        case 2:
            for _ in range(random.randrange(1, 20)):
                data[8 + random.randrange(length)] ^= 1 << random.randrange(8)
        case 3:
            lie = random.choice(
                [0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, 100_000_000]
            )
            data[:8] = struct.pack("<Q", lie)
        case 4:
            data = bytearray(random.randbytes(random.choice([1, 7, 8, 100, 10_000])))
        case 5:
            data = bytearray(b"<!DOCTYPE html><html>\x1b[31mnot found</html>\n" * 50)
        case 6:
            data[8 : 8 + length] = b" " * length
        case 7:
            at = random.randrange(len(data))
            data[at : at + 64] = b"\0" * 64
    name = random.choice(["model.safetensors"] * 3 + ["model.bin", "model.pt", "model.ckpt", "x"])
    (folder / name).write_bytes(data)
    return _given(random, folder, name, [])


def _header(tensors: Weights, about: dict[str, str], random: Random, folder: Path) -> Attempt:
    """A header that lies, of a body that is whole."""
    whole = save(tensors, about)
    length = struct.unpack("<Q", whole[:8])[0]
    header, body = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    key = random.choice([key for key in header if key != "__metadata__"])
    text = None
    match random.randrange(12):
        case 0:
            header[key]["shape"] = random.choice([[], [0], [2**62, 4], [-1], [1] * 100_000, "x"])
        case 1:
            kinds = ["I8", "F64", "BOOL", "F8_E4M3", "F4", "C64", "XX", CONTROL, None, "U16"]
            header[key]["dtype"] = random.choice(kinds)
        case 2:
            header[key]["data_offsets"] = random.choice(
                [[0, 0], [0, 2**63], [5, 1], [-1, 1], [0, len(body)], [], None, [0.5, 1]]
            )
        case 3:
            header[random.choice([CONTROL, "\ud800", "x" * 5_000_000, ""])] = header.pop(key)
        case 4:
            header[key] = _strange(random)
        case 5:
            header["__metadata__"] = random.choice(
                [None, [], "x", {"a": 1}, {"a": {}}, {CONTROL: "a"}]
            )
        case 6:
            text = random.choice(["[" * 100_000, '{"a":' * 100_000, "null", "[]", "{}", '"x"', "{"])
        case 7:
            text = json.dumps(header)[:-1] + "," + json.dumps({key: header[key]})[1:]
        case 8:
            entry = {"dtype": "F32", "shape": [0], "data_offsets": [len(body)] * 2}
            header |= {f"x{i}": entry for i in range(300_000)}
        case 9:
            header["__metadata__"]["note"] = "x" * 6_000_000
        case 10:
            header["__metadata__"] |= {f"{i}": "x" for i in range(300_000)}
        case 11:
            header[key]["extra"] = _strange(random)
    if text is None:
        text = json.dumps(header)
    data = text.encode("utf-8", "surrogatepass")
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(data)) + data + body)
    return _given(random, folder, "model.safetensors", [])


DTYPES = (
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.int64,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.float8_e4m3fn,
)
NAMES = (
    CONTROL,
    "",
    ".",
    "a" * 100_000,
    "down_blocks.99999999999999999999.resnets.0.conv1.weight",
    "down_blocks.x.resnets.0.conv1.weight",
    "model.diffusion_model.input_blocks.99999999.0.weight",
    "model.diffusion_model.output_blocks.x",
    "model.enc.x",
    "model.enc.99999999999x99999999999_block0.conv0.weight",
    "model.enc.xx",
    "lora_unet_.lora_down.weight",
    "lora_unet_x.lora_up.weight",
    "cond_stage_model.transformer.text_model.encoder.layers.x",
    "first_stage_model.decoder.up.9.x",
    "conditioner.embedders.0.x",
    "ztsnr",
    "v_pred",
    "edm_mean",
)


def _damage(random: Random, tensors: Weights) -> Weights:
    """Tensors of other shapes, kinds and names."""
    tensors = dict(tensors)
    for _ in range(random.choice([1, 1, 1, 2, 5])):
        key = random.choice(list(tensors) or ["x"])
        value = tensors.get(key, torch.zeros(2, 2))
        if random.random() < 0.4:  # the keys by which a layout is known, and sizes are read off
            telling = [k for k in tensors if k.endswith(("to_k.weight", "lora_down.weight"))]
            telling += [k for k in tensors if any(p in k for p in ("conv_in", "map_", "_conv"))]
            key = random.choice(telling or [key])
            value = tensors[key]
        match random.randrange(13):
            case 0:
                tensors[key] = torch.tensor(1.0)
            case 1:
                tensors[key] = value.flatten()
            case 2:
                tensors[key] = value[None]
            case 3:
                tensors[key] = value.T.contiguous() if value.ndim == 2 else value.flatten()[:1]
            case 4:
                tensors[key] = torch.zeros(random.choice([(0,), (0, 7), (5, 0), (0, 2**40)]))
            case 5:
                tensors[key] = value.to(random.choice(DTYPES))
            case 6:
                del tensors[key]
            case 7:
                tensors[random.choice(NAMES)] = tensors.pop(key)
            case 8:
                tensors[random.choice(NAMES)] = random.choice([torch.tensor(1.0), torch.ones(2, 2)])
            case 9:
                kind = random.choice(DTYPES)
                tensors = {k: v.to(kind) for k, v in tensors.items()}
            case 10:
                kind = random.choice([torch.tensor(1.0), torch.ones(3), torch.ones(2, 2)])
                tensors = {k: kind.clone() for k in tensors}
            case 11:
                tensors[key] = torch.full_like(value, float("nan"), dtype=torch.float32)
            case 12:
                tensors[key] = torch.cat([value, value]) if value.ndim else torch.zeros(0)
        if not tensors:
            break
    return tensors


def _damaged_metadata(random: Random, about: dict[str, str]) -> dict[str, str]:
    """What a file says, damaged in one of its values."""
    about = dict(about)
    keys = ["dmd.recipe", "dmd.network", "modelspec.license", "modelspec.resolution"]
    key = random.choice([*(set(keys) & about.keys()), *keys, "modelspec.prediction_type"])
    try:
        inner = json.loads(about.get(key, ""))
    except ValueError:
        inner = None
    if not isinstance(inner, dict) or random.random() < 0.2:
        about[key] = random.choice(
            [
                *("", "null", "[]", "{}", "5", "{", "[" * 100_000, '{"a":' * 100_000, CONTROL),
                *("x" * 5_000_000, "-5x-5", "99999999999x99999999999", "1x1", "9" * 5000, "nan"),
                *(json.dumps({"family": "edm-unet"}), json.dumps({"family": CONTROL})),
            ]
        )
        return about
    target = inner
    config = inner.get("config")
    if isinstance(config, dict) and config and random.random() < 0.6:
        target = config
    strange = _strange(random)
    where = random.choice([*target, "unknown", "__class__", "sample_size"])
    target[where] = strange
    if where == "timesteps" and random.random() < 0.5:
        target[where] = list(range(2_000_000, 0, -1))
    about[key] = json.dumps(inner)
    return about


def _weights(
    tensors: Weights, about: dict[str, str], extra: list[str], random: Random, folder: Path
) -> Attempt:
    name = "model.safetensors"
    if about and random.random() < 0.25:
        about = _damaged_metadata(random, about)
    else:
        tensors = _damage(random, tensors)
    if about == {} and random.random() < 0.3:
        name = "pytorch_model.bin"
        torch.save(tensors, folder / name)
    else:
        _save(folder / name, tensors, about)
    return _given(random, folder, name, extra)


def _save(path: Path, tensors: Weights, about: dict[str, str]) -> None:
    """Whatever its names are: safetensors' own writer refuses lone surrogates."""
    clean = {key.encode("utf-8", "replace").decode(): value for key, value in about.items()}
    clean = {key: value.encode("utf-8", "replace").decode() for key, value in clean.items()}
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, clean)


def _metadata(tensors: Weights, about: dict[str, str], random: Random, folder: Path) -> Attempt:
    recipe = Recipe(family="edm-unet", prediction="edm", timesteps=(999,), noise_scale=80.0)
    if random.random() < 0.5:
        about = about | recipe.to_metadata("x", (1, 8, 8))
    _save(folder / "model.safetensors", tensors, _damaged_metadata(random, about))
    return _given(random, folder, "model.safetensors", [])


class Bomb:
    """A pickle that leaves a proof when its code is run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {PROOF}",))


class Touch:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(PROOF),))


def _pickle(tensors: Weights, random: Random, folder: Path) -> Attempt:
    """Pickles of every kind."""
    name = random.choice(["model.bin", "model.pt", "model.pth", "model.ckpt", "m.safetensors"])
    path = folder / name
    old = {"_use_new_zipfile_serialization": random.random() < 0.5}
    endless: list[Any] = []
    for _ in range(40):
        endless = [endless, endless]
    huge = torch.zeros(1).expand(10**11)
    inner: Any = random.choice(
        [
            Bomb(),
            {"a": Bomb()},
            {"state_dict": tensors, "x": Touch()},
            {"state_dict": _damage(random, tensors)},
            {"state_dict": tensors},
            {"state_dict": {"state_dict": tensors}},
            {"param_groups": [], "state": {}},
            {CONTROL: 1},
            {1: torch.zeros(2)},
            {"a": {"b": torch.zeros(2)}},
            {b"a": torch.zeros(2)},
            {"x" * 1_000_000: 5},
            {},
            [],
            None,
            5,
            torch.zeros(2),
            endless,
            {"a": endless},
            {"model.map_label.weight": huge, "model.map_layer0.weight": huge},
            {key: torch.zeros(1).expand(10**10, 7) for key in tensors},
            {key: torch.empty(10**9, 10**3, device="meta") for key in tensors},
            {key: torch.sparse_coo_tensor(size=(10**6, 10**6)) for key in tensors},
            {"a": torch.zeros(2, requires_grad=True), "b": torch.nn.Parameter(torch.ones(2))},
            {key: value.to(random.choice(DTYPES)) for key, value in tensors.items()},
            torch.nn.Linear(2, 2),
        ]
    )
    way = random.randrange(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if way == 0:
            try:
                path.write_bytes(pickle.dumps(inner, protocol=random.randrange(2, 6)))
            except Exception:
                path.write_bytes(pickle.dumps(Bomb()))
        elif way == 1:
            _raw_pickle(random, path)
        else:
            torch.save(inner, path, **old)
            if way == 2:
                data = bytearray(path.read_bytes())
                for _ in range(random.randrange(1, 10)):
                    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
                path.write_bytes(data if random.random() < 0.7 else data[: len(data) // 2])
    return _given(random, folder, name, [])


def _raw_pickle(random: Random, path: Path) -> None:
    """Written by hand: no pickler makes these."""
    code = random.choice(
        [
            b"\x80\x02cos\nsystem\nX\x0e\x00\x00\x00touch executed\x85R.",
            b"\x80\x02c__builtin__\neval\nX\x02\x00\x00\x00()\x85R.",
            b"\x80\x02cbuiltins\nbytearray\nI100000000000\n\x85R.",
            b"\x80\x04\x95" + b"\xff" * 8,
            b"\x80\x02" + b"(" * 1_000_000,
            b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
            b"\x80\x02X\xff\xff\xff\x7f",
            b"\x80\x02I" + b"9" * 100_000 + b"\n.",
            b"\x80\x63.",
            b"\x80\x02.",
            b"\x80",
            b"PK",
            b"PK\x03\x04" + b"\0" * 100,
        ]
    )
    if random.random() < 0.5:
        with zipfile.ZipFile(path, "w", random.choice([0, 8])) as file:
            file.writestr("archive/version", "3\n")
            if random.random() < 0.3:
                code = b"\x80\x02X" + struct.pack("<I", 2**31 - 8) + b" " * 300_000_000
            file.writestr("archive/data.pkl", code)
            file.writestr("archive/../../../there/thesis.txt", "x")
    else:
        path.write_bytes(code)


def _folder(pipeline: Path, random: Random, folder: Path) -> Attempt:
    """A pipeline with one damaged file."""
    model = folder / "model"
    shutil.copytree(pipeline, model, copy_function=os.link)
    files = sorted(path for path in model.rglob("*") if path.is_file())
    configs = [path for path in files if path.suffix in (".json", ".txt")]
    path = random.choice(configs if random.random() < 0.8 else files)
    whole = path.read_bytes()
    path.unlink()
    match random.randrange(10):
        case 0:
            pass
        case 1:
            path.mkdir()
        case 2:
            os.mkfifo(path)
        case 3:
            path.symlink_to(random.choice(["/dev/zero", path, "nowhere", "/dev/stdin"]))
        case 4:
            path.write_bytes(random.choice(HOLLOW))
        case 5:
            path.write_bytes(whole[: random.randrange(len(whole))])
        case _ if path.suffix == ".json":
            path.write_text(_json(random, json.loads(whole)), errors="surrogatepass")
        case _ if path.suffix == ".safetensors":
            _save(path, _damage(random, _read(whole, folder)), {})
        case _:
            data = bytearray(whole)
            for _ in range(random.randrange(1, 20)):
                data[random.randrange(len(data))] = random.randrange(256)
            path.write_bytes(data)
    if random.random() < 0.3:
        _settings(folder, _sd_run(pipeline) | {"teacher": "model"})
        return Attempt(["train", "run.yaml"], ("run/", "run"))
    return Attempt(
        ["sample", "model", "--prompt", "a 3", "--count", "1", "--out", "out.npy"], ("out.npy",)
    )


HOLLOW = (
    b"",
    b"null",
    b"[]",
    b"{}",
    b"5",
    b'"x"',
    b"\xff\xfe\x00",
    b"\x00" * 100,
    b"{" * 100_000,
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"NaN",
    b'{"a": ' + b"9" * 5000 + b"}",
    b'{"_class_name": "\x1b[31m"}',
    b'{"x": "' + b"x" * 5_000_000 + b'"}',
    b"[" + b"0," * 3_000_000 + b"0]",
)


def _json(random: Random, values: Any) -> str:
    """A config with a strange value somewhere."""
    target = values
    while isinstance(target, dict) and target:
        key = random.choice(list(target))
        if not isinstance(target[key], dict) or not target[key] or random.random() < 0.3:
            if random.random() < 0.15:
                del target[key]
            else:
                target[key] = _strange(random)
            break
        target = target[key]
    else:
        values = {random.choice(["_class_name", "auto_map", "x"]): _strange(random)}
    if isinstance(values, dict) and random.random() < 0.1:
        values["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    return json.dumps(values)


def _read(whole: bytes, folder: Path) -> Weights:
    path = folder / ".whole.safetensors"
    path.write_bytes(whole)
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key).clone() for key in list(file.keys())}
    path.unlink()
    return tensors


def _decoder(pipeline: Path, random: Random, folder: Path) -> Attempt:
    from diffusers import AutoencoderTiny

    with torch.random.fork_rng():
        tensors = AutoencoderTiny().decoder.layers.state_dict()
    prefix = random.choice(["decoder.layers.", ""])
    tensors = {prefix + key: value for key, value in tensors.items()}
    tensors = _damage(random, tensors)
    if random.random() < 0.2:
        tensors[random.choice(["9" * 5000 + ".weight", "٣.weight", "-1.weight", "1."])] = (
            torch.ones(2)
        )
    name = random.choice(["taesd.safetensors", "taesd.pth"])
    if name.endswith("pth"):
        torch.save(tensors, folder / name)
    else:
        _save(folder / name, tensors, {})
    _settings(folder, _sd_run(pipeline) | {"decoder": name})
    return Attempt(["train", "run.yaml"], ("run/", "run"))


# ---- runs


def _run(run: Path, random: Random, folder: Path) -> Attempt:
    """A finished run with one damaged file: what goes on is the same run."""
    shutil.copytree(run, folder, dirs_exist_ok=True)
    want = (run / "run/student.safetensors").read_bytes()
    files = sorted(path for path in (folder / "run").rglob("*") if path.is_file())
    if random.random() < 0.5:  # not finished yet: the last checkpoint and the student are missing
        (folder / "run/checkpoints/step-00000004.safetensors").unlink()
        (folder / "run/student.safetensors").unlink()
        files = [path for path in files if path.exists()]
    path = random.choice(files)
    whole = path.read_bytes()
    path.unlink()
    match random.randrange(10):
        case 0:
            pass
        case 1:
            path.mkdir()
        case 2:
            os.mkfifo(path)
        case 3:
            path.symlink_to(random.choice(["/dev/zero", path, "nowhere"]))
        case 4:
            path.write_bytes(random.choice(HOLLOW))
        case 5:
            path.write_bytes(whole[: random.randrange(len(whole) or 1)])
        case 6:
            path.write_bytes(whole + random.randbytes(50))
        case _ if path.suffix == ".safetensors":
            path.write_bytes(whole)
            tensors, about = read_safetensors(path)
            tensors = {key: value.clone() for key, value in tensors.items()}
            key = random.choice(list(tensors))
            match random.randrange(4):
                case 0:
                    tensors = _damage(random, tensors)
                case 1:
                    about = {k: v for k, v in about.items() if not k.startswith("dmd.")}
                case 2:
                    about = {k: random.choice(["", "x", CONTROL, "9" * 5000]) for k in about}
                case 3:
                    flat = tensors[key].view(-1).view(torch.uint8)
                    flat[random.randrange(len(flat))] ^= 64
            path.unlink()
            _save(path, tensors, about)
        case _ if path.suffix in (".jsonl", ".yaml"):
            row = random.choice(["null", "5", "[]", '{"step": "x"}', "{}", "\x1b[31m", "[" * 9999])
            path.write_bytes(whole + row.encode() + b"\n")
        case _:
            data = bytearray(whole or b" ")
            data[random.randrange(len(data))] ^= 1
            path.write_bytes(data)
    match random.randrange(4):
        case 0:
            return Attempt(["export", "run", "--as", "lora"], ("run/",))
        case 1:
            student = "run/student.safetensors"
            return Attempt(["sample", student, "--count", "1", "--out", "out.npy"], ("out.npy",))

    def is_the_same_student(folder: Path) -> str | None:
        student = folder / "run/student.safetensors"
        same = student.is_file() and student.read_bytes() == want
        return None if same else "another student"

    return Attempt(["train", "run.yaml"], ("run/", "run"), is_the_same_student)
