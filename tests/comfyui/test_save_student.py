"""DMD Save Student: what it writes is loaded again and draws the same; nothing is written over."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.checkpoints import UNET, tiny_sd2_v, tiny_sd15, tiny_sdxl
from kit.comfy_host import PACK, Server
from kit.flow_model import flow_lora, flow_recipe, sd3_weights, text_condition, tiny_sd3
from kit.graphs import (
    DIGITS_STUDENT,
    DIGITS_TEACHER,
    NO_NOISE,
    Graph,
    Node,
    by_diffusers,
    error,
    failed,
    models,
    noise,
    put,
    sample,
    unet_of,
)
from kit.published import kohya, lora_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dmd_train.method.recipe import Recipe, read_recipe

EXACT = 1e-4
OFF = 0.01
RECIPE = Recipe(
    family="sd1", prediction="eps", timesteps=(599,), noise_scale=1.0, baked_guidance=4.5
)
SHAPE = (3, 64, 64)


def student_file(server: Server, name: str, tensors: Any, recipe: Recipe = RECIPE) -> str:
    """A student as a run writes it, where Probe_Student finds it; its name there."""
    marks = {"ss_base_model_version": "sd_v1"}
    path = server.base / f"input/{name}.safetensors"
    save_file(tensors, path, recipe.to_metadata("a student", SHAPE) | marks)
    return name


def lora_student(server: Server, graph: Graph, strength: float = 1.0) -> tuple[Node, Node]:
    """A MODEL with a LoRA of the user's; the LoRA student that was made of it."""
    network = unet_of(server.base / "models/checkpoints" / put(server, tiny_sd15))
    style = kohya(lora_of(network, rank=2, seed=1), alpha=1.0)
    save_file(style, models(server, "loras", "before.safetensors"))
    name = student_file(server, "lora", kohya(lora_of(network, rank=2), alpha=1.0))
    loaded = graph.add("CheckpointLoaderSimple", ckpt_name=put(server, tiny_sd15))
    teacher = with_lora(graph, loaded, "before.safetensors", strength)
    return teacher, graph.add("Probe_Student", model=teacher, name=name)


