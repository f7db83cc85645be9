"""The loop: a generator of StepReport that every door only iterates."""

from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass

import torch
from PIL.Image import Image
from torch import Tensor

from .errors import UserError, out_of_memory
from .method.processes import whole
from .prepare import Ready
from .run.folder import Checkpoint, student_marks
from .run.journal import Journal
from .run.pixels import save_picture
from .run.report import write_report
from .run.student import write_student

SHOWN = {
    "student/distribution_matching": "dm",
    "student/regression": "reg",
    "critic/denoising": "critic",
}
"""The losses that a bar has room for, by what it calls them."""


@dataclass(frozen=True)
class StepReport:
    """What one student update did. step counts from 1."""

    step: int
    steps: int
    values: dict[str, Tensor]
    """Scalars still on the device: losses and gradient norms by name."""
    picture: Image | None
    """Teacher above student on fixed seeds: first, last and every sample_every steps."""

    def numbers(self) -> dict[str, float]:
        """The values on the host; waits for the device."""
        numbers = torch.stack(list(self.values.values())).tolist()
        return dict(zip(self.values, numbers, strict=True))

    def losses(self) -> str:
        """The losses in few words, for a bar; waits for the device."""
        numbers = self.numbers()
        return "  ".join(f"{SHOWN[name]} {numbers[name]:.3f}" for name in SHOWN if name in numbers)


def distil(ready: Ready) -> Generator[StepReport]:
    """Student updates of a run, from where it stands to its last, each reported.

    Closing the generator between two reports is the way to stop: the state and the student so far
    are saved. Raises UserError on a non-finite loss and out of memory; what was saved before stays.
    Of several processes the first writes, and all must stop at the same step.
    """
    run, config, state, sheet = ready.run, ready.run.config, ready.state, ready.sheet
    student, processes = state.roles.student.network, state.processes
    journal = Journal(run, processes)
    step = saved = ready.step
    processes.wait()
    if processes.is_main:
        run.forget_after(step)

    def save() -> None:
        nonlocal saved
        journal.flush()
        if step > saved and (processes.is_main or processes.is_sharded):
            tensors = state.tensors()
            if processes.is_main:
                run.save(Checkpoint(step, tensors, state.recipe.teacher_sha256))
        saved = step

    def finish() -> None:
        save()
        if processes.is_main:
            write_report(run)  # before the student, by which a run is finished
        with state.ema.swapped_in():
            tensors = {key: whole(value) for key, value in student.file_tensors().items()}
            if processes.is_main:
                said = student_marks(run.checkpoints, step)
                write_student(run.student, student, state.recipe, tensors, said)
        journal.trackers.close()
        processes.wait()

    with out_of_memory(f"{run.path}: out of memory. Its checkpoints are kept. {config.smaller}"):
        try:
            while step < config.steps:
                values = state.iteration(step, ready.pairs)
                step += 1
                journal.add(step, values)
                picture = None
                if sheet and (step % config.sample_every == 0 or step in (1, config.steps)):
                    with state.ema.swapped_in():
                        picture = sheet.draw(student, state.distribution_matching)
                    if processes.is_main:
                        save_picture(run.samples / f"step-{step:08d}.png", picture)
                        journal.trackers.picture(step, picture)
                # the picture before it: a run goes on behind its checkpoint
                if step % config.checkpoint_every == 0:
                    save()
                yield StepReport(step, config.steps, values, picture)
        except GeneratorExit:
            finish()
            raise
        except UserError:
            if processes.is_main:
                with suppress(UserError):  # what went wrong first is what is said
                    run.require_there()
                    write_report(run)
            raise
        finish()
