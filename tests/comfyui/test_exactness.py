"""One network call is the student's x0, by our nodes and by stock ones: held against other code.

Stable Diffusion's layouts against diffusers' UNet and LCMScheduler, on the same random weights;
class-conditional networks against this package's own sampler, on the same noise.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kit.adm import adm_state
from kit.checkpoints import tiny_sd2_v, tiny_sd15, tiny_sdxl
from kit.comfy_host import PACK, Server
from kit.graphs import (
    DIGITS_STUDENT,
    DIGITS_TEACHER,
    NO_NOISE,
    Graph,
    Node,
    by_diffusers,
    error,
    noise,
    put,
    sample,
    unet_of,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmd_train.method.noise import VP
from dmd_train.method.recipe import Recipe
from dmd_train.method.sample import sample_heun, sample_student
from dmd_train.networks.digits import CLASSES
from dmd_train.networks.load import DIGITS_TEACHER as TEACHER_FILE
from dmd_train.networks.load import load as from_disk
from dmd_train.networks.published import RECIPES

TINY = {"sd15": tiny_sd15, "sd2v": tiny_sd2_v, "sdxl": tiny_sdxl}
EXACT = 1e-4
"""Relative error of a latent in float32. Measured: 3e-7 to 9e-7."""
EXACT_EDM = 3e-5
"""Measured: 2e-7 to 1e-5. Noise of sqrt(1 + 80^2) instead of 80, ComfyUI's default, makes 8e-5."""
OFF = 0.1
"""What is wrong is wrong by more than this."""
CPU = torch.device("cpu")
STOCK = Recipe(
    family="sd1",
    prediction="eps",
    timesteps=(499,),
    noise_scale=float(VP.scaled_linear().sigma(torch.tensor([499]))),
)


def load(server: Server, graph: Graph, family: str) -> Node:
    """Load DMD Checkpoint on a file that says nothing about its steps."""
    return graph.add("DMD_LoadCheckpoint", file=f"checkpoints/{put(server, TINY[family])}")


def by_lcm_scheduler(
    server: Server, family: str, timesteps: tuple[int, ...], between: Tensor
) -> Tensor:
    unet = unet_of(server.base / "models/checkpoints" / put(server, TINY[family]))
    return by_diffusers(unet, family, list(timesteps), noise(1, 4, 8, 8), between)


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("sd15", "SD 1.5, 1 step"),
        ("sdxl", "SDXL, 1 step (t = 399)"),
        ("sdxl", "SDXL, 2 steps"),
        ("sdxl", "SDXL, 4 steps"),
    ],
)
def test_stock_ksampler_our_sampler_and_our_sockets_make_what_lcm_scheduler_makes(
    server: Server, family: str, recipe: str
) -> None:
    graph, timesteps = Graph(), RECIPES[recipe].timesteps
    text, empty = graph.condition(family), graph.empty()
    model = graph.model_sampling(load(server, graph, family), recipe)
    between, *sampled = sample(
        server,
        graph,
        graph.step_noise(empty, 3),
        graph.ksampler(model, text, empty, steps=len(timesteps)),
        graph.one_step(model, text),
        graph.sampler_custom(model[0], model[1], model[2], text, empty),
    )
    expected = by_lcm_scheduler(server, family, timesteps, between)
    errors = [error(latent, expected) for latent in sampled]
    assert max(errors) <= EXACT


def test_three_uneven_steps_are_exact_in_our_sampler_and_our_sockets(server: Server) -> None:
    """Not in KSampler: none of its schedules gives 999, 749, 499."""
    graph, timesteps = Graph(), RECIPES["SDXL, 3 steps"].timesteps
    text, empty = graph.condition("sdxl"), graph.empty()
    model = graph.model_sampling(load(server, graph, "sdxl"), "SDXL, 3 steps")
    between, *sampled = sample(
        server,
        graph,
        graph.step_noise(empty, 2),
        graph.one_step(model, text),
        graph.sampler_custom(model[0], model[1], model[2], text, empty),
    )
    expected = by_lcm_scheduler(server, "sdxl", timesteps, between)
    errors = [error(latent, expected) for latent in sampled]
    assert max(errors) <= EXACT


