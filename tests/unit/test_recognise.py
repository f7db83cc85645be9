"""What a file is said to be, and what is refused."""

import json
import os
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import publishers
from kit.adm import adm_state
from kit.tiny import recipe
from safetensors.torch import save_file

from dmd_train.config import make_config
from dmd_train.errors import UserError
from dmd_train.files.read import TORCH, peek, read_weights
from dmd_train.method.recipe import RECIPE_KEY, Recipe
from dmd_train.networks.digits import digits_network
from dmd_train.networks.load import load, load_teacher, save
from dmd_train.networks.published import DMD2_LICENSE, RECIPES
from dmd_train.networks.recognise import Found, recognise
from dmd_train.run.student import write_student

SDXL_FOLDER = "sdxl_cond999_8node_lr5e-7_denoising4step_diffusion1000_gan5e-3_guidance8_noinit"
COND399 = "sdxl_cond399_8node_lr5e-7_1step_diffusion1000_gan5e-3_guidance8"
WARM_UP = "sdxl_lr1e-5_8node_ode_pretraining_10k_cond399_checkpoint_model_002000.bin"
SD15_FOLDER = "laion6.25_sd_baseline_8node_guidance1.75_lr5e-7_seed10_dfake10_diffusion1000_gan1e-3"
FOUR = (999, 749, 499, 249)


def imagenet() -> dict[str, torch.Tensor]:
    return adm_state(64, [128], 1, set(), 1000)


def write(path: Path, weights: dict[str, torch.Tensor], metadata: Any = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in weights.items()}, path, metadata)
    else:
        torch.save(weights, path)
    return path


def found_in(path: Path, wanted: Any = None, elsewhere: str = "") -> Found:
    return recognise(*peek(path), str(path), wanted, elsewhere)


def refused(path: Path, wanted: Any = None, elsewhere: str = "") -> str:
    """The one line that the user reads."""
    with pytest.raises(UserError) as caught:
        found_in(path, wanted, elsewhere)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 600
    return message


@pytest.mark.parametrize(
    ("name", "weights", "layout", "family", "timesteps"),
    [
        ("dmd2_sdxl_1step_unet_fp16.bin", "unet", "diffusers UNet", "sdxl", (399,)),
        ("dmd2_sdxl_4step_unet_fp16.bin", "unet", "diffusers UNet", "sdxl", FOUR),
        ("dmd2_sdxl_4step_lora_fp16.safetensors", "lora", "kohya LoRA", "sdxl", FOUR),
        ("DMD2 SDXL 4 Steps.safetensors", "unet", "diffusers UNet", "sdxl", FOUR),
        (f"{SDXL_FOLDER}_checkpoint_model_019000/pytorch_model.bin", "unet", None, "sdxl", FOUR),
        (f"{COND399}_checkpoint_model_024000/pytorch_model.bin", "unet", None, "sdxl", (399,)),
        (WARM_UP, "unet", None, "sdxl", (399,)),
        (f"{SD15_FOLDER}_checkpoint_model_041000/pytorch_model.bin", "unet", None, "sd1", (999,)),
    ],
)
def test_a_file_of_dmd2_is_recognised_with_its_recipe_and_licence(
    tmp_path: Path, name: str, weights: str, layout: str, family: str, timesteps: tuple[int, ...]
) -> None:
    make = {"unet": publishers.diffusers_unet, "lora": publishers.kohya_lora}[weights]
    found = found_in(write(tmp_path / name, make(family)))
    assert found.layout == layout or layout is None
    assert found.family == family
    assert found.recipe is not None
    assert found.recipe.timesteps == timesteps
    assert (found.recipe.prediction, found.recipe.noise_scale) == ("eps", 1.0)
    assert found.license == found.recipe.license == DMD2_LICENSE


@pytest.mark.parametrize("name", ["pytorch_model.bin", "dmd2_imagenet.bin"])
def test_dmd2s_imagenet_generator_starts_from_noise_of_80(tmp_path: Path, name: str) -> None:
    found = found_in(write(tmp_path / name, imagenet()))
    assert (found.layout, found.family) == ("EDM class-conditional", "edm-imagenet64")
    assert found.recipe is not None
    assert (found.recipe.timesteps, found.recipe.noise_scale) == ((999,), 80.0)
    assert (found.recipe.prediction, found.license) == ("edm", DMD2_LICENSE)


