"""The run folder: run.yaml, metrics.jsonl, samples/, checkpoints/. Atomic, verified, resumable."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from typing_extensions import Self

from .. import __version__
from ..config import Config, as_named_now, dump_config, load_config, make_config
from ..errors import UserError
from ..files.mark import MARK_KEY
from ..files.read import peek, read_safetensors
from ..files.write import (
    flush_file,
    gone,
    is_temporary,
    make_folder,
    sweep,
    write_safetensors,
    write_text,
)

KEEP = 2
"""Checkpoints kept: the newest, and the one before it should the newest be damaged."""

SOON_READ = 1 << 30
"""Bytes of a file that are read and hashed in passing: some two seconds."""

STEP_KEY, CHECKPOINT_KEY = "dmd.step", "dmd.checkpoint"
"""What a checkpoint and a student say: after which student update; the student's checkpoint."""

SCHEMA_KEY, VERSION_KEY, TORCH_KEY = "dmd.schema", "dmd.version", "dmd.torch"
TEACHER_KEY, SETTINGS_KEY = "dmd.teacher_sha256", "dmd.settings"
SCHEMA = "1"
"""Of a checkpoint's tensors and names. One without, written before, is of the first."""

CHECKPOINT = re.compile(r"step-(\d{8,})\.safetensors", re.ASCII)

NOT_OURS = {".lock", ".lock-export", ".DS_Store", "Thumbs.db", "desktop.ini"}
"""What may lie in a folder that nothing was begun in: ours, and what desktops leave anywhere."""

FREE_TO_CHANGE = {
    "output",
    "device",
    "cpu_threads",
    "micro_batch_size",
    "gradient_checkpointing",
    "checkpoint_every",
    "sample_every",
    "trackers",
}
"""Settings that may differ when a run goes on: they do not change what is learned."""


def _learned_by(config: Config) -> dict[str, Any]:
    """The settings that a run keeps to."""
    return config.model_dump(mode="json", exclude=FREE_TO_CHANGE)


class NewerVersion(UserError):
    """A checkpoint that a later version of this package wrote."""


class Checkpoint(NamedTuple):
    """Every tensor of the training state after `step` student updates.

    teacher: SHA-256 of its file; empty where it is none, or the checkpoint does not say.
    """

    step: int
    tensors: dict[str, Tensor]
    teacher: str = ""


def require_teacher(said: str, sha256: str, name: str) -> None:
    """Refusal, a UserError, of another teacher under the name that run.yaml has.

    said: the SHA-256 that a checkpoint or a student names; empty where it names none.
    """
    if said and said != sha256:
        raise UserError(
            f"teacher: {name} is another file than this run was begun with, or was changed since. "
            "Put the old one back, or choose another folder for a new run."
        )


def checkpoint_files(folder: Path) -> list[Path]:
    """Checkpoints, newest first."""
    return sorted(filter(_step_of, folder.glob("step-*")), key=_step_of, reverse=True)


def _step_of(file: Path) -> int:
    """The step in a checkpoint's name; 0 where it is none."""
    match = CHECKPOINT.fullmatch(file.name)
    return int(match[1]) if match else 0