def with_lora(graph: Graph, model: Node, name: str, strength: float = 1.0) -> Node:
    return graph.add("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=strength)


def save(graph: Graph, model: Node, save_as: str, prefix: str, **more: Any) -> Node:
    return graph.add(
        "DMD_SaveStudent", model=model, save_as=save_as, filename_prefix=prefix, **more
    )


def path_told(graph: Graph, node: Node) -> Path:
    """The path in the line that the node showed."""
    (line,) = graph.shown[node.id]["text"]
    return Path(line.partition(": press R, then use Load DMD ")[0])


def files(server: Server) -> set[Path]:
    return {path for path in server.base.rglob("*.safetensors") if "custom_nodes" not in path.parts}


def metadata_of(path: Path) -> dict[str, str]:
    """What a file says, but for the hash of its own tensors."""
    with safe_open(path, "pt") as file:
        return {key: value for key, value in file.metadata().items() if key != "dmd.sha256"}


def test_lora_unet_and_checkpoint_draw_what_the_student_drew_by_our_loaders_and_the_stock_ones(
    server: Server,
) -> None:
    graph = Graph()
    with_clip = put(server, partial(tiny_sd15, seed=1, clip=True), "with_clip.safetensors")
    teacher, student = lora_student(server, graph)
    parts = graph.add("CheckpointLoaderSimple", ckpt_name=with_clip)
    wired = {"clip": parts[1], "vae": parts[2]}
    nodes = {
        "loras": save(graph, student, "LoRA", "dmd/all"),
        "diffusion_models": save(graph, student, "UNet", "dmd/all"),
        "checkpoints": save(graph, student, "checkpoint", "dmd/all", **wired),
    }
    output = graph.add("Probe_ShowText", text=nodes["loras"])
    text = graph.condition("sd15")
    before, teachers = sample(
        server, graph, graph.one_step(student, text), graph.ksampler(teacher, text, graph.empty())
    )
    assert error(teachers, before) > OFF
    for folder, node in nodes.items():
        path = path_told(graph, node)
        assert path == server.base / f"models/{folder}/dmd/all_00001_.safetensors"
        assert read_recipe(metadata_of(path), str(path)) == RECIPE
        assert ("ss_base_model_version" in metadata_of(path)) == (folder == "loras")
    assert graph.shown[output.id]["text"] == [str(path_told(graph, nodes["loras"]))]
    written = load_file(path_told(graph, nodes["loras"]))
    given = load_file(server.base / "input/lora.safetensors")
    assert written.keys() == given.keys()
    assert all(torch.equal(written[key], value) for key, value in given.items())

    written = load_file(path_told(graph, nodes["checkpoints"]))
    source = load_file(server.base / "models/checkpoints" / with_clip)
    parts = [key for key in source if key.startswith(("cond_stage_model.", "first_stage_model."))]
    assert len({key.partition(".")[0] for key in parts}) == 2
    floats = [key for key in parts if source[key].is_floating_point()]
    assert all(torch.allclose(written[key].float(), source[key].float()) for key in floats)

    name = "dmd/all_00001_.safetensors"
    graph = Graph()
    teacher, _ = lora_student(server, graph)
    text = graph.condition("sd15")
    ours = [
        graph.add("DMD_LoadLoRA", model=teacher, file=name, strength=1.0),
        graph.add("DMD_LoadCheckpoint", file=f"diffusion_models/{name}"),
        whole := graph.add("DMD_LoadCheckpoint", file=f"checkpoints/{name}"),
    ]
    stock = [
        with_lora(graph, teacher, name),
        graph.add("UNETLoader", unet_name=name, weight_dtype="default"),
        graph.add("CheckpointLoaderSimple", ckpt_name=name),
    ]
    stock = [graph.model_sampling(model, "custom timesteps", "599") for model in stock]
    graph.add("VAEDecode", samples=graph.empty(), vae=whole[2])
    latents = sample(server, graph, *(graph.one_step(model, text) for model in (*ours, *stock)))
    assert max(error(latent, before) for latent in latents) <= EXACT


def test_a_unet_trained_in_full_is_saved_whole_and_has_no_lora(server: Server) -> None:
    other = put(server, partial(tiny_sd15, seed=1), "another.safetensors")
    whole = load_file(server.base / "models/checkpoints" / other)
    name = student_file(
        server, "full", {key: value for key, value in whole.items() if key.startswith(UNET)}
    )
    graph = Graph()
    teacher = graph.add("CheckpointLoaderSimple", ckpt_name=put(server, tiny_sd15))
    student = graph.add("Probe_Student", model=teacher, name=name)
    node = save(graph, student, "UNet", "full")
    graph.shown = server.run(graph)["outputs"]
    saved = f"diffusion_models/{path_told(graph, node).name}"

    graph = Graph()
    student = graph.add("DMD_LoadCheckpoint", file=saved)
    (drawn,) = sample(server, graph, graph.one_step(student, graph.condition("sd15")))
    network = unet_of(server.base / "models/checkpoints" / other)
    assert error(drawn, by_diffusers(network, "sd15", [599], noise(1, 4, 8, 8), NO_NOISE)) <= EXACT

    graph = Graph()
    teacher = graph.add("CheckpointLoaderSimple", ckpt_name=put(server, tiny_sd15))
    student = graph.add("Probe_Student", model=teacher, name=name)
    save(graph, student, "LoRA", "full")
    assert "there is no LoRA. Choose UNet or checkpoint" in failed(server, graph).message


def test_a_v_prediction_unet_is_one_again_when_loaded(server: Server) -> None:
    network = unet_of(server.base / "models/checkpoints" / put(server, tiny_sd2_v))
    recipe = RECIPE.model_copy(update={"family": "sd2", "prediction": "v", "timesteps": (999,)})
    lora = kohya(lora_of(network, rank=1), alpha=1.0)
    name = student_file(server, "v", lora, recipe)
    graph = Graph()
    teacher = graph.add("CheckpointLoaderSimple", ckpt_name=put(server, tiny_sd2_v))
    student = graph.add("Probe_Student", model=teacher, name=name)
    node = save(graph, student, "UNet", "v")
    text = graph.condition("sd2v")
    (before,) = sample(server, graph, graph.one_step(student, text))
    saved = path_told(graph, node).name
    graph = Graph()
    ours = graph.add("DMD_LoadCheckpoint", file=f"diffusion_models/{saved}")
    stock = graph.add("UNETLoader", unet_name=saved, weight_dtype="default")
    text = graph.condition("sd2v")
    latents = sample(
        server, graph, graph.one_step(ours, text), graph.ksampler(stock, text, graph.empty())
    )
    assert max(error(latent, before) for latent in latents) <= EXACT


def test_a_student_of_a_flow_model_is_the_same_when_loaded(server: Server) -> None:
    base = put(server, tiny_sd3)
    lora = flow_lora(sd3_weights(server.base / "models/checkpoints" / base))
    name = student_file(server, "flow", lora, flow_recipe())
    graph = Graph()
    student = graph.add(
        "Probe_Student", model=graph.add("CheckpointLoaderSimple", ckpt_name=base), name=name
    )
    nodes = [save(graph, student, save_as, "flow") for save_as in ("LoRA", "UNet")]
    (before,) = sample(server, graph, graph.one_step(student, text_condition(graph, "SD3")))
    files = [path_told(graph, node).name for node in nodes]
    graph = Graph()
    teacher = graph.add("CheckpointLoaderSimple", ckpt_name=base)
    text = text_condition(graph, "SD3")
    latents = sample(
        server,
        graph,
        graph.one_step(graph.add("DMD_LoadLoRA", model=teacher, file=files[0], strength=1.0), text),
        graph.one_step(graph.add("DMD_LoadCheckpoint", file=f"diffusion_models/{files[1]}"), text),
        graph.ksampler(teacher, text, graph.empty()),
    )
    assert max(error(latent, before) for latent in latents[:2]) <= EXACT
    assert error(latents[2], before) > OFF


def test_a_lone_sdxl_unet_that_predicts_v_is_refused(server: Server) -> None:
    """ComfyUI knows it by a key that it drops from a UNet alone."""

    def tiny_sdxl_v(path: Path) -> None:
        tiny_sdxl(path)
        save_file(load_file(path) | {"v_pred": torch.empty(0)}, path)

    loaded = put(server, tiny_sdxl_v)
    recipe = RECIPE.model_copy(update={"family": "sdxl", "prediction": "v"})
    layer = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    lora = {f"{layer}.lora_down.weight": torch.ones(1, 2048)}
    lora |= {f"{layer}.lora_up.weight": torch.ones(320, 1), f"{layer}.alpha": torch.ones(())}
    name = student_file(server, "sdxl_v", lora, recipe)
    graph = Graph()
    teacher = graph.add("CheckpointLoaderSimple", ckpt_name=loaded)
    student = graph.add("Probe_Student", model=teacher, name=name)
    save(graph, student, "UNet", "v")
    assert "this predicts v. Choose checkpoint or LoRA" in failed(server, graph).message


@pytest.mark.parametrize("save_as", ["UNet", "checkpoint"])
def test_a_class_model_goes_to_the_checkpoints_and_draws_the_same(
    server: Server, save_as: str
) -> None:
    file = PACK / "students/digits-one-step.safetensors"
    (server.base / "input/digits.safetensors").write_bytes(file.read_bytes())

    def student(graph: Graph) -> Node:
        teacher = graph.add("DMD_LoadCheckpoint", file=DIGITS_TEACHER)
        return graph.add("Probe_Student", model=teacher, name="digits")

    graph = Graph()
    node = save(graph, student(graph), save_as, f"digits {save_as}")
    graph.shown = server.run(graph)["outputs"]
    path = path_told(graph, node)
    assert path == server.base / f"models/checkpoints/digits {save_as}_00001_.safetensors"
    assert metadata_of(path) == metadata_of(file)
    graph = Graph()
    classes = graph.classes()
    saved, shipped = sample(
        server,
        graph,
        *(
            graph.one_step(graph.add("DMD_LoadCheckpoint", file=name), classes, 0, 0, 10)
            for name in (f"checkpoints/{path.name}", DIGITS_STUDENT)
        ),
    )
    assert error(saved, shipped) <= EXACT
    graph = Graph()
    save(graph, student(graph), "LoRA", "digits")
    assert "there is no LoRA. Choose checkpoint" in failed(server, graph).message


def test_a_file_is_never_written_over(server: Server) -> None:
    for name in ("kept_00001_", "Kept_00002_", "kept_00004_ of mine"):
        models(server, "loras", f"over/{name}.safetensors").write_bytes(b"mine")
    before = {path: path.read_bytes() for path in files(server) if "over" in path.parts}
    new = []
    for strength in (0.5, 0.75):  # of the same node, ComfyUI would give the cached output
        graph = Graph()
        _, student = lora_student(server, graph, strength)
        node = save(graph, student, "LoRA", "over/kept")
        graph.shown = server.run(graph)["outputs"]
        new.append(path_told(graph, node))
    assert len({*new, *before}) == 5
    assert {path for path in files(server) if "over" in path.parts} == {*new, *before}
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    "prefix",
    [
        *("../escaped", "dmd/../../escaped", "..", "/tmp/escaped", "", ".", "dmd/", "a\\b"),
        *("..\\escaped", "C:/escaped", "a\nb", "a\0b"),
    ],
)
def test_a_name_that_is_none_inside_the_folder_is_refused_and_nothing_written(
    server: Server, prefix: str
) -> None:
    graph = Graph()
    _, student = lora_student(server, graph)
    save(graph, student, "LoRA", prefix)
    before = files(server)
    said = failed(server, graph).message
    assert said.endswith(": write for example dmd/student")
    assert f"filename_prefix: {prefix!r} is no name for a file inside" in said
    assert files(server) == before
    assert not Path("/tmp/escaped_00001_.safetensors").exists()


