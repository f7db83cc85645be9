"""A finished run with one damaged file."""

import os
import shutil
from pathlib import Path
from random import Random

import torch
from kit.command_attempt import Attempt, forked
from kit.hostile.settings import RUN, write_settings
from kit.hostile.values import CONTROL, HOLLOW
from kit.hostile.weights import damage, save_anyhow

from dmd_train.files.read import read_safetensors


def finished_run(folder: Path) -> Path:
    """A folder with a run.yaml and its run, which is finished."""
    folder.mkdir(parents=True)
    write_settings(folder, RUN)
    room = folder / "here"
    room.mkdir()
    shutil.move(folder / "run.yaml", room)
    code, *_ = forked(["train", "run.yaml"], room)
    assert code == 0, (folder / "stderr").read_text()
    return room


def damaged_run(run: Path, random: Random, folder: Path) -> Attempt:
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
                    tensors = damage(random, tensors)
                case 1:
                    about = {k: v for k, v in about.items() if not k.startswith("dmd.")}
                case 2:
                    about = {k: random.choice(["", "x", CONTROL, "9" * 5000]) for k in about}
                case 3:
                    flat = tensors[key].view(-1).view(torch.uint8)
                    flat[random.randrange(len(flat))] ^= 64
            path.unlink()
            save_anyhow(path, tensors, about)
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
