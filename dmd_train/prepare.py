"""What a run needs before its first step: encoded prompts, pairs, the distance they are held to."""

import hashlib
from collections.abc import Iterator

import torch
from torch.nn import functional

from .config import Config
from .data.conditions import Classes, Conditions, Prompts
from .data.pairs import Pairs, make_pairs, origin_of, teacher_sample
from .data.prompts import encode_prompts, fits_on_disk, read_prompts, too_long
from .errors import UserError
from .files.shards import Shards
from .learner import require_optimizer
from .method.network import Network
from .method.objectives import Distance, pseudo_huber
from .method.processes import Processes
from .networks.edm import EDMNetwork
from .networks.loaded import Loaded
from .presets import families_of, presets_for
from .run.folder import RunFolder
from .run.trackers import require_trackers
from .terminal.bar import StopRequest, bar, console


def require_possible(config: Config, loaded: Loaded) -> None:
    """Raises UserError for what would stop the run only once prompts and pairs are made."""
    families, family = families_of(config.preset), loaded.network.family
    if families and family not in families:
        raise UserError(
            f"preset: {config.preset} is for {', '.join(families)}, but {config.teacher} is "
            f"{family}. Choose one of {', '.join(presets_for(family))}."
        )
    require_trackers(config)
    require_optimizer(config)


def make_conditions(
    run: RunFolder, loaded: Loaded, processes: Processes, stop: StopRequest
) -> Conditions:
    """Classes, or the run's prompts: encoded into run.text, or live where they are too many."""
    if isinstance(loaded.network, EDMNetwork):
        return Classes(loaded.network.classes)
    assert loaded.text
    path = run.config.prompts
    prompts = read_prompts(path)
    warning = too_long(prompts, loaded.text, path)
    if warning:
        console.print(f"warning: {warning}", soft_wrap=True)
    encoder = loaded.text.to(processes.device)
    if not fits_on_disk(prompts, encoder):
        return Prompts(prompts, encoder)
    if processes.is_main:
        made = encode_prompts(run.text, prompts, encoder, made_from(loaded, prompts))
        _progress("prompts", made, len(prompts), stop)
    processes.wait()
    encoder.to(torch.device("cpu"))
    return Prompts(prompts, Shards(run.text))


def make_run_pairs(
    run: RunFolder,
    loaded: Loaded,
    conditions: Conditions,
    processes: Processes,
    stop: StopRequest,
) -> Pairs:
    """The pairs in run.pairs, made where they are not there yet; each process makes its part."""
    prompts = conditions.prompts if isinstance(conditions, Prompts) else []
    config = run.config
    made = make_pairs(
        run.pairs,
        config.pairs,
        config.seed,
        loaded.network.shape,
        conditions,
        config.pair_batch_size,
        origin_of(made_from(loaded, prompts), config),
        teacher_sample(loaded.network, conditions, config),
        processes,
    )
    _progress("pairs", made, config.pairs, stop)
    processes.wait()
    return Pairs(Shards(run.pairs))


def _progress(what: str, made: Iterator[int], total: int, stop: StopRequest) -> None:
    """A bar; exits once a stop is asked for. What is made is on disk."""
    with bar() as progress:
        task = progress.add_task(what, total=total, note="")
        for count in made:
            progress.update(task, completed=count)
            if stop.signal and count < total:
                console.print(f"{what}: {count} of {total} kept; the same command goes on.")
                stop.exit()


def made_from(loaded: Loaded, prompts: list[str]) -> str:
    """Names the teacher and the prompts."""
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    return f"{loaded.sha256} {digest}"


def regression_distance(config: Config, network: Network) -> Distance:
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