def test_custom_timesteps_are_exact_on_a_v_model_too(server: Server) -> None:
    graph = Graph()
    text, empty = graph.condition("sd2v"), graph.empty()
    model = graph.model_sampling(load(server, graph, "sd2v"), "custom timesteps", "799, 399")
    between, ours, stock = sample(
        server,
        graph,
        graph.step_noise(empty, 1),
        graph.one_step(model, text),
        graph.ksampler(model, text, empty, steps=2),
    )
    expected = by_lcm_scheduler(server, "sd2v", (799, 399), between)
    assert max(error(ours, expected), error(stock, expected)) <= EXACT


UNFIT = {
    *("uni_pc", "uni_pc_bh2", "dpm_fast", "dpm_adaptive"),  # do not end at sigma 0
    *("ddim_uniform", "kl_optimal"),  # one step of theirs does not begin at the noisiest sigma
}


def test_one_step_at_399_is_exact_in_all_stock_samplers_and_schedules_but_six(
    server: Server,
) -> None:
    offered = server.object_info()["KSampler"]["input"]["required"]
    samplers, schedulers = (
        set(kind if isinstance(kind, list) else more["options"])
        for kind, *rest in (offered["sampler_name"], offered["scheduler"])
        for more in (rest[0] if rest else {},)
    )
    ways = [(name, "simple") for name in sorted(samplers - UNFIT)]
    ways += [("lcm", name) for name in sorted(schedulers - UNFIT)]
    graph = Graph()
    text, empty = graph.condition("sd15"), graph.empty()
    model = graph.model_sampling(load(server, graph, "sd15"), "custom timesteps", "399")
    sampled = sample(
        server,
        graph,
        *(
            graph.ksampler(model, text, empty, sampler=sampler, scheduler=scheduler)
            for sampler, scheduler in ways
        ),
    )
    expected = by_lcm_scheduler(server, "sd15", (399,), NO_NOISE)
    errors = {way: error(latent, expected) for way, latent in zip(ways, sampled, strict=True)}
    assert len(errors) > 40
    assert {way: wrong for way, wrong in errors.items() if not wrong <= EXACT} == {}


def test_without_our_model_sampling_a_student_of_399_is_off_even_at_the_right_sigma(
    server: Server,
) -> None:
    """Then its input has a standard deviation of 0.758, where it knows nothing but 1."""
    graph = Graph()
    text, empty = graph.condition("sd15"), graph.empty()
    loaded = load(server, graph, "sd15")
    model = graph.model_sampling(loaded, "custom timesteps", "399")
    right_sigma, stock = sample(
        server,
        graph,
        graph.sampler_custom(loaded[0], model[1], model[2], text, empty),
        graph.ksampler(loaded, text, empty),
    )
    expected = by_lcm_scheduler(server, "sd15", (399,), NO_NOISE)
    assert error(right_sigma, expected) > OFF
    assert error(stock, expected) > OFF


def student_of_499(path: Path) -> None:
    """A file that says it was trained at 499 on noise of sigma_499."""
    tiny_sd15(path)
    save_file(load_file(path), path, STOCK.to_metadata("a student", (3, 64, 64)))


def test_a_stock_ksampler_without_any_node_of_ours_draws_a_student_of_499_exactly(
    server: Server,
) -> None:
    """As a recipe's `stock` has it; and our loader, which knows the recipe, at denoise 1."""
    name = put(server, student_of_499)
    graph, settings = Graph(), STOCK.stock
    assert settings
    text, empty = graph.condition("sd15"), graph.empty()
    stock = graph.add("CheckpointLoaderSimple", ckpt_name=name)
    ours = graph.add("DMD_LoadCheckpoint", file=f"checkpoints/{name}")
    sampled = sample(
        server,
        graph,
        *(
            graph.ksampler(stock, text, empty, sampler=sampler, denoise=settings.denoise)
            for sampler in ("lcm", "euler", "dpmpp_2m")
        ),
        graph.ksampler(ours, text, empty),
        graph.one_step(ours, text),
    )
    unet = unet_of(server.base / "models/checkpoints" / put(server, tiny_sd15))
    start = STOCK.noise_scale * noise(1, 4, 8, 8)
    expected = by_diffusers(unet, "sd15", [499], start, NO_NOISE)
    assert max(error(latent, expected) for latent in sampled) <= 1e-5
    unscaled = by_diffusers(unet, "sd15", [499], noise(1, 4, 8, 8), NO_NOISE)
    assert error(unscaled, expected) > OFF


def labelled(count: int) -> dict[str, Tensor]:
    return {"label": torch.arange(count)}


