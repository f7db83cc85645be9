"""Prompts to what Stable Diffusion is conditioned on: CLIP's hidden states.

SD 1: CLIP ViT-L/14, the last layer. SD 2: OpenCLIP ViT-H/14, the last but one, normalised. SDXL:
ViT-L/14 and OpenCLIP bigG/14 side by side, the last but one of both as it is, and bigG's pooled
embedding.
"""

import gzip
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_open_clip_checkpoint,
)
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    logging,
)
from typing_extensions import Self

from ..families import FAMILIES
from ..files.read import Weights
from ..method.network import Condition
from .sd_layout import count, fit

LENGTH = 77
HEAD_CHANNELS = 64
START, END = "<|startoftext|>", "<|endoftext|>"
START_ID, END_ID = 49406, 49407
MERGES = Path(__file__).with_name("clip-merges.txt.gz")
"""OpenAI's byte pairs of CLIP (MIT), most frequent first."""

Tokenize = Callable[[list[str]], list[list[int]]]
"""Prompts -> their tokens, from the start token to the end token, of any length."""


class Part(NamedTuple):
    """One CLIP text model and how prompts are written for it."""

    model: nn.Module
    tokenize: Tokenize
    pad: int


class TextEncoder:
    """CLIP text models side by side, in float32 on the CPU until told otherwise; frozen.

    penultimate: read the last hidden state but one, without the final norm (SDXL).
    """

    def __init__(self, parts: list[Part], penultimate: bool) -> None:
        self.parts, self.penultimate = parts, penultimate
        self.modules = [part.model for part in parts]

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Condition:
        """{"text": (N, 77, D)}, for SDXL also {"pooled": (N, 1280)}: float32, on this device.

        All prompts in one batch.
        """
        condition, states = {}, []
        for part in self.parts:
            out = part.model(_ids(part, prompts, self.device), output_hidden_states=True)
            states.append(out.hidden_states[-2] if self.penultimate else out.last_hidden_state)
            if "text_embeds" in out:
                condition["pooled"] = out.text_embeds
        return {"text": torch.cat(states, dim=-1)} | condition

    def too_long(self, prompts: list[str]) -> list[int]:
        """Indices of the prompts over 77 tokens, whose end is cut off."""
        return [
            index
            for index, tokens in enumerate(self.parts[0].tokenize(prompts))
            if len(tokens) > LENGTH
        ]

    def to(self, device: torch.device) -> Self:
        for module in self.modules:
            module.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.modules[0].parameters()).device


def _ids(part: Part, prompts: list[str], device: torch.device) -> Tensor:
    """(N, 77) token ids: cut off before the end token, or filled up behind it."""
    rows = []
    for tokens in part.tokenize(prompts):
        if len(tokens) > LENGTH:
            tokens = tokens[: LENGTH - 1] + tokens[-1:]
        rows.append(tokens + [part.pad] * (LENGTH - len(tokens)))
    return torch.tensor(rows, device=device)


@contextmanager
def _silence() -> Iterator[None]:
    """No lines of transformers' about a model that is refused anyway, in one of ours."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


@_silence()
def from_ldm(weights: Weights, family: str) -> TextEncoder:
    """The text encoder of `cond_stage_model.*` or `conditioner.*`. Raises ValueError."""
    row, parts = FAMILIES[family], []
    for i, kind in enumerate(row.text_encoders):
        prefix = f"conditioner.embedders.{i}." if row.pooled else "cond_stage_model."
        if kind == "openai":
            parts.append(_openai(weights, f"{prefix}transformer."))
        else:
            parts.append(_open_clip(weights, f"{prefix}model.", row.pooled))
    return TextEncoder(parts, penultimate=row.pooled)


@_silence()
def from_diffusers(
    config: dict[str, Any], weights: Weights, tokenizer: Path, projected: bool
) -> Part:
    """One text_encoder folder of a pipeline, and its tokenizer's. Raises ValueError or OSError."""
    # trust: else a folder that comes with code is asked about on the terminal
    own = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True, trust_remote_code=False)

    def own_tokens(prompts: list[str]) -> list[list[int]]:
        found: list[list[int]] = own(
            prompts, padding=False, truncation=False, verbose=False
        ).input_ids
        return found

    # SD 2's and SDXL's declare "!" to be padding, and so take it out of prompts: OpenCLIP did not
    tokenize = shipped_tokens if own.get_vocab() == vocabulary() else own_tokens
    model = _model(CLIPTextConfig(**config), weights, projected)
    return Part(model, tokenize, own.pad_token_id)


