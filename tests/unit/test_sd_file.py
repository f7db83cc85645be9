"""Stable Diffusion from one file or a folder: the same parts that other code makes of it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from kit.checkpoints import UNET, _ldm_names, as_diffusers_unet
from kit.clip_layout import PARTS, clip_shapes
from kit.publishers import FOREIGN, diffusers_unet, kohya_lora
from kit.sd_files import TINY, Tiny, write_scheduler
from kit.tiny import recipe
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmd_train.errors import UserError
from dmd_train.method.recipe import RECIPE_KEY
from dmd_train.networks import sd_layout, text
from dmd_train.networks.sd_load import open_sd

OPENED = {
    "sd15": ("sd1", "eps", 512, 0.18215),
    "sd2-eps": ("sd2", "eps", 512, 0.18215),
    "sd2-v": ("sd2", "v", 768, 0.18215),
    "sdxl": ("sdxl", "eps", 1024, 0.13025),
}
WITH_CLIP = ("sd15", "sd2-eps", "sdxl")
PROMPTS = ["A photo of a cat, 8k", "", "word " * 100]
Weights = dict[str, Tensor]


def refused(path: Path, read: Callable[[Path], Any] = open_sd) -> str:
    """The one line that the user reads."""
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 600
    return message


def denoised(unet: UNet2DConditionModel) -> Tensor:
    """Its output on fixed noise, in float32."""
    random = torch.Generator().manual_seed(0)
    width = unet.config.cross_attention_dim
    latent = torch.randn(1, 4, 8, 8, generator=random)
    added = {
        "text_embeds": torch.randn(1, 1280, generator=random),
        "time_ids": torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]),
    }
    context = torch.randn(1, 77, width, generator=random)
    with torch.no_grad():
        out: Tensor = unet.float()(latent, 500, context, added_cond_kwargs=added).sample
    return out


@pytest.mark.parametrize("name", TINY)
def test_the_unet_of_a_single_file_is_the_one_it_was_made_from(name: str, tiny: Tiny) -> None:
    opened = open_sd(tiny(name))
    said = (opened.family, opened.prediction, opened.native_size, opened.latent_scale)
    assert said == OPENED[name]
    unet, expected = opened.unet(), as_diffusers_unet(tiny(name))
    assert unet.dtype == torch.float16 and not unet.training
    own = unet.state_dict()
    assert own.keys() == expected.state_dict().keys()
    assert all(torch.equal(own[k].float(), value) for k, value in expected.state_dict().items())
    torch.testing.assert_close(denoised(unet), denoised(expected), rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["no prefix", "diffusers", "pickle"])
def test_a_bare_unet_and_a_pickle_hold_the_same_unet(
    layout: str, tiny: Tiny, tmp_path: Path
) -> None:
    weights = load_file(tiny("sd2-v"))
    if layout == "no prefix":
        weights = {k.removeprefix(UNET): v for k, v in weights.items() if k.startswith(UNET)}
    if layout == "diffusers":
        weights = open_sd(tiny("sd2-v")).unet().state_dict()
    path = tmp_path / ("x.ckpt" if layout == "pickle" else "x.safetensors")
    if layout == "pickle":
        ema = {f"model_ema.{i}": torch.zeros(1) for i in range(200)}
        torch.save({"state_dict": weights | ema, "global_step": 1}, path)
    else:
        save_file(weights, path)
    opened = open_sd(path)
    assert (opened.family, opened.prediction) == ("sd2", "v")
    own = opened.unet().state_dict()
    for key, value in open_sd(tiny("sd2-v")).unet().state_dict().items():
        assert torch.equal(own[key], value), key
    if layout != "pickle":
        assert opened.vae() is None
        assert "no text encoder" in refused(path, lambda path: open_sd(path).text_encoder())


FULL: dict[str, dict[str, Any]] = {
    "SD 1.5": {
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "SD 2.1": {
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
    "SDXL": {
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
FULL["SSD-1B"] = FULL["SDXL"] | {
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": [1, 2, 4],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
}
FULL["BK-SDM-Tiny"] = FULL["SD 1.5"] | {
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 1,
    "mid_block_type": None,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3,
    "up_block_types": ["CrossAttnUpBlock2D"] * 3,
}
"""The publishers' config.json, less what is diffusers' default."""


@pytest.mark.parametrize("name", FULL)
def test_the_config_read_off_a_real_unet_is_its_publishers(name: str) -> None:
    with torch.device("meta"):
        official = UNet2DConditionModel(sample_size=64, **FULL[name])
    state = official.state_dict()
    weights = {UNET + ldm: state[key] for key, ldm in _ldm_names(official).items()}
    derived = sd_layout.unet(weights, sample_size=64)

    def plain(config: Any) -> dict[str, Any]:
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in config.items()
            if not key.startswith("_")
        }

    assert plain(derived.config) == plain(official.config)
    heads = [
        [module.heads for module in unet.modules() if isinstance(module, Attention)]
        for unet in (official, derived)
    ]
    assert heads[0] == heads[1] and len(heads[0]) > 4


def ldm_vae_name(key: str, levels: int) -> str:
    key = re.sub(r"\.resnets\.(\d+)", r".block.\1", key)
    key = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", key)
    key = re.sub(r"mid_block\.block\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    for ours, theirs in {
        "down_blocks": "down",
        "conv_shortcut": "nin_shortcut",
        "downsamplers.0": "downsample",
        "upsamplers.0": "upsample",
        "mid_block.attentions.0": "mid.attn_1",
        "group_norm": "norm",
        "to_out.0": "proj_out",
        "to_": "",
        "conv_norm_out": "norm_out",
    }.items():
        key = key.replace(ours, theirs)
    return sd_layout.VAE + key


def test_the_vae_of_a_single_file_decodes_and_encodes_like_the_one_it_was_made_from() -> None:
    torch.manual_seed(0)
    expected = AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
    ).eval()
    weights = {
        ldm_vae_name(key, 3): value[..., None, None]  # LDM's attention is of 1x1 convolutions
        if value.ndim == 2 and ".attentions." in key
        else value
        for key, value in expected.state_dict().items()
    }
    vae = sd_layout.vae(weights, 0.13025)
    assert vae.config.scaling_factor == 0.13025
    image, latent = torch.randn(1, 3, 16, 16), torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        assert torch.equal(vae.decode(latent).sample, expected.decode(latent).sample)
        found, wanted = vae.encode(image).latent_dist, expected.encode(image).latent_dist
    assert torch.equal(found.mean, wanted.mean)


def test_taesd_in_a_checkpoint_is_diffusers_autoencoder_tiny(tiny: Tiny) -> None:
    vae, weights = open_sd(tiny("sd15")).vae(), load_file(tiny("sd15"))
    assert isinstance(vae, AutoencoderTiny)
    for ours, theirs in {
        "encoder.layers.0.weight": "taesd_encoder.0.weight",
        "decoder.layers.0.weight": "taesd_decoder.1.weight",
    }.items():
        assert torch.equal(vae.state_dict()[ours], weights[sd_layout.VAE + theirs])


def by_transformers(folder: Path) -> Weights:
    """The conditions of PROMPTS as diffusers' pipelines make them of a folder."""
    states, found = [], {}
    for suffix in ("", "_2"):
        if not (folder / f"text_encoder{suffix}").exists():
            continue
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / f"tokenizer{suffix}")
        name = "CLIPTextModelWithProjection" if suffix else "CLIPTextModel"
        model = getattr(transformers, name).from_pretrained(folder / f"text_encoder{suffix}")
        ids = tokenizer(
            PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        with torch.no_grad():
            out = model.float()(ids, output_hidden_states=True)
        if (folder / "text_encoder_2").exists():
            states.append(out.hidden_states[-2])
        else:
            states.append(out.last_hidden_state)
        if suffix:
            found["pooled"] = out.text_embeds
    return {"text": torch.cat(states, dim=-1)} | found


@pytest.mark.parametrize("name", WITH_CLIP)
def test_a_file_and_its_folder_have_the_same_parts_as_transformers_makes_of_it(
    name: str, tiny: Tiny, pipeline: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    expected = by_transformers(pipeline(name))
    caplog.clear()
    file, folder = open_sd(tiny(name)), open_sd(pipeline(name))
    assert (folder.family, folder.prediction) == (file.family, file.prediction)
    for opened in (file, folder):
        encoder = opened.text_encoder()
        found = encoder.encode(PROMPTS)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key].dtype == torch.float32 and found[key].shape == value.shape
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6)
        assert encoder.too_long(PROMPTS) == [2]
    ours, theirs = file.unet().state_dict(), folder.unet().state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert isinstance(folder.vae(), AutoencoderTiny) and folder.latent_scale == 1
    assert folder.native_size == 8 * 8
    assert not caplog.records


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("", []),
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        (
            "Café crème, naïve façade",
            [15304, 1075, 12138, 614, 267, 1097, 35689, 563, 778, 10067, 1928],
        ),
        ("🐱🐶 日本語", [35710, 10631, 39121, 44353, 34002, 508]),
        ("don't 8k!!", [847, 713, 279, 330, 748]),
    ],
)
def test_prompts_become_the_tokens_that_openais_files_give(prompt: str, tokens: list[int]) -> None:
    assert text.shipped_tokens([prompt]) == [[49406, *tokens, 49407]]


