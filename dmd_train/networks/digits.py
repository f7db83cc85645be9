"""The embedded default: scikit-learn's 1,797 handwritten digits, 8x8, class-conditional, EDM."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import Embedding, Identity, Linear, Module, ModuleList, functional, init
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..method.noise import denoising_weight, edm_scalings, per_sample
from ..method.seeding import generator, randn
from .edm import EDMNetwork

FAMILY = "digits"
CLASSES = 10
SIZE = 8
SIGMA_DATA = 0.7521  # standard deviation of all pixels
LICENSE = "Apache-2.0; trained on the UCI optical digits data set, CC BY 4.0"


class Labelled(NamedTuple):
    """A data set. image: (N, C, H, W) in [-1, 1]; label: (N,) int64."""

    image: Tensor
    label: Tensor


def digits() -> Labelled:
    """scikit-learn's 1,797 digits, 8x8; pixels 0..16 become [-1, 1]."""
    from sklearn.datasets import load_digits  # training and measuring only: not for ComfyUI

    data = load_digits()
    image = torch.tensor(data.images, dtype=torch.float32) / 8 - 1
    return Labelled(rearrange(image, "n h w -> n 1 h w"), torch.tensor(data.target).long())


class DigitsNet(Module):
    """A residual MLP over the 64 pixels; noise level and class scale and shift every block."""

    frequencies: Tensor

    def __init__(self, width: int = 192, blocks: int = 3, embedding: int = 64) -> None:
        super().__init__()
        frequencies = 0.5 * 2.0 ** torch.linspace(0, 5, 16)  # radians per unit of c_noise
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.noise = Linear(2 * len(frequencies), embedding)
        self.label = Embedding(CLASSES + 1, embedding)
        self.modulation = Linear(embedding, 2 * width * blocks)
        self.enter = Linear(SIZE * SIZE, width)
        self.expand = ModuleList(Linear(width, width) for _ in range(blocks))
        self.project = ModuleList(Linear(width, width) for _ in range(blocks))
        self.middle = Identity()  # a name for what lies between the blocks
        self.leave = Linear(width, SIZE * SIZE)
        init.zeros_(self.modulation.bias)
        for layer in (*self.project, self.leave):  # F starts at zero
            init.zeros_(layer.weight)
            init.zeros_(layer.bias)

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor) -> Tensor:
        """F, like x: (B, 1, 8, 8); c_noise: (B,); label: (B,) int64, 10 = no class."""
        angle = c_noise[:, None] * self.frequencies
        embedding = self.noise(torch.cat([angle.cos(), angle.sin()], dim=1)) + self.label(label)
        modulation = self.modulation(functional.silu(embedding)).chunk(2 * len(self.expand), dim=1)
        h = self.enter(x.flatten(1))
        for i, (expand, project) in enumerate(zip(self.expand, self.project, strict=True)):
            scale, shift = modulation[2 * i], modulation[2 * i + 1]
            inner = expand(functional.layer_norm(h, h.shape[1:]))
            h = h + project(functional.silu(torch.addcmul(shift, inner, 1 + scale)))
            if i == len(self.expand) // 2:
                h = self.middle(h)
        h = functional.silu(functional.layer_norm(h, h.shape[1:]))
        f: Tensor = self.leave(h)
        return f.view_as(x)


def digits_network() -> EDMNetwork:
    """The digits network with fresh weights."""
    return EDMNetwork(
        DigitsNet(),
        family=FAMILY,
        shape=(1, SIZE, SIZE),
        classes=CLASSES,
        sigma_data=SIGMA_DATA,
        license=LICENSE,
        middle="middle",
    )


def train_teacher(
    network: EDMNetwork,
    data: Labelled,
    steps: int,
    seed: int,
    batch: int = 256,
    learning_rate: float = 2e-3,
) -> Iterator[int]:
    """Train a teacher as EDM does, yielding the steps done; its weights end as a moving average.

    Log-normal sigma as in EDM, stratified over the batch, with P_mean -0.4 and P_std 1.4: measured
    better on the digits than EDM's -1.2 and 1.2. Labels are dropped one time in ten, so that
    guidance works.
    """
    warmup, p_mean, p_std = 300, -0.4, 1.4
    parameters = list(network.module.parameters())
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01, fused=True)
    for step in range(steps):
        gen = generator(network.device, seed, step, "digits teacher")
        rows = torch.randint(len(data.image), (batch,), generator=gen)
        dropped = torch.rand(batch, generator=gen) < 0.1
        label = data.label[rows].masked_fill(dropped, network.classes)
        uniform = (torch.arange(batch) + torch.rand(batch, generator=gen)) / batch
        sigma = (p_mean + p_std * torch.special.ndtri(uniform.double().clamp(1e-5, 1 - 1e-5))).exp()

        x0 = data.image[rows]
        x = x0 + per_sample(sigma).float() * randn(x0.shape, gen)
        c = edm_scalings(sigma, network.sigma_data)
        output = network.module(per_sample(c.c_in).float() * x, c.c_noise.float(), label)
        mu = per_sample(c.c_skip).float() * x + per_sample(c.c_out).float() * output
        weight = denoising_weight("edm", torch.ones_like(sigma), sigma, network.sigma_data)
        loss = (per_sample(weight).float() * (mu - x0).square()).mean()

        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clip_grad_norm_(parameters, 10.0)
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / warmup) * cosine
        optimizer.step()
        with torch.no_grad():
            decay = min(0.9995, (1 + step) / (10 + step))
            get_ema_multi_avg_fn(decay)(average, parameters, torch.tensor(step))
            if step == steps - 1:
                for parameter, value in zip(parameters, average, strict=True):
                    parameter.copy_(value)
        yield step + 1