@pytest.mark.parametrize(
    "name",
    [
        "unet.safetensors",
        "dmd2_sdxl_unet.safetensors",  # which of the two?
        "dmd2_sdxl_1step_and_4step.safetensors",
        "dmd2_sdxl_8step.safetensors",  # there is none
        "dmd2_sdxl_14step.safetensors",
        "sdxl_lightning_1step_unet.safetensors",  # the same layout, not DMD2's
        "my_dmd_student_1step.safetensors",  # ours, its metadata lost: t = 999, not 399
        "checkpoint_model.safetensors",
        "pytorch_model.bin",
    ],
)
def test_a_name_that_does_not_tell_the_recipe_leaves_the_question_to_the_user(
    tmp_path: Path, name: str
) -> None:
    found = found_in(write(tmp_path / name, publishers.diffusers_unet("sdxl")))
    assert found.recipe is None
    assert "which recipe?" in found.summary() and "ask me" in found.summary("ask me")
    assert ("non-commercial" in found.summary()) == ("dmd2" in name)


def test_an_imagenet_network_under_another_name_may_be_a_teacher_and_gets_no_recipe(
    tmp_path: Path,
) -> None:
    assert found_in(write(tmp_path / "edm.bin", imagenet())).recipe is None


def test_the_folder_is_asked_only_if_the_file_does_not_tell(tmp_path: Path) -> None:
    folder = tmp_path / f"{SDXL_FOLDER}_checkpoint_model_019000"
    path = write(folder / "dmd2_sdxl_1step.bin", publishers.diffusers_unet("sdxl"))
    found = found_in(path)
    assert found.recipe is not None and found.recipe.timesteps == (399,)


def test_the_summary_is_one_line_with_family_steps_timesteps_and_licence(tmp_path: Path) -> None:
    path = write(tmp_path / "dmd2_sdxl_4step_lora.safetensors", publishers.kohya_lora("sdxl"))
    assert found_in(path).summary() == (
        "SDXL, kohya LoRA: 4 steps at t = 999, 749, 499, 249; "
        "licence CC BY-NC-SA 4.0 (non-commercial)"
    )


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize(
    ("make", "layout", "kind"),
    [
        (publishers.diffusers_unet, "diffusers UNet", "checkpoint"),
        (publishers.ldm_unet, "LDM UNet", "checkpoint"),
        (publishers.kohya_lora, "kohya LoRA", "LoRA"),
        (publishers.peft_lora, "PEFT LoRA", "LoRA"),
    ],
)
def test_the_width_of_the_text_context_tells_the_family_in_every_layout(
    family: str, make: Any, layout: str, kind: Any
) -> None:
    shapes = {key: tuple(value.shape) for key, value in make(family).items()}
    found = recognise(shapes, {}, "some.safetensors", kind)
    assert (found.family, found.layout, found.kind) == (family, layout, kind)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("text_encoder", [True, False])
@pytest.mark.parametrize("vae", [True, False])
def test_a_single_file_is_said_to_have_exactly_the_parts_it_has(
    family: str, text_encoder: bool, vae: bool
) -> None:
    weights = publishers.single_file(family, text_encoder, vae)
    found = recognise({k: tuple(v.shape) for k, v in weights.items()}, {}, "a.safetensors")
    assert (found.layout, found.family) == ("LDM single file", family)
    assert (found.text_encoder, found.vae) == (text_encoder, vae)
    assert ("CLIP" in found.summary(), "VAE" in found.summary()) == (text_encoder, vae)


def test_the_recipe_in_the_file_outweighs_its_name(tmp_path: Path) -> None:
    own = recipe(family="sdxl", prediction="eps", timesteps=(999,), noise_scale=1.0, license="MIT")
    metadata = own.to_metadata("title", (4, 128, 128))
    path = tmp_path / "dmd2_sdxl_4step_lora.safetensors"
    found = found_in(write(path, publishers.kohya_lora("sdxl"), metadata))
    assert (found.recipe, found.license) == (own, "MIT")


