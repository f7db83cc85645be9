"""What an export says of itself, and in which numbers it is kept."""

from __future__ import annotations

import hashlib

import pytest
from kit.checkpoints import UNET
from kit.exported import (
    EXACT,
    FOLDERS,
    LICENSE,
    OFF,
    TYPES,
    Trained,
    Ways,
    by_sample,
)
from kit.graphs import error
from safetensors import safe_open

from dmd_train.method.recipe import Recipe


def test_lora_unet_and_checkpoint_in_fp32_are_one_student_and_bf16_is_near_it(
    trained: Trained,
) -> None:
    run = trained("sd15")
    lora, *others = (by_sample(run.export(form, "fp32")) for form in FOLDERS)
    errors = [error(other, lora) for other in others]
    rounding = error(by_sample(run.export("lora", "bf16")), lora)
    print("fp32", errors, "bf16", rounding)
    assert max(errors) <= 1e-5
    assert 0 < rounding <= OFF


@pytest.mark.parametrize(
    ("form", "dtype"),
    [("lora", "fp32"), ("lora", "bf16"), ("unet", "bf16"), ("checkpoint", "bf16")],
)
def test_exports_of_other_dtypes_draw_in_stock_nodes_what_sample_draws(
    trained: Trained, form: str, dtype: str
) -> None:
    run = trained("sd15")
    file = run.export(form, dtype)
    ways = Ways(run)
    match form:
        case "lora":
            model = ways.stock_lora(ways.teacher(), file)
        case "unet":
            model = ways.graph.add("UNETLoader", unet_name=file.name, weight_dtype="default")
        case _:
            model = ways.graph.add("CheckpointLoaderSimple", ckpt_name=file.name)
    ways.ksampler(f"{form} {dtype}", model)
    assert max(ways.errors(by_sample(file)).values()) <= EXACT


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("form", FOLDERS)
def test_every_export_is_of_its_dtype_and_names_recipe_teacher_and_licence(
    trained: Trained, form: str, dtype: str
) -> None:
    run = trained("sd15")
    with safe_open(run.export(form, dtype), "pt") as file:
        metadata = file.metadata()
        own = [key for key in list(file.keys()) if form == "lora" or key.startswith(UNET)]
        assert {file.get_tensor(key).dtype for key in own} == {TYPES[dtype]}
    assert Recipe.model_validate_json(metadata["dmd.recipe"]) == Recipe(
        family="sd1",
        prediction="eps",
        timesteps=(999,),
        noise_scale=1.0,
        baked_guidance=3.0,
        teacher=run.teacher.stem,
        teacher_sha256=hashlib.sha256(run.teacher.read_bytes()).hexdigest(),
        license=LICENSE,
    )
    assert metadata["modelspec.license"] == LICENSE
    assert metadata["modelspec.resolution"] == "64x64"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sd15", {"ss_base_model_version": "sd_v1"}),
        ("sd2v", {"ss_base_model_version": "sd_v2", "ss_v2": "True"}),
        ("sdxl", {"ss_base_model_version": "sdxl_base_v1-0"}),
    ],
)
def test_a_lora_says_its_family_as_a1111_and_forge_read_it(
    trained: Trained, name: str, expected: dict[str, str]
) -> None:
    """They list any other file with metadata as one for SD 1, and hide it beside SDXL."""
    with safe_open(trained(name).export("lora"), "pt") as file:
        metadata = file.metadata()
    assert {key: value for key, value in metadata.items() if key.startswith("ss_")} == expected
