"""Files that anybody may have made: each refusal is one line that names the file and what is wrong.

`test_fuzz.py` tries a thousand drawn at random; these are the ones that were wrong.
"""

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.adm import adm_state
from kit.sd_files import micro_pipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from dmd_train.errors import UserError
from dmd_train.files.read import hash_of, peek, read_weights
from dmd_train.method.lora import merge_lora
from dmd_train.method.recipe import LICENSE, RECIPE_KEY, Recipe, pixels_of, read_recipe
from dmd_train.networks.edm_unet import edm_unet
from dmd_train.networks.load import load, save
from dmd_train.networks.recognise import recognise

CPU = torch.device("cpu")
RECIPE = Recipe(family="sd1", prediction="eps", timesteps=(499,), noise_scale=1.0)
SMALL: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "mid_block_type": None,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def refused(do: Callable[[], object], *words: str) -> None:
    with pytest.raises(UserError) as caught:
        do()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    for word in words:
        assert word in message


# ---- bytes


@pytest.mark.parametrize("name", ["model.safetensors", "model.bin"])
@pytest.mark.parametrize(
    ("make", "word"),
    [
        (Path.mkdir, "a folder"),
        (os.mkfifo, "a pipe or a device"),
        (lambda path: path.symlink_to("/dev/zero"), "a pipe or a device"),
        (lambda path: path.symlink_to(path), "no such file"),
        (lambda path: path.symlink_to("/proc/self/mem"), "cannot be read"),
    ],
)
def test_what_is_no_file_is_refused_before_it_is_opened(
    name: str, make: Callable[[Path], None], word: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    make(path)
    for read in (peek, read_weights, hash_of):
        refused(lambda read=read: read(path), str(path), word)


@pytest.mark.parametrize("length", [300, 5000])
def test_a_name_that_is_too_long_is_no_such_file(length: int) -> None:
    refused(lambda: load("x" * length + ".safetensors", CPU), "no such file")


def test_a_header_of_many_megabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(1)}, path, {"note": "x" * (17 << 20)})
    refused(lambda: peek(path), "its header has")


def test_a_pickle_of_an_old_protocol_is_read_without_a_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path = tmp_path / "model.bin"
    torch.save({"x": torch.ones(2)}, path, pickle_protocol=3)
    assert read_weights(path)[0]["x"].tolist() == [1, 1]
    assert not recwarn.list


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (torch.zeros(1).expand(10**11), "x repeats its values"),
        (torch.empty(10**9, 10**3, device="meta"), "not a model's state dict"),
        (
            torch.sparse_coo_tensor(size=(10**6, 10**6), check_invariants=True),
            "not a model's state dict",
        ),
    ],
    ids=["repeated", "without values", "sparse"],
)
def test_a_pickled_tensor_larger_than_its_file_is_refused(
    value: Tensor, word: str, tmp_path: Path
) -> None:
    torch.save({"x": value}, tmp_path / "model.bin")
    refused(lambda: read_weights(tmp_path / "model.bin"), word)


def test_a_pickle_that_would_grow_a_thousandfold_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b" " * 10_000_000)
    refused(lambda: read_weights(path), "not a whole PyTorch file")


# ---- what a file says of itself


@pytest.mark.parametrize(
    "changes",
    [
        {"timesteps": list(range(2_000_000, 0, -1))},
        {"license": "x" * 5_000_000},
        {"teacher": "x" * 5_000_000},
        {"x" * 1_000_000: 1},
        {"timesteps": [10**4000]},
        {"baked_guidance": 1e300},
    ],
    ids=["timesteps", "licence", "teacher", "key", "digits", "guidance"],
)
def test_a_recipe_of_megabytes_is_refused_in_a_short_line(changes: dict[str, Any]) -> None:
    text = json.dumps(json.loads(RECIPE.model_dump_json()) | changes)
    refused(lambda: read_recipe({RECIPE_KEY: text}, "some/file"), "some/file: its recipe")