def test_a_licence_in_the_metadata_of_a_foreign_file_is_shown(tmp_path: Path) -> None:
    metadata = {"modelspec.license": "OpenRAIL++-M"}
    path = write(tmp_path / "a.safetensors", publishers.diffusers_unet("sdxl"), metadata)
    assert found_in(path).summary().endswith("licence OpenRAIL++-M")


def test_what_a_licence_would_do_to_a_terminal_is_written_out(tmp_path: Path) -> None:
    metadata = {"modelspec.license": "\x1b[31mMIT\x07"}
    path = write(tmp_path / "a.safetensors", publishers.diffusers_unet("sdxl"), metadata)
    assert found_in(path).summary().endswith(r"licence \x1b[31mMIT\x07")


def flow_recipe(family: str = "SD3") -> Recipe:
    """A recipe of a student made in ComfyUI, of a family that ComfyUI alone has."""
    return recipe(family=family, prediction="flow", noise_scale=1.0, license="MIT")


FLOW_LORA = {
    f"lora_unet_joint_blocks_0_x_block_attn_qkv.{part}": torch.zeros(shape)
    for part, shape in (("lora_down.weight", (2, 8)), ("lora_up.weight", (8, 2)), ("alpha", ()))
}
FLOW_MODEL = {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": torch.zeros(8, 8)}


@pytest.mark.parametrize(
    ("weights", "kind", "told"),
    [
        (FLOW_LORA, "LoRA", "kohya LoRA"),
        (FLOW_MODEL, "checkpoint", "diffusion model"),
        (FLOW_MODEL | {"vae.x": torch.zeros(1)}, "checkpoint", "single file with VAE"),
        (
            FLOW_MODEL
            | {"text_encoders.clip_l.x": torch.zeros(1), "first_stage_model.x": torch.zeros(1)},
            "checkpoint",
            "single file with CLIP and VAE",
        ),
    ],
)
def test_a_student_of_a_family_of_comfyuis_is_recognised_by_the_recipe_in_its_file(
    tmp_path: Path, weights: dict[str, torch.Tensor], kind: str, told: str
) -> None:
    metadata = flow_recipe().to_metadata("title", (16, 64, 64))
    found = found_in(write(tmp_path / "a.safetensors", weights, metadata), kind)
    assert (found.kind, found.family, found.recipe) == (kind, "SD3", flow_recipe())
    assert found.summary() == f"SD3, {told}: 1 step at t = 999; licence MIT"


def test_without_its_recipe_such_a_file_is_anybodys_and_refused(tmp_path: Path) -> None:
    assert "a LoRA for another model" in refused(write(tmp_path / "a.safetensors", FLOW_LORA))
    assert "an SD3 model" in refused(write(tmp_path / "b.safetensors", FLOW_MODEL))


@pytest.mark.parametrize(
    "weights",
    [
        {"lora_unet_joint_blocks_0_x_block_attn_qkv.hada_w1_a": torch.zeros(2, 8)},
        FLOW_LORA | {"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.zeros(())},
        {"joint_blocks.0.x_block.attn.qkv.weight": torch.zeros(8, 8)},
    ],
    ids=["LyCORIS", "a text encoder's too", "no prefix"],
)
def test_a_recipe_in_a_layout_that_is_not_ours_does_not_help(
    tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    metadata = flow_recipe().to_metadata("title", (16, 64, 64))
    refused(write(tmp_path / "a.safetensors", weights, metadata))


def test_widths_like_stable_diffusions_do_not_outweigh_another_family_in_the_recipe(
    tmp_path: Path,
) -> None:
    own = recipe(family="SD15_instructpix2pix", prediction="eps", noise_scale=1.0)
    metadata = own.to_metadata("title", (4, 64, 64))
    found = found_in(write(tmp_path / "a.safetensors", publishers.kohya_lora("sd1"), metadata))
    assert found.family == "SD15_instructpix2pix"


@pytest.mark.parametrize("weights", [FLOW_LORA, FLOW_MODEL], ids=["LoRA", "checkpoint"])
def test_a_student_of_a_family_of_comfyuis_is_sent_there_by_the_command_line(
    tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    metadata = flow_recipe().to_metadata("title", (16, 64, 64))
    path = write(tmp_path / "a.safetensors", weights, metadata)
    with pytest.raises(UserError) as caught:
        load(str(path), torch.device("cpu"))
    message = str(caught.value)
    assert message.startswith(f"{path}: a student of SD3, which ComfyUI has")
    assert "\n" not in message
    config = make_config({"teacher": str(path), "output": "unused"}, "test")
    with pytest.raises(UserError, match=str(path)) as caught:
        load_teacher(config, torch.device("cpu"))
    assert "\n" not in str(caught.value)


def test_our_students_and_teachers_are_told_apart_by_the_recipe(tmp_path: Path) -> None:
    network = digits_network()
    save(tmp_path / "teacher.safetensors", network)
    own = recipe(family="digits", license="Apache-2.0")
    write_student(tmp_path / "student.safetensors", network, own)
    teacher = found_in(tmp_path / "teacher.safetensors", "checkpoint")
    student = found_in(tmp_path / "student.safetensors", "checkpoint")
    assert (teacher.layout, teacher.recipe, teacher.license) == (
        "our teacher",
        None,
        network.license,
    )
    assert (student.layout, student.family, student.recipe) == ("our student", "digits", own)


def test_a_damaged_recipe_or_description_is_refused(tmp_path: Path) -> None:
    weights = publishers.diffusers_unet("sd1")
    bad = json.dumps({"family": "sd1", "timesteps": []})
    refused(write(tmp_path / "a.safetensors", weights, {RECIPE_KEY: bad}))
    assert "damaged" in refused(write(tmp_path / "b.safetensors", weights, {"dmd.network": "[]"}))


@pytest.mark.parametrize(
    ("weights", "told"), publishers.FOREIGN.values(), ids=publishers.FOREIGN.keys()
)
@pytest.mark.parametrize("wanted", ["checkpoint", "LoRA"])
def test_a_foreign_file_is_refused_by_its_own_name_with_some_of_its_keys(
    tmp_path: Path, weights: dict[str, torch.Tensor], told: str, wanted: str
) -> None:
    message = refused(write(tmp_path / "pytorch_model_1.bin", weights), wanted)
    assert told in message
    assert next(iter(weights)) in message
    assert "Give a" in message and "SDXL" in message


def test_a_lora_given_as_checkpoint_is_sent_to_where_such_are_opened_and_the_reverse(
    tmp_path: Path,
) -> None:
    lora = write(tmp_path / "lora.safetensors", publishers.kohya_lora("sdxl"))
    assert "a LoRA, not a checkpoint (keys such as lora_unet_" in refused(lora, "checkpoint")
    unet = write(tmp_path / "unet.bin", publishers.diffusers_unet("sdxl"))
    assert "a checkpoint, not a LoRA (keys such as conv_in.weight" in refused(unet, "LoRA")
    assert refused(unet, "LoRA", elsewhere="Open it there.").endswith("). Open it there.")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrapped", [True, False], ids=["state_dict inside", "bare"])
def test_both_pickle_formats_give_the_same_weights_as_safetensors(
    tmp_path: Path, zipped: bool, wrapped: bool
) -> None:
    weights = publishers.diffusers_unet("sd1")
    path = tmp_path / "a.ckpt"
    content = {"state_dict": weights, "global_step": 3} if wrapped else weights
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    read, metadata = read_weights(path)
    same, _ = read_weights(write(tmp_path / "a.safetensors", weights))
    assert read.keys() == same.keys() == peek(path)[0].keys() and metadata == {}
    assert all(read[key].equal(same[key]) for key in same)
    assert peek(path)[0] == peek(tmp_path / "a.safetensors")[0]


class MakesAFile:
    """Unpickled, it would create `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain pickle", "named safetensors"])
def test_a_pickle_that_holds_code_is_refused_and_nothing_runs(tmp_path: Path, kind: str) -> None:
    trace, path = tmp_path / "trace", tmp_path / "evil.bin"
    evil = {"conv_in.weight": torch.zeros(2), "x": MakesAFile(trace)}
    if kind == "plain pickle":
        path.write_bytes(pickle.dumps(evil, protocol=2))
    elif kind == "named safetensors":
        path = tmp_path / "evil.safetensors"
        torch.save(evil, path)
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=kind == "zip")
    message = refused(path)
    assert "code" in message and "safetensors" in message
    with pytest.raises(UserError):
        read_weights(path)
    assert not trace.exists()
    with suppress(Exception):
        torch.load(path.rename(tmp_path / "trusted.pt"), weights_only=False)  # was the trap live?
    assert trace.exists()


def test_a_module_pickled_whole_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pt")
    assert "holds code or objects" in refused(tmp_path / "whole.pt")


@pytest.mark.parametrize("name", ["a.bin", "legacy.pt", "a.safetensors"])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "legacy.pt":
        torch.save(publishers.ldm_unet("sd1"), path, _use_new_zipfile_serialization=False)
    else:
        write(path, publishers.ldm_unet("sd1"))
    whole = path.read_bytes()
    for length in [0, 1, 2, 3, 9, 50, 400, *range(1000, len(whole) - 1, 4001), len(whole) - 1]:
        path.write_bytes(whole[:length])
        message = refused(path)
        assert "again" in message or TORCH < (2, 6), length  # which takes half a one for code
        with pytest.raises(UserError):
            read_weights(path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"<!DOCTYPE html><html>Not found</html>", "not a PyTorch file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a PyTorch file"),
        (b"PK\x03\x04 a zip of something else", "not a whole PyTorch file"),
    ],
)
def test_what_a_failed_download_leaves_is_refused(
    tmp_path: Path, content: bytes, told: str
) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    assert told in refused(tmp_path / "pytorch_model.bin")


def test_the_other_files_of_a_training_folder_are_refused(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([weight])
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.bin")
    assert "an optimiser's state" in refused(tmp_path / "optimizer.bin")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    torch.save(scheduler.state_dict(), tmp_path / "scheduler.bin")
    assert "not a model's state dict (keys such as base_lrs" in refused(tmp_path / "scheduler.bin")
    torch.save({0: torch.zeros(2)}, tmp_path / "numbered.pt")
    assert "not a model's state dict" in refused(tmp_path / "numbered.pt")
    torch.save(torch.zeros(2), tmp_path / "tensor.pt")
    assert "not a model's state dict (keys such as none)" in refused(tmp_path / "tensor.pt")


@pytest.mark.parametrize("name", ["a.bin", "a.safetensors"])
def test_a_file_without_weights_or_no_file_is_refused(tmp_path: Path, name: str) -> None:
    assert "no such file" in refused(tmp_path / name)
    assert "empty" in refused(write(tmp_path / name, {}))


def test_peeking_at_eight_gigabytes_reads_only_the_header(tmp_path: Path) -> None:
    size = 8 * 2**30
    header = {"conv_in.weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    start = json.dumps(header).encode()
    with (tmp_path / "big.safetensors").open("wb") as file:
        file.write(len(start).to_bytes(8, "little") + start)
        file.truncate(8 + len(start) + size)  # sparse: takes no room
    before = _resident()
    assert peek(tmp_path / "big.safetensors")[0] == {"conv_in.weight": (size,)}
    assert _resident() - before < 2**28


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_presets_are_the_published_timesteps_from_unit_noise() -> None:
    assert {name: preset.timesteps for name, preset in RECIPES.items()} == {
        "SD 1.5, 1 step": (999,),
        "SDXL, 1 step (t = 399)": (399,),
        "SDXL, 2 steps": (999, 499),
        "SDXL, 3 steps": (999, 749, 499),
        "SDXL, 4 steps": FOUR,
    }
    assert {(preset.noise_scale, preset.prediction) for preset in RECIPES.values()} == {
        (1.0, "eps")
    }
