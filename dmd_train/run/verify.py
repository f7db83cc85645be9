"""What of a run's folder is whole: every file is read, none is written."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ..config import load_config
from ..data.prompts import read_prompts
from ..errors import UserError
from ..files.mark import MARK_KEY
from ..files.read import peek, read_safetensors
from ..files.write import is_temporary
from .folder import (
    STEP_KEY,
    TORCH_KEY,
    VERSION_KEY,
    checkpoint_files,
    metrics_lines,
    read_checkpoint,
    read_row,
)


class Verdict(NamedTuple):
    """said: what the file is, or why it is not whole."""

    file: Path
    is_whole: bool
    said: str


def verify(run: Path) -> Iterator[Verdict]:
    """A verdict for each file of a run that is known by its suffix. Raises UserError for no run."""
    if not (run / "run.yaml").exists():
        raise UserError(f"{run}: holds no run.yaml. Give the folder of a run.")
    for file in sorted(path for path in run.rglob("*") if path.is_file()):
        try:
            said = _said_of(file, run)
        except UserError as error:
            yield Verdict(file, False, str(error).removeprefix(f"{file}: "))
        else:
            if said:
                yield Verdict(file, True, said)


def _said_of(file: Path, run: Path) -> str:
    """What a file is, empty for one that is not looked into. Raises UserError unless whole."""
    if is_temporary(file):
        return "being written, or left by a kill: the next start drops it"
    match file.suffix:
        case ".safetensors":
            return _tensors(file, run)
        case ".jsonl":
            return _rows(file)
        case ".png":
            return _picture(file)
        case ".yaml" if file == run / "run.yaml":
            load_config(file, [])
            return "whole"
        case ".txt":
            read_prompts(file)
            return "whole"
        case ".json":
            return _json(file)
        case ".html":
            return _page(file)
        case _:
            return ""


def _tensors(file: Path, run: Path) -> str:
    if file in checkpoint_files(run / "checkpoints"):
        read_checkpoint(file)
    else:
        read_safetensors(file)
    _, metadata = peek(file)
    whole = "whole" if MARK_KEY in metadata else "as long as it should be; too old to have a hash"
    names = {STEP_KEY: "step", VERSION_KEY: "by dmd-one-step", TORCH_KEY: "torch"}
    return ", ".join(
        [whole, *(f"{name} {metadata[k]}" for k, name in names.items() if k in metadata)]
    )


def _rows(file: Path) -> str:
    lines = metrics_lines(file)
    damaged = [number for number, line in enumerate(lines, 1) if not read_row(line)]
    if damaged:
        raise UserError(
            f"{file}: {len(damaged)} of {len(lines)} lines are no rows, the first line {damaged[0]}"
        )
    return f"whole, {len(lines)} rows"


def _picture(file: Path) -> str:
    try:
        with Image.open(file) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{file}: no whole picture ({error})") from None
    return "whole"


def _json(file: Path) -> str:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: no whole JSON ({error})") from None
    return "whole"


def _page(file: Path) -> str:
    if not file.read_bytes().endswith(b"</html>\n"):
        raise UserError(f"{file}: has no end. It is written again when the run goes on")
    return "whole"