def test_a_licence_of_megabytes_is_cut_where_a_student_would_carry_it() -> None:
    shapes = {
        "lora_unet_x_attn2_to_k.lora_down.weight": (4, 768),
        "lora_unet_x_attn2_to_k.lora_up.weight": (320, 4),
    }
    found = recognise(shapes, {"modelspec.license": "x" * 5_000_000}, "some/file")
    assert len(found.license) == LICENSE
    assert len(found.summary()) < 300
    assert RECIPE.model_copy(update={"license": found.license}) == Recipe.model_validate_json(
        RECIPE.model_copy(update={"license": found.license}).model_dump_json()
    )


@pytest.mark.parametrize("size", ["1x1", "99999999999x99999999999", "null", "", "9" * 5000])
def test_a_size_that_no_model_draws_is_refused(size: str) -> None:
    refused(lambda: pixels_of({"modelspec.resolution": size}, "some/file"), "8 to 8192 pixels")


@pytest.fixture
def described(tmp_path: Path) -> Callable[..., str]:
    """A small network's file with changes to what it says: of itself, and of its settings."""

    def write(settings: dict[str, Any], /, **changes: Any) -> str:
        path = tmp_path / "network.safetensors"
        network = edm_unet(3, **SMALL)
        save(path, network)
        tensors, about = read_weights(path)
        values = json.loads(about["dmd.network"])
        values["config"] |= settings
        values |= changes
        save_file(tensors, path, about | {"dmd.network": json.dumps(values)})
        return str(path)

    return write


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ({}, {"classes": -2}),
        ({}, {"classes": 10**12}),
        ({}, {"sigma_data": 0}),
        ({}, {"sigma_data": float("inf")}),
        ({}, {"config": [1]}),
        ({"layers_per_block": 10**9}, {}),
        ({"block_out_channels": [10**9]}, {}),
        ({"block_out_channels": "many"}, {}),
        ({"down_block_types": ["KDownBlock2D"]}, {}),
        ({"unknown": 1}, {}),
        ({"sample_size": 10**6}, {}),
        ({"norm_num_groups": None}, {}),
    ],
)
def test_a_description_out_of_bounds_is_refused_by_the_setting(
    config: dict[str, Any], changes: dict[str, Any], described: Callable[..., str]
) -> None:
    file = described(config, **changes)
    name = next(iter(config | changes))
    refused(lambda: load(file, CPU), file, "its metadata dmd.network is damaged", name)


def test_a_description_nested_deep_is_refused() -> None:
    deep = {"dmd.network": '{"a":' * 100_000}
    refused(lambda: recognise({"x": (1,)}, deep, "some/file"), "some/file", "damaged")


def test_a_description_of_terabytes_is_held_against_the_weights_before_memory_is_taken(
    described: Callable[..., str],
) -> None:
    huge = {"block_out_channels": [65536] * 4, "layers_per_block": 8}
    huge |= {"down_block_types": ["DownBlock2D"] * 4, "up_block_types": ["UpBlock2D"] * 4}
    file = described(huge)
    refused(lambda: load(file, CPU), file, "its weights do not fit its network")


# ---- shapes and kinds of tensors