def test_what_cannot_be_saved_says_what_to_do(server: Server) -> None:
    graph = Graph()
    teacher, student = lora_student(server, graph)
    loaded = graph.add("CheckpointLoaderSimple", ckpt_name=put(server, tiny_sd15))
    # a file without text encoders gives a CLIP that is none
    save(graph, student, "checkpoint", "x", clip=loaded[1], vae=loaded[2])
    assert "clip is not wired: wire the teacher's, or choose UNet" in failed(server, graph).message

    graph = Graph()
    _, student = lora_student(server, graph)
    save(graph, student, "checkpoint", "x")
    assert "clip and vae is not wired" in failed(server, graph).message

    graph = Graph()
    teacher, _ = lora_student(server, graph)
    save(graph, teacher, "UNet", "x")
    assert "not a student of DMD Distill" in failed(server, graph).message


def test_a_file_in_the_place_of_the_folder_is_refused_and_left_alone(server: Server) -> None:
    taken = models(server, "diffusion_models", "taken")
    taken.write_bytes(b"mine")
    graph = Graph()
    _, student = lora_student(server, graph)
    save(graph, student, "UNet", "taken/student")
    assert "filename_prefix: 'taken/student' is no name" in failed(server, graph).message
    assert taken.read_bytes() == b"mine"
