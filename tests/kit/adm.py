"""ADM with EDM's preconditioning, written from the papers: formulas over a published state dict.

Dhariwal and Nichol 2021 (section 3, appendix A) and EDM (table 1, appendix F.3). Nothing here is
shared with the engine, so that the two can be held against each other.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def adm_state(
    size: int, channels: list[int], blocks: int, attention: set[int], classes: int, seed: int = 0
) -> Weights:
    """Random weights under the names of DMD2's ImageNet-64 `pytorch_model.bin`.

    attention: the resolutions that have it. Scaled so that activations stay near 1.
    """
    gen = torch.Generator().manual_seed(seed)
    state: Weights = {}
    embedding = 4 * channels[0]

    def affine(name: str, out: int, *rest: int, bias: bool = True) -> None:
        fan_in = math.prod(rest)
        state[f"{name}.weight"] = torch.randn(out, *rest, generator=gen) / fan_in**0.5
        if bias:
            state[f"{name}.bias"] = torch.randn(out, generator=gen) / 3

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + torch.randn(width, generator=gen) / 3
        state[f"{name}.bias"] = torch.randn(width, generator=gen) / 3

    def block(
        name: str, cin: int, cout: int, attends: bool = False, resample: bool = False
    ) -> None:
        norm(f"{name}.norm0", cin)
        affine(f"{name}.conv0", cout, cin, 3, 3)
        affine(f"{name}.affine", 2 * cout, embedding)
        norm(f"{name}.norm1", cout)
        affine(f"{name}.conv1", cout, cout, 3, 3)
        if cin != cout:
            affine(f"{name}.skip", cout, cin, 1, 1)
        if resample:
            for part in ("conv0", "skip"):
                box = torch.full((1, 1, 2, 2), 0.25, device="cpu")  # its values are looked at
                state[f"{name}.{part}.resample_filter"] = box
        if attends:
            norm(f"{name}.norm2", cout)
            affine(f"{name}.qkv", 3 * cout, cout, 1, 1)
            affine(f"{name}.proj", cout, cout, 1, 1)

    affine("model.map_layer0", embedding, channels[0])
    affine("model.map_layer1", embedding, embedding)
    affine("model.map_label", embedding, classes, bias=False)
    state["model.map_label.weight"] *= classes**0.5  # a one-hot vector has length 1
    width, skips = channels[0], []
    for level, out in enumerate(channels):
        res = size >> level
        name = f"model.enc.{res}x{res}"
        if level == 0:
            affine(f"{name}_conv", width, 3, 3, 3)
        else:
            block(f"{name}_down", width, width, resample=True)
        skips.append(width)
        for i in range(blocks):
            block(f"{name}_block{i}", width, out, attends=res in attention)
            width = out
            skips.append(width)
    for level in reversed(range(len(channels))):
        res, out = size >> level, channels[level]
        name = f"model.dec.{res}x{res}"
        if level == len(channels) - 1:
            block(f"{name}_in0", width, width, attends=True)
            block(f"{name}_in1", width, width)
        else:
            block(f"{name}_up", width, width, resample=True)
        for i in range(blocks + 1):
            block(f"{name}_block{i}", width + skips.pop(), out, attends=res in attention)
            width = out
    norm("model.out_norm", width)
    affine("model.out_conv", 3, width, 3, 3)
    return state


def adm_denoiser(state: Weights, x: Tensor, sigma: Tensor, onehot: Tensor) -> Tensor:
    """D(x; sigma, class), EDM eq 7 with sigma_data 0.5.

    x: (B, 3, H, W); sigma: (B,); onehot: (B, K), zeros for no class -> (B, 3, H, W).
    """
    s = sigma.view(-1, 1, 1, 1)
    total = s**2 + 0.25
    raw = adm(state, x / total.sqrt(), sigma.log() / 4, onehot)
    return 0.25 / total * x + 0.5 * s / total.sqrt() * raw


def adm(state: Weights, x: Tensor, noise: Tensor, onehot: Tensor) -> Tensor:
    """F(x, c_noise, class): the raw network."""
    half = state["model.map_layer0.weight"].shape[1] // 2
    angle = noise[:, None] * 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    e = torch.cat([angle.cos(), angle.sin()], dim=1)
    e = _linear(state, "model.map_layer1", F.silu(_linear(state, "model.map_layer0", e)))
    e = F.silu(e + onehot @ state["model.map_label.weight"].T)

    skips = []
    for name in _names(state, "model.enc."):
        x = _conv(state, name, x) if name.endswith("_conv") else _block(state, name, x, e)
        skips.append(x)
    for name in _names(state, "model.dec."):
        if state[f"{name}.norm0.weight"].numel() != x.shape[1]:
            x = torch.cat([x, skips.pop()], dim=1)
        x = _block(state, name, x, e)
    return _conv(state, "model.out_conv", F.silu(_norm(state, "model.out_norm", x)))


def _block(state: Weights, name: str, x: Tensor, e: Tensor) -> Tensor:
    kind = name.rpartition("_")[2]
    resample = {"down": _halve, "up": _double}.get(kind, lambda unchanged: unchanged)
    h = _conv(state, f"{name}.conv0", resample(F.silu(_norm(state, f"{name}.norm0", x))))
    scale, shift = _linear(state, f"{name}.affine", e)[:, :, None, None].chunk(2, dim=1)
    h = F.silu(_norm(state, f"{name}.norm1", h) * (1 + scale) + shift)
    x = resample(x)
    if f"{name}.skip.weight" in state:
        x = _conv(state, f"{name}.skip", x)
    x = x + _conv(state, f"{name}.conv1", h)
    if f"{name}.qkv.weight" not in state:
        return x
    b, c, height, width = x.shape
    qkv = _conv(state, f"{name}.qkv", _norm(state, f"{name}.norm2", x))
    q, k, v = qkv.view(b, c // 64, 64, 3, height * width).unbind(3)  # 64 channels a head
    weights = (torch.einsum("bhcq,bhck->bhqk", q, k) / 8).softmax(dim=3)
    mixed = torch.einsum("bhqk,bhck->bhcq", weights, v).reshape(b, c, height, width)
    return x + _conv(state, f"{name}.proj", mixed)


def _names(state: Weights, prefix: str) -> list[str]:
    """The blocks in the order of the file, which is the order of evaluation."""
    return list(dict.fromkeys(".".join(k.split(".")[:3]) for k in state if k.startswith(prefix)))


def _halve(x: Tensor) -> Tensor:
    """The mean of each 2x2 square."""
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


def _double(x: Tensor) -> Tensor:
    """Each pixel becomes a 2x2 square."""
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def _conv(state: Weights, name: str, x: Tensor) -> Tensor:
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)


def _linear(state: Weights, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def _norm(state: Weights, name: str, x: Tensor) -> Tensor:
    """32 groups, from the definition."""
    groups = x.view(len(x), 32, -1)
    centred = groups - groups.mean(dim=2, keepdim=True)
    unit = centred / (centred.square().mean(dim=2, keepdim=True) + 1e-5).sqrt()
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return unit.view_as(x) * weight[:, None, None] + bias[:, None, None]