@pytest.mark.parametrize("value", [torch.tensor(1.0), torch.ones(5)], ids=["scalar", "vector"])
@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_x_attn2_to_k.lora_down.weight",
        "model.diffusion_model.output_blocks.3.1.transformer_blocks.0.attn2.to_k.weight",
    ],
)
def test_a_file_whose_telling_weight_is_no_matrix_is_refused_by_its_name(
    key: str, value: Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({key: value}, path)
    own = key.removeprefix("model.diffusion_model.")
    refused(lambda: load(str(path), CPU), str(path), own, "no layer's")


@pytest.mark.parametrize(
    "changes",
    [
        {"down": torch.tensor(1.0)},
        {"down": torch.ones(4)},
        {"up": torch.tensor(1.0)},
        {"up": torch.ones(6)},
        {"down": torch.ones(0, 4), "up": torch.ones(6, 0)},
        {"down": torch.ones(2, 4, 3, 3)},
        {"up": torch.ones(6, 2, dtype=torch.int8)},
        {"alpha": torch.ones(3)},
        {"alpha": torch.ones(0)},
        {"alpha": torch.tensor(float("nan"))},
        {"alpha": torch.tensor(1j)},
    ],
)
def test_a_lora_of_other_shapes_is_refused_and_changes_nothing(changes: dict[str, Tensor]) -> None:
    module = nn.Sequential(nn.Linear(4, 6, bias=False))
    before = module[0].weight.clone()
    parts = {"down": torch.ones(2, 4), "up": torch.ones(6, 2), "alpha": torch.tensor(1.0)} | changes
    names = {"down": "lora_down.weight", "up": "lora_up.weight", "alpha": "alpha"}
    tensors = {f"lora_unet_0.{names[part]}": value for part, value in parts.items()}
    refused(lambda: merge_lora(module, tensors, "some/file"), "some/file", "lora_unet_0")
    assert torch.equal(module[0].weight, before)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.map_label.weight", torch.tensor(1.0)),
        ("model.enc.8x8_conv.weight", torch.ones(128)),
        ("model.enc.8x8_block0.conv0.weight", torch.tensor(1.0)),
        ("model.enc.x", torch.ones(2, 2)),
        ("model.enc.99999999999x9_block0.conv0.weight", torch.ones(128, 1)),
        ("model.out_conv.bias", torch.ones(3, dtype=torch.int8)),
    ],
)
def test_an_edm_file_of_other_tensors_is_refused(key: str, value: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(adm_state(8, [128], 1, set(), 10) | {key: value}, path)
    refused(lambda: load(str(path), CPU), str(path))


# ---- folders


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro_pipeline(tmp_path_factory.mktemp("whole"))


CONFIGS = (
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
)


@pytest.mark.parametrize(
    "text",
    [b"", b"null", b"[]", b"5", b"\xff\x00", b"[" * 100_000, b'{"x": "' + b"x" * 5_000_000 + b'"}'],
    ids=["empty", "null", "list", "number", "binary", "deep", "huge"],
)
@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_that_is_no_settings_is_refused_by_its_name(
    config: str, text: bytes, whole: Path
) -> None:
    path = whole / config
    before = path.read_bytes()
    path.write_bytes(text)
    try:
        refused(lambda: load(str(whole), CPU), str(path), "damaged")
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ("vae/config.json", {"_class_name": None}),
        ("vae/config.json", {"scaling_factor": 0}),
        ("vae/config.json", {"block_out_channels": [8] * 1000}),
        ("unet/config.json", {"sample_size": 10**9}),
        ("unet/config.json", {"layers_per_block": 10**9}),
        ("unet/config.json", {"transformer_layers_per_block": [10**9, 1]}),
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}),
        ("text_encoder/config.json", {"max_position_embeddings": 10**9}),
    ],
)
def test_a_setting_of_a_folder_out_of_bounds_is_refused_by_its_name(
    config: str, settings: dict[str, Any], whole: Path
) -> None:
    path = whole / config
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | settings))
    try:
        refused(lambda: load(str(whole), CPU), str(path), next(iter(settings)))
    finally:
        path.write_text(before)


def test_a_tokenizer_that_comes_with_code_is_not_asked_about(
    whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = whole / "tokenizer/tokenizer_config.json"
    before = path.read_text()
    code = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    path.write_text(json.dumps({"auto_map": code, "tokenizer_class": "Evil"}))
    (whole / "tokenizer/evil.py").write_text("raise SystemExit('executed')")
    try:
        load(str(whole), CPU)
    except UserError:
        pass
    finally:
        path.write_text(before)
        (whole / "tokenizer/evil.py").unlink()
    assert "executed" not in "".join(capfd.readouterr())


def test_parts_of_two_models_are_refused_by_what_does_not_fit(whole: Path, tmp_path: Path) -> None:
    mixed = shutil.copytree(whole, tmp_path / "mixed")
    other = micro_pipeline(tmp_path / "other", "sd2")
    shutil.rmtree(mixed / "text_encoder")
    shutil.copytree(other / "text_encoder", mixed / "text_encoder")
    refused(lambda: load(str(mixed), CPU), str(mixed), "768 numbers of text and is given 1024")