@pytest.mark.parametrize(
    ("context", "depths", "read"),
    [(768, [12], [12]), (1024, [24], [23]), (2048, [12, 32], [12, 32])],
)
def test_text_encoders_of_full_depth_are_read_to_the_layer_that_their_family_uses(
    context: int, depths: list[int], read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [
        (prefix, width, depth)
        for (prefix, width, _), depth in zip(PARTS[context], depths, strict=True)
    ]
    monkeypatch.setitem(PARTS, context, parts)
    weights = {key: torch.empty(s, device="meta") for key, s in clip_shapes(context).items()}
    family = {768: "sd1", 1024: "sd2", 2048: "sdxl"}[context]
    modules: list[Any] = text.from_ldm(weights, family).modules
    assert [module.config.num_hidden_layers for module in modules] == read
    assert [module.config.num_attention_heads * 64 for module in modules] == [
        width for _, width, _ in parts
    ]


def test_an_exclamation_mark_is_not_the_padding_that_a_folder_says_it_is(
    tiny: Tiny, pipeline: Tiny
) -> None:
    by_file, by_folder = (
        open_sd(path).text_encoder().encode(["hello!"])["text"]
        for path in (tiny("sd2-eps"), pipeline("sd2-eps"))
    )
    torch.testing.assert_close(by_file, by_folder, rtol=0, atol=1e-6)


def test_a_prompt_of_77_tokens_is_not_too_long_and_one_of_78_loses_its_last_word(
    tiny: Tiny,
) -> None:
    encoder = open_sd(tiny("sd15")).text_encoder()
    fits, cut = " ".join(["cat"] * 75), " ".join(["cat"] * 75 + ["dog"])
    assert encoder.too_long([fits, cut]) == [1]
    both = encoder.encode([fits, cut])["text"]
    assert torch.equal(both[0], both[1])


@pytest.mark.parametrize(
    ("family", "extra", "metadata", "prediction"),
    [
        ("sd1", [], {}, "eps"),
        ("sdxl", [], {"modelspec.prediction_type": "epsilon"}, "eps"),
        ("sdxl", [], {"modelspec.prediction_type": "v"}, "v"),
        ("sdxl", ["v_pred"], {}, "v"),
    ],
)
def test_a_key_or_the_metadata_tells_a_v_model(
    family: str, extra: list[str], metadata: dict[str, str], prediction: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    weights = diffusers_unet(family) | {key: torch.zeros(1) for key in extra}
    save_file(weights, path, metadata)
    assert open_sd(path).prediction == prediction


SD1 = diffusers_unet("sd1")


@pytest.mark.parametrize(
    ("weights", "metadata", "words"),
    [
        (kohya_lora("sd1"), {}, "a LoRA"),
        (diffusers_unet("sd1", in_channels=9), {}, "inpainting model, of 9 input channels"),
        (FOREIGN["VAE"][0], {}, "a VAE"),
        (FOREIGN["SD3"][0], {}, "SD3"),
        (FOREIGN["Flux"][0], {}, "Flux"),
        (SD1, {RECIPE_KEY: recipe(prediction="eps").model_dump_json()}, "a 1-step student"),
        (SD1, {"modelspec.prediction_type": "sample"}, "predicts 'sample'"),
        (SD1 | {"ztsnr": torch.zeros(1)}, {}, "zero terminal SNR"),
        (SD1 | {"edm_mean": torch.zeros(1)}, {}, "an EDM model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_teach_is_refused(
    weights: Weights, metadata: dict[str, str], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    save_file(weights, path, metadata)
    assert words in refused(path)


def test_a_student_can_be_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(SD1, path, {RECIPE_KEY: recipe(prediction="eps").model_dump_json()})
    assert open_sd(path, student=True).family == "sd1"


def test_an_empty_a_cut_and_a_missing_file_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    empty, cut = tmp_path / "empty.safetensors", tmp_path / "cut.safetensors"
    empty.touch()
    cut.write_bytes(tiny("sd15").read_bytes()[:-100])
    assert "not a whole safetensors file" in refused(empty)
    assert "not a whole safetensors file" in refused(cut)
    assert "no such file" in refused(tmp_path / "none.safetensors")


def test_a_unet_that_diffusers_cannot_build_is_refused_with_the_reason(
    tiny: Tiny, tmp_path: Path
) -> None:
    weights = {k: v for k, v in load_file(tiny("sd15")).items() if k.startswith(UNET)}
    path = tmp_path / "x.safetensors"
    unlike = {
        "1 of its": weights | {UNET + "time_embed.9.weight": torch.zeros(1)},
        "conv_out.bias is missing": {k: v for k, v in weights.items() if k != UNET + "out.2.bias"},
        "stored as float8_e4m3fn": {k: v.to(torch.float8_e4m3fn) for k, v in weights.items()},
        "channels": SD1,
    }
    for reason, state in unlike.items():
        save_file(state, path)
        assert reason in refused(path, lambda path: open_sd(path).unet())


@pytest.fixture
def folder(pipeline: Tiny, tmp_path: Path) -> Path:
    """A pipeline that may be spoilt."""
    return Path(shutil.copytree(pipeline("sd15"), tmp_path / "pipeline"))


def test_half_precision_bin_and_sharded_weights_are_found(folder: Path) -> None:
    expected, whole = open_sd(folder), folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(whole)
    half = whole.with_name("diffusion_pytorch_model.fp16.safetensors")
    whole.rename(half)
    assert open_sd(folder).sha256 == expected.sha256
    half.unlink()
    torch.save(weights, whole.with_suffix(".bin"))
    by_pickle = open_sd(folder).unet().state_dict()
    whole.with_suffix(".bin").unlink()
    keys = sorted(weights)
    for i, part in enumerate((keys[:50], keys[50:])):
        name = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        save_file({key: weights[key] for key in part}, whole.with_name(name))
    by_shards = open_sd(folder).unet().state_dict()
    for key, value in weights.items():
        assert torch.equal(by_pickle[key], value) and torch.equal(by_shards[key], value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beta_schedule": "linear"}, "its scheduler has beta_schedule linear, not scaled_linear"),
        ({"beta_end": 0.02}, "beta_end 0.02, not 0.012"),
        ({"num_train_timesteps": 100}, "num_train_timesteps 100, not 1000"),
        ({"rescale_betas_zero_snr": True}, "zero terminal SNR"),
        ({"prediction_type": "sample"}, "predicts 'sample'"),
    ],
)
def test_a_folder_of_another_noise_schedule_is_refused(
    settings: dict[str, Any], words: str, folder: Path
) -> None:
    write_scheduler(folder, prediction_type="v_prediction")
    assert open_sd(folder).prediction == "v"
    write_scheduler(folder, **settings)
    assert words in refused(folder)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"in_channels": 9}, "has 9 input channels"),
        ({"class_embed_type": "projection"}, "told more than a prompt"),
        ({"addition_embed_type": "image"}, "told more than a prompt"),
        ({"addition_embed_type": "text_time", "cross_attention_dim": 1280}, "told more"),
    ],
)
def test_a_folder_of_another_unet_is_refused(
    settings: dict[str, Any], words: str, folder: Path
) -> None:
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    assert words in refused(folder)


def test_an_incomplete_folder_is_refused(folder: Path) -> None:
    assert "without model_index.json" in refused(folder / "unet")
    shutil.rmtree(folder / "tokenizer")
    assert "tokenizer: missing" in refused(folder, lambda path: open_sd(path).text_encoder())
    (folder / "vae" / "config.json").write_text("{")
    assert "damaged" in refused(folder, lambda path: open_sd(path).vae())
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert "unet: holds no weights" in refused(folder)