def _openai(weights: Weights, prefix: str) -> Part:
    """CLIP ViT-L/14, in transformers' own layout behind `prefix`."""
    own = {key: value for key, value in weights.items() if key.startswith(prefix)}
    converted = convert_ldm_clip_checkpoint(own)
    return Part(_model(_config(converted, "quick_gelu"), converted, False), shipped_tokens, END_ID)


def _open_clip(weights: Weights, prefix: str, projected: bool) -> Part:
    """OpenCLIP's text tower. projected: whole; otherwise without its last layer and projection."""
    own = {key: value for key, value in weights.items() if key.startswith(prefix)}
    if not projected:
        last = count(own, f"{prefix}transformer.resblocks.") - 1
        dropped = f"{prefix}transformer.resblocks.{last}."
        own = {key: value for key, value in own.items() if not key.startswith(dropped)}
    if f"{prefix}ln_final.weight" not in own:
        raise ValueError(f"{prefix}ln_final.weight is missing")
    # whom diffusers asks where the file has no projection that tells the width
    model = SimpleNamespace(
        config=SimpleNamespace(hidden_size=len(own[f"{prefix}ln_final.weight"]))
    )
    converted = convert_open_clip_checkpoint(model, own, prefix)
    return Part(_model(_config(converted, "gelu"), converted, projected), shipped_tokens, 0)


def _config(weights: Weights, activation: str) -> CLIPTextConfig:
    """CLIP's, from shapes, under transformers' names with or without `text_model.`."""
    own = {key.removeprefix("text_model."): value for key, value in weights.items()}
    for key in ("embeddings.token_embedding.weight", "encoder.layers.0.mlp.fc1.weight"):
        if key not in own:
            raise ValueError(f"{key} is missing")
    vocabulary, width = own["embeddings.token_embedding.weight"].shape
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=len(own["encoder.layers.0.mlp.fc1.weight"]),
        projection_dim=len(
            own.get("text_projection.weight", own["encoder.layers.0.mlp.fc1.weight"])
        ),
        num_hidden_layers=count(own, "encoder.layers."),
        num_attention_heads=width // HEAD_CHANNELS,
        max_position_embeddings=LENGTH,
        hidden_act=activation,
        bos_token_id=START_ID,
        eos_token_id=END_ID,
    )


def _model(config: CLIPTextConfig, weights: Weights, projected: bool) -> nn.Module:
    """A model of exactly these weights, in float32. transformers 5 dropped their `text_model.`."""
    own = {
        key.removeprefix("text_model."): value.float()
        for key, value in weights.items()
        if not key.endswith("position_ids")  # a constant, which old files hold
    }
    projection = own.pop("text_projection.weight", None)
    with torch.device("meta"):
        model: Any = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
    fit(getattr(model, "text_model", model), own)
    if projected:
        fit(model.text_projection, {} if projection is None else {"weight": projection})
    for module in model.modules():
        if hasattr(module, "position_ids"):  # in no file, so still on the meta device
            module.position_ids = torch.arange(config.max_position_embeddings)[None]
    model.eval().requires_grad_(False)
    return cast(nn.Module, model)


def shipped_tokens(prompts: list[str]) -> list[list[int]]:
    """CLIP's tokens, by the byte pairs in this package."""
    return [encoding.ids for encoding in _tokenizer().encode_batch(prompts)]


@cache
def _tokenizer() -> Tokenizer:
    """CLIP's, as transformers sets it up."""
    merges = [(first, second) for first, second in map(str.split, _merge_lines())]
    tokenizer = Tokenizer(
        BPE(
            vocab=vocabulary(),
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=END,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([START, END])
    tokenizer.post_processor = processors.RobertaProcessing(
        (END, END_ID), (START, START_ID), trim_offsets=False, add_prefix_space=False
    )
    return tokenizer


def vocabulary() -> dict[str, int]:
    """CLIP's rule: the 256 bytes, the same at the end of a word, one word a merge, start, end."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(byte) for byte in shown] + [chr(256 + n) for n in range(256 - len(shown))]
    words = symbols + [symbol + "</w>" for symbol in symbols]
    words += [line.replace(" ", "") for line in _merge_lines()] + [START, END]
    return {word: index for index, word in enumerate(words)}


def _merge_lines() -> list[str]:
    return gzip.decompress(MERGES.read_bytes()).decode().strip().split("\n")[1:]
