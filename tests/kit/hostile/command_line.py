"""Options and names of files on the command line, prompts, and what is no file at all."""

import os
import shutil
from pathlib import Path
from random import Random

import torch
from kit.command_attempt import Attempt
from kit.hostile.settings import RUN, sd_run, write_settings
from kit.hostile.values import CONTROL, plain
from safetensors.torch import save_file

from dmd_train.method.recipe import Recipe
from dmd_train.networks.load import DIGITS_TEACHER

STUDENT = Recipe(family="sd1", prediction="eps", timesteps=(499,), noise_scale=1.0)


def options(run: Path, random: Random, folder: Path) -> Attempt:
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


def prompts(pipeline: Path, random: Random, folder: Path) -> Attempt:
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
    write_settings(folder, sd_run(pipeline) | {"prompts": name})
    return Attempt(["train", "run.yaml"], ("run/", "run"))


def special(pipeline: Path, random: Random, folder: Path) -> Attempt:
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
            write_settings(folder, sd_run(pipeline) | {"decoder": plain(name)})
            return Attempt(["train", "run.yaml"], ("run/", "run"))
    write_settings(folder, RUN | {"teacher": plain(name)})
    return Attempt([command, "run.yaml"], ("run/", "run"))