def test_the_digits_student_makes_what_the_engine_makes_of_the_same_noise(server: Server) -> None:
    graph = Graph()
    model = graph.add("DMD_LoadCheckpoint", file=DIGITS_STUDENT)
    classes = graph.classes()
    empty = graph.add("DMD_EmptyLatent", model=model, width=0, height=0, batch_size=CLASSES)
    sockets = graph.model_sampling(model)
    sampled = sample(
        server,
        graph,
        graph.one_step(model, classes, 0, 0, CLASSES),
        graph.ksampler(model, classes, empty, sampler="euler"),
        graph.ksampler(model, classes, empty, sampler="dpmpp_2m", scheduler="karras"),
        graph.sampler_custom(sockets[0], sockets[1], sockets[2], classes, empty),
    )
    loaded = from_disk(str(PACK / "students/digits-one-step.safetensors"), CPU)
    assert loaded.recipe
    with torch.no_grad():
        expected = sample_student(
            loaded.network, loaded.recipe, labelled(CLASSES), [noise(CLASSES, 1, 8, 8)]
        )
    errors = [error(latent, expected) for latent in sampled]
    assert max(errors) <= EXACT_EDM


def test_an_imagenet_64_generator_makes_what_the_engine_makes_of_the_same_noise(
    server: Server,
) -> None:
    """DMD2's file, narrow: 64 x 64, 1000 classes, as it lies in the folder of a training run."""
    name = "imagenet_fid1.28_checkpoint_model_548000/pytorch_model.bin"
    put(server, imagenet_generator, name)
    graph = Graph()
    model = graph.add("DMD_LoadCheckpoint", file=f"checkpoints/{name}")
    classes = graph.classes("0-2")
    empty = graph.add("DMD_EmptyLatent", model=model, width=0, height=0, batch_size=3)
    sampled = sample(
        server,
        graph,
        graph.one_step(model, classes, 0, 0, 3),
        graph.ksampler(model, classes, empty, sampler="euler"),
    )
    loaded = from_disk(str(server.base / "models/checkpoints" / name), CPU)
    assert loaded.recipe
    with torch.no_grad():
        expected = sample_student(loaded.network, loaded.recipe, labelled(3), [noise(3, 3, 64, 64)])
    errors = [error(latent, expected) for latent in sampled]
    assert max(errors) <= EXACT_EDM


def imagenet_generator(path: Path) -> None:
    torch.save(adm_state(64, [128, 128], 1, set(), 1000), path)


def test_stock_heun_on_the_digits_teacher_is_the_engines_heun(server: Server) -> None:
    graph = Graph()
    model = graph.add("DMD_LoadCheckpoint", file=DIGITS_TEACHER)
    classes = graph.classes()
    empty = graph.add("DMD_EmptyLatent", model=model, width=0, height=0, batch_size=CLASSES)
    (sampled,) = sample(
        server,
        graph,
        graph.ksampler(model, classes, empty, steps=18, sampler="heun", scheduler="karras"),
    )
    teacher = from_disk(str(TEACHER_FILE), CPU).network
    expected = sample_heun(teacher, noise(CLASSES, 1, 8, 8), labelled(CLASSES), steps=18)
    assert error(sampled, expected) <= EXACT_EDM


def calls(server: Server, graph: Graph, name: str, latent: Node) -> int:
    told = graph.add("Probe_Calls", name=name, latent=latent)
    count: int = server.run(graph)["outputs"][told.id]["calls"][0]
    return count


@pytest.mark.parametrize("recipe", ["SDXL, 1 step (t = 399)", "SDXL, 4 steps"])
def test_our_sampler_calls_the_network_once_a_step_and_never_for_guidance(
    server: Server, recipe: str
) -> None:
    graph = Graph()
    model = graph.model_sampling(load(server, graph, "sdxl"), recipe)
    watched = graph.add("Probe_Watch", model=model, name=f"ours {recipe}", seconds=0.0)
    latent = graph.one_step(watched, graph.condition("sdxl"), batch=2)
    assert calls(server, graph, f"ours {recipe}", latent) == RECIPES[recipe].nfe


def test_stock_ksampler_calls_a_one_step_student_once(server: Server) -> None:
    graph = Graph()
    model = graph.add("DMD_LoadCheckpoint", file=DIGITS_STUDENT)
    watched = graph.add("Probe_Watch", model=model, name="stock", seconds=0.0)
    empty = graph.add("DMD_EmptyLatent", model=model, width=0, height=0, batch_size=4)
    latent = graph.ksampler(watched, graph.classes("3"), empty)
    assert calls(server, graph, "stock", latent) == 1
