"""The run folder: run.yaml, metrics.jsonl, samples/, checkpoints/. Atomic, verified, resumable."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from torch import Tensor
from typing_extensions import Self

from ..config import Config, dump_config, load_config
from ..errors import UserError
from ..files.read import read_safetensors
from ..files.write import write_safetensors, write_text

KEEP = 2
"""Checkpoints kept: the newest, and the one before it should the newest be damaged."""

STEP_KEY = "dmd.step"

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


class Checkpoint(NamedTuple):
    """Every tensor of the training state after `step` student updates."""

    step: int
    tensors: dict[str, Tensor]


def _files(folder: Path) -> list[Path]:
    """Checkpoints, newest first."""
    return sorted(folder.glob("step-*.safetensors"), reverse=True)


def newest_checkpoint(folder: Path, notes: list[str] | None = None) -> Checkpoint | None:
    """The newest whole one of a run; what had to be passed over is added to `notes`."""
    for file in _files(folder):
        try:
            tensors, metadata = read_safetensors(file)
        except UserError as error:
            if notes is not None:
                notes.append(f"{error} Passing over it.")
            continue
        return Checkpoint(int(metadata[STEP_KEY]), tensors)
    return None


class RunFolder:
    """One run on disk, locked while open by the first of its processes. A context manager."""

    def __init__(self, config: Config, is_main: bool = True) -> None:
        self.is_main = is_main
        self.path = config.output
        self.config = config
        self.notes: list[str] = []
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
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def require_there(self) -> None:
        """Raises UserError where the folder was taken away: a write would make half of it anew."""
        if not (self.path / "run.yaml").exists():
            raise UserError(
                f"{self.path}: was deleted or moved while the run wrote to it. Put it back, or "
                "start again."
            )

    def __enter__(self) -> Self:
        """Create the folder or take it up again. Raises UserError if it is not this run's."""
        if not self.is_main:
            return self
        run_yaml = self.path / "run.yaml"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            foreign = {entry.name for entry in self.path.iterdir()} - {".lock"}
            if foreign and not run_yaml.exists():
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
            if run_yaml.exists():
                self._check_same(run_yaml)
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

    def _check_same(self, run_yaml: Path) -> None:
        begun = load_config(run_yaml, []).model_dump(mode="json")
        now = self.config.model_dump(mode="json")
        for key in sorted(now.keys() - FREE_TO_CHANGE):
            if begun[key] != now[key]:
                raise UserError(
                    f"{self.path}: was begun with {key}: {begun[key]}, now it is {now[key]}. "
                    "Set it back, or choose another folder for the run."
                )

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint; what had to be passed over is said in `notes`."""
        found = newest_checkpoint(self.checkpoints, self.notes)
        if found:
            self.notes.append(f"going on from step {found.step} ({self.checkpoints})")
        return found

    @property
    def finished(self) -> bool:
        """Whether the last step's checkpoint and the student are there."""
        last = self._checkpoint_file(self.config.steps)
        return last.exists() and self.student.exists()

    def _checkpoint_file(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}.safetensors"

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, then drop all but the newest KEEP."""
        file = self._checkpoint_file(checkpoint.step)
        write_safetensors(file, checkpoint.tensors, {STEP_KEY: str(checkpoint.step)})
        for old in _files(self.checkpoints)[KEEP:]:
            old.unlink(missing_ok=True)

    def forget_after(self, step: int) -> None:
        """Drop what a killed run logged past the checkpoint that is being taken up."""
        if self.metrics.exists():
            rows = [row for row in self.read_metrics() if row["step"] <= step]
            write_text(self.metrics, "".join(json.dumps(row) + "\n" for row in rows))

    def log(self, rows: list[dict[str, Any]]) -> None:
        """Append to metrics.jsonl, one JSON object a line. Raises UserError if the disk refuses."""
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        except OSError as error:
            raise UserError(
                f"{self.metrics}: not written ({error.strerror}). Make room; the same command goes "
                "on from the last checkpoint."
            ) from None

    def read_metrics(self) -> list[dict[str, Any]]:
        """All whole lines of metrics.jsonl; a line cut by a kill is left out."""
        rows = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows
