"""A run before its first step: a config and its teacher become a run that is ready to go.

Generators that yield what they are at: every door only iterates them, with a bar of its own.
"""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from .config import DIGITS, Config
from .data.conditions import Classes, Conditions, Prompts, name_of
from .data.images import Images, make_images, unused
from .data.pairs import Pairs, StoredPairs, make_pairs, origin_of, teacher_sample
from .data.pictures import PictureBatch, PictureFolder, Pictures, class_rows
from .data.prompts import encode_prompts, fits_on_disk, read_prompts, require_prompt, too_long
from .errors import UserError, out_of_memory
from .files.shards import Shards
from .iteration import Distillation
from .learner import require_optimizer
from .method.network import Network
from .method.objectives import Distance, pseudo_huber
from .method.processes import Processes
from .method.roles import Roles, three_networks, two_adapters
from .networks.loaded import Loaded, student_recipe
from .presets import families_of, presets_for
from .room import require_disk_for_images, require_disk_for_pairs, require_room
from .run.folder import RunFolder, require_teacher
from .run.sample_sheet import SampleSheet
from .run.trackers import require_trackers


class Doing(NamedTuple):
    """What a preparation is at: `done` of `total`. note: a line for the user, once."""

    what: str
    done: int
    total: int
    note: str = ""


Result = TypeVar("Result")
Preparation = Generator[Doing, None, Result]


def carried_out(preparation: Preparation[Result], tell: Callable[[Doing], None]) -> Result:
    """The result of a preparation, each of its parts told. What `tell` raises ends it."""
    with closing(preparation):
        while True:
            try:
                doing = next(preparation)
            except StopIteration as end:
                result: Result = end.value
                return result
            tell(doing)


@dataclass(frozen=True)
class Ready:
    """A run that can take its next step, after `step` student updates.

    sheet: None where another process draws it.
    """

    run: RunFolder
    state: Distillation
    pairs: Pairs | None
    sheet: SampleSheet | None
    step: int


def prepare(
    run: RunFolder,
    loaded: Loaded,
    processes: Processes | None = None,
    conditions: Conditions | None = None,
    pairs: Pairs | None = None,
    pictures: bool = True,
    real: Pictures | None = None,
) -> Preparation[Ready]:
    """Conditions, pairs, images, roles, the newest checkpoint's state and the teacher's pictures.

    conditions, pairs: those of the caller, else they are made in the run's folder, or found there.
    real: the caller's for config.images.
    Raises UserError for a run that cannot be, and out of memory.
    """
    config, teacher = run.config, loaded.network
    processes = processes or Processes(teacher.device)
    with out_of_memory(run.too_large):
        require_possible(config, loaded)
        recipe = student_recipe(loaded, config)
        distance = regression_distance(config, teacher)
        if conditions is None:
            conditions = yield from make_conditions(run, loaded, processes)
        if not config.needs_pairs:
            pairs = None
        elif pairs is None:
            pairs = yield from make_run_pairs(run, loaded, conditions, processes)
        images = None
        if config.images:
            images = yield from make_run_images(run, loaded, processes, real)
        roles = make_roles(teacher, config, processes)
        state = Distillation(roles, recipe, conditions, config, distance, processes, images)
        step = _taken_up(state, run)
        sheet = None
        # a sharded network needs all processes
        if pictures and (processes.is_main or processes.is_sharded):
            sheet = SampleSheet(roles.teacher.network, recipe, conditions, config)
            yield from _told("teacher's pictures", sheet.draw_teacher(), len(sheet))
        return Ready(run, state, pairs, sheet, step)


def _taken_up(state: Distillation, run: RunFolder) -> int:
    """The step of the newest checkpoint, which `state` is set to; 0 where there is none.

    Raises UserError for a checkpoint by another teacher or of other weights.
    """
    checkpoint = run.newest()
    if checkpoint is None:
        return 0
    require_teacher(checkpoint.teacher, state.recipe.teacher_sha256, run.config.teacher)
    if strange := _strange(checkpoint.tensors, state):
        raise UserError(
            f"{run.checkpoints}: of step {checkpoint.step}, {strange[0]} is not as this run has "
            "it. Delete that file to go on from the one before."
        )
    state.restore(checkpoint.tensors)
    return checkpoint.step


def _strange(tensors: dict[str, Tensor], state: Distillation) -> list[str]:
    """Names that are one too many or missing among these and the run's, or of another shape."""
    learned: dict[str, Mapping[str, Tensor]] = {
        "student": state.student.parameters,
        "critic": state.critic.parameters,
        "ema": state.ema.average,
    }
    own = {f"{part}/{k}": v.shape for part, flat in learned.items() for k, v in flat.items()}
    too_many = {key for key in tensors if key.partition("@")[0] not in own}
    return sorted(
        too_many
        | {key for key, shape in own.items() if key not in tensors or tensors[key].shape != shape}
    )


def require_possible(config: Config, loaded: Loaded) -> None:
    """Refusal, a UserError, of what would stop the run only once prompts and pairs are made."""
    families, family = families_of(config.preset), loaded.network.family
    if families and family not in families:
        raise UserError(
            f"preset: {config.preset} is for {', '.join(families)}, but {config.teacher} is "
            f"{family}. Choose one of {', '.join(presets_for(family))}."
        )
    require_trackers(config)
    require_optimizer(config)
    require_room(config, loaded.network)


def make_conditions(
    run: RunFolder, loaded: Loaded, processes: Processes
) -> Preparation[Conditions]:
    """Classes, or the run's prompts: encoded into run.text, or live where they are too many."""
    if loaded.text is None:
        assert loaded.network.classes
        return Classes(loaded.network.classes)
    path = run.config.prompts
    prompts = read_prompts(path)
    if warning := too_long(prompts, loaded.text, path):
        yield Doing("prompts", 0, len(prompts), f"warning: {warning}")
    encoder = loaded.text.to(processes.device)
    if not fits_on_disk(prompts, encoder):
        return Prompts(prompts, encoder)
    if processes.is_main:
        made = encode_prompts(run.text, prompts, encoder, made_from(loaded, name_of(prompts)))
        yield from _told("prompts", made, len(prompts))
    processes.wait()
    encoder.to(torch.device("cpu"))
    return Prompts(prompts, Shards(run.text))


def make_run_pairs(
    run: RunFolder, loaded: Loaded, conditions: Conditions, processes: Processes
) -> Preparation[Pairs]:
    """The pairs in run.pairs, made where they are not there yet; each process makes its part."""
    config = run.config
    require_disk_for_pairs(config, loaded.network, run.pairs)
    made = make_pairs(
        run.pairs,
        config.pairs,
        config.seed,
        loaded.network.shape,
        conditions,
        config.pair_batch_size,
        origin_of(made_from(loaded, conditions.name), config),
        teacher_sample(loaded.network, conditions, config),
        processes,
    )
    yield from _told("pairs", made, config.pairs)
    processes.wait()
    return StoredPairs(Shards(run.pairs))


def make_run_images(
    run: RunFolder, loaded: Loaded, processes: Processes, real: Pictures | None = None
) -> Preparation[Images]:
    """The pictures of config.images in run.images, encoded where they are not there yet."""
    config, network = run.config, loaded.network
    pictures = real or pictures_of(config, network)
    require_disk_for_images(config, len(pictures), network, run.images)
    of = (run.images, pictures, network, config.flip_images, loaded.sha256)
    yield from _told("images", make_images(*of, processes.rank, processes.count), len(pictures))
    processes.wait()
    shards = Shards(run.images)
    if note := unused(shards, pictures, network):
        yield Doing("images", len(pictures), len(pictures), note)
    if pictures.captions is None:
        return Images(shards, None, None)
    if network.classes is not None:
        row = class_rows(pictures.captions, network.classes, "captions")
        known: Conditions = Classes(network.classes)
    else:
        known, row = yield from _encoded_captions(run, loaded, pictures.captions, processes)
    copies = len(shards) // len(pictures)
    return Images(shards, row.repeat_interleave(copies), known)


def pictures_of(config: Config, network: Network) -> Pictures:
    """The pictures that config.images names. Raises UserError where there are none."""
    assert config.images
    if config.images == DIGITS:
        from .networks.digits import digits

        data = digits()
        return PictureBatch(data.image, [str(label) for label in data.label.tolist()])
    return PictureFolder(Path(config.images), config.captions, network.classes is not None)


def _encoded_captions(
    run: RunFolder, loaded: Loaded, captions: list[str], processes: Processes
) -> Preparation[tuple[Conditions, Tensor]]:
    """The captions, each once, encoded in run.captions, and the row of each picture's."""
    if loaded.text is None:
        raise UserError("captions: there is no text encoder for them here. Train in a terminal.")
    each = list(dict.fromkeys(captions))
    for caption in each:
        require_prompt(caption, "captions")
    if processes.is_main:
        encoder = loaded.text.to(processes.device)
        made = encode_prompts(run.captions, each, encoder, made_from(loaded, name_of(each)))
        yield from _told("captions", made, len(each))
        encoder.to(torch.device("cpu"))
    processes.wait()
    number = {caption: i for i, caption in enumerate(each)}
    row = torch.tensor([number[caption] for caption in captions])
    return Prompts(each, Shards(run.captions)), row


def _told(what: str, made: Iterator[int], total: int) -> Iterator[Doing]:
    for done in made:
        yield Doing(what, done, total)


def made_from(loaded: Loaded, conditions: str) -> str:
    """The teacher and the conditions (their name), for what is made from both."""
    return f"{loaded.sha256} {conditions}"


def regression_distance(config: Config, network: Network) -> Distance:
    """The distance that config.regression_loss names. Raises UserError where it cannot be."""
    match config.regression_loss:
        case "mse":
            return functional.mse_loss
        case "pseudo-huber":
            return pseudo_huber
        case "lpips":
            if not config.needs_pairs:
                return functional.mse_loss
            from .networks.perceptual import lpips

            return lpips(network)


def make_roles(teacher: Network, config: Config, processes: Processes | None = None) -> Roles:
    """The roles of config.training. Raises UserError for what cannot be spread over processes."""
    processes = processes or Processes(teacher.device)
    if processes.is_sharded and (config.training == "lora" or config.ema_decay):
        raise UserError(
            "FSDP is for training: full with ema_decay: 0. Leave --use_fsdp out: adapters fit."
        )
    if config.training == "full":
        return three_networks(teacher, processes)
    return two_adapters(teacher, config.lora_rank, config.lora_alpha, config.seed)