def _checkpoint_file(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.safetensors"


def read_checkpoint(file: Path) -> Checkpoint:
    """A checkpoint. Raises UserError unless it is whole and says the step that its name has."""
    tensors, metadata = read_safetensors(file)
    if metadata.get(SCHEMA_KEY, SCHEMA) != SCHEMA:
        raise NewerVersion(
            f"{file}: written by dmd-one-step {metadata.get(VERSION_KEY)}, in a form that this "
            f"version, {__version__}, does not read. Update dmd-one-step."
        )
    step = _step_of(file)
    if metadata.get(STEP_KEY) != str(step):
        raise UserError(f"{file}: does not say that it is of step {step}. Copy it again.")
    return Checkpoint(step, tensors, metadata.get(TEACHER_KEY, ""))


def newest_checkpoint(folder: Path, notes: list[str] | None = None) -> Checkpoint | None:
    """The newest whole one of a run; what had to be passed over is added to `notes`.

    Raises UserError for one of a newer version: to pass over it would be to train its steps again.
    """
    for file in checkpoint_files(folder):
        try:
            return read_checkpoint(file)
        except NewerVersion:
            raise
        except UserError as error:
            if notes is not None:
                notes.append(f"{error} Passing over it.")
    return None


def student_marks(folder: Path, step: int) -> dict[str, str]:
    """What a student says of itself: its step, and the mark of the checkpoint in `folder`.

    Raises UserError where that checkpoint is missing or not as long as it should be.
    """
    _, metadata = peek(_checkpoint_file(folder, step))
    return {STEP_KEY: str(step), CHECKPOINT_KEY: metadata.get(MARK_KEY, "")}


def is_run(run_yaml: Path) -> bool:
    """Whether this is the run.yaml in the folder of a run that was begun."""
    folder = run_yaml.parent
    begun = (folder / ".lock").exists() or checkpoint_files(folder / "checkpoints")
    return run_yaml.name == "run.yaml" and bool(begun)


def exporting(run: Path) -> FileLock:
    """Held while a file is exported into a run's folder: nothing there is swept meanwhile."""
    return FileLock(run / ".lock-export")


class RunFolder:
    """One run on disk, locked while open by the first of its processes. A context manager."""

    def __init__(self, config: Config, is_main: bool = True) -> None:
        self.is_main = is_main
        self.path = config.output
        self.config = config
        self.notes: list[str] = []
        self._passed_over: set[Path] = set()
        self._lock = FileLock(self.path / ".lock")

    @property
    def too_large(self) -> str:
        """What to say where memory ends before the first step."""
        return f"{self.path}: out of memory before the first step. {self.config.smaller}"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def student(self) -> Path:
        return self.path / "student.safetensors"

    @property
    def pairs(self) -> Path:
        return self.path / "pairs"

    @property
    def text(self) -> Path:
        """The prompts, encoded."""
        return self.path / "text"

    @property
    def images(self) -> Path:
        """The real images, encoded."""
        return self.path / "images"

    @property
    def captions(self) -> Path:
        """What is said of them, encoded."""
        return self.path / "captions"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def require_there(self) -> None:
        """Raises UserError where the folder was taken away."""
        if not (self.path / "run.yaml").exists():
            raise gone(self.path)

    def __enter__(self) -> Self:
        """Create the folder or take it up again. Raises UserError if it is not this run's."""
        if not self.is_main:
            return self
        run_yaml = self.path / "run.yaml"
        try:
            make_folder(self.path)
            inside = {entry.name for entry in self.path.iterdir() if not is_temporary(entry)}
            if inside - NOT_OURS and not run_yaml.exists():
                raise UserError(
                    f"{self.path}: holds other files, no run.yaml. Choose a new folder as output."
                )
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{self.path}: another run is using this folder. Wait for it, or choose another."
            ) from None
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be used as output ({error.strerror}). Choose another folder."
            ) from None
        try:
            self._sweep()
            if run_yaml.exists():
                self._go_on_as_begun(run_yaml)
            write_text(run_yaml, dump_config(self.config))
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.release()

    def _sweep(self) -> None:
        """Drop the temporary files of a killed run: as large as what they were to become."""
        made = (self.pairs, self.text, self.images, self.captions)
        for folder in (self.checkpoints, self.samples, *made):
            sweep(folder)
        with suppress(Timeout), exporting(self.path).acquire(timeout=0):
            sweep(self.path)

    def _go_on_as_begun(self, run_yaml: Path) -> None:
        """Settings that nobody said stay as they were begun, whatever the preset has by now.

        Raises UserError for one that is said and is not what run.yaml, or else the newest
        checkpoint, has.
        """
        now = _learned_by(self.config)
        begun = _learned_by(load_config(run_yaml, [])) | self._said_of_settings()
        kept = {key: begun[key] for key in sorted(now) if begun[key] != now[key]}
        for key in sorted(kept.keys() & self.config.model_fields_set):
            raise UserError(
                f"{self.path}: was begun with {key}: {begun[key]}, now it is {now[key]}. "
                "Set it back, or choose another folder for the run."
            )
        if kept:
            self.config = make_config(self.config.model_dump(mode="json") | kept, str(run_yaml))
            as_begun = ", ".join(f"{key}: {value}" for key, value in kept.items())
            self.notes.append(f"{self.config.preset} had other settings then, kept: {as_begun}")

    def _said_of_settings(self) -> dict[str, Any]:
        """What the newest checkpoint that says so was made with: its run.yaml may be edited."""
        for file in checkpoint_files(self.checkpoints):
            with suppress(UserError, ValueError, RecursionError):
                said = json.loads(peek(file)[1].get(SETTINGS_KEY, ""))
                if isinstance(said, dict):
                    return as_named_now(said)
        return {}

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint; what had to be passed over is said in `notes`."""
        found = newest_checkpoint(self.checkpoints, self.notes)
        past = found.step if found else 0
        self._passed_over = {f for f in checkpoint_files(self.checkpoints) if _step_of(f) > past}
        if found:
            self.notes.append(f"going on from step {found.step} ({self.checkpoints})")
        return found

    @property
    def finished(self) -> bool:
        """Whether the last step's checkpoint is there, and the whole student that it gives.

        A checkpoint of more than SOON_READ bytes is not read beyond its header, only as long as it
        should be. Where neither says more, as none did before, they are taken to belong together.
        """
        try:
            last = student_marks(self.checkpoints, self.config.steps)
            file = _checkpoint_file(self.checkpoints, self.config.steps)
            if file.stat().st_size <= SOON_READ:
                read_safetensors(file)
            _, said = read_safetensors(self.student)
        except UserError:
            return False
        has_no_marks = not last[CHECKPOINT_KEY] and STEP_KEY not in said
        return has_no_marks or last.items() <= said.items()

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, then drop all but the newest KEEP that are whole.

        What was logged up to it is on the disk before it.
        """
        if self.metrics.exists():
            with self._written_metrics():
                flush_file(self.metrics)
        said = {
            STEP_KEY: str(checkpoint.step),
            SCHEMA_KEY: SCHEMA,
            VERSION_KEY: __version__,
            TORCH_KEY: torch.__version__,
            TEACHER_KEY: checkpoint.teacher,
            SETTINGS_KEY: json.dumps(_learned_by(self.config)),
        }
        file = _checkpoint_file(self.checkpoints, checkpoint.step)
        write_safetensors(file, checkpoint.tensors, said)
        for damaged in self._passed_over - {file}:
            damaged.unlink(missing_ok=True)
        self._passed_over.clear()
        self._drop_old()

    def _drop_old(self) -> None:
        files = checkpoint_files(self.checkpoints)
        whole = [file for file in files if file not in self._passed_over]
        for old in whole[KEEP:]:
            old.unlink(missing_ok=True)

    def forget_after(self, step: int) -> None:
        """Drop what a killed run logged past the checkpoint that is being taken up, or kept."""
        self._drop_old()
        if self.metrics.exists():
            rows = [row for row in self.read_metrics() if row["step"] <= step]
            write_text(self.metrics, "".join(json.dumps(row) + "\n" for row in rows))

    def log(self, rows: list[dict[str, Any]]) -> None:
        """Append to metrics.jsonl, one JSON object a line. Raises UserError if the disk refuses."""
        with self._written_metrics(), self.metrics.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    @contextmanager
    def _written_metrics(self) -> Iterator[None]:
        """Inside, what the disk refuses becomes a UserError."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.metrics}: not written ({error.strerror}). Make room; the same command goes "
                "on from the last checkpoint."
            ) from None

    def read_metrics(self) -> list[dict[str, Any]]:
        """All whole rows of metrics.jsonl; a line cut by a kill or damaged is left out."""
        return [row for row in map(read_row, metrics_lines(self.metrics)) if row]


def metrics_lines(metrics: Path) -> list[str]:
    """Lines of metrics.jsonl; none where there is no such file. Bytes that are no text stay in."""
    if not metrics.exists():
        return []
    return metrics.read_text(encoding="utf-8", errors="replace").splitlines()


def read_row(line: str) -> dict[str, Any] | None:
    """Values by name, `step` among them; None for a line that is no such row."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_row = isinstance(row, dict) and type(row.get("step")) is int
    return row if is_row and all(type(v) in (int, float) for v in row.values()) else None
