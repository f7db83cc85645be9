"""Teachers that have learned something, small enough to distil in seconds, and how near one comes.

M: a class-conditional MLP of 0.42 M parameters on the 8x8 digits. C: the text-conditional UNet of
2.1 M that draws coloured digits (tests/assets). Both have the noise of Stable Diffusion and predict
eps; M may be a flow too.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dmd_train.config import Config
from dmd_train.data.conditions import Classes, Conditions, Prompts
from dmd_train.distil import distil
from dmd_train.method.network import Condition, Network
from dmd_train.method.noise import TIMESTEPS, VP, Flow, x0_from
from dmd_train.method.recipe import Recipe
from dmd_train.method.sample import sample_student, sample_teacher, step_noise
from dmd_train.method.seeding import generator, randn
from dmd_train.networks.digits import CLASSES, SIZE, DigitsNet, digits
from dmd_train.networks.load import load
from dmd_train.networks.loaded import Loaded
from dmd_train.prepare import Ready, carried_out, prepare
from dmd_train.run.folder import RunFolder
from dmd_train.run.metrics import frechet_distance, intra_class_std_ratio

CPU = torch.device("cpu")
COLOURED_DIGITS = Path(__file__).parents[1] / "assets/coloured-digits"
HELD, CHUNK = 1024, 256
SAMPLER, SAMPLER_STEPS = "dpmpp-2m", 12
SD = VP.scaled_linear()


class DigitsMLP(Network):
    """The digits MLP with VP noise, as Stable Diffusion has it, or with a flow's."""

    license = "Apache-2.0"
    classes: int = CLASSES

    def __init__(self, family: str, noise: VP | Flow) -> None:
        self.module, self.noise, self.family = DigitsNet(width=224), noise, family
        self.prediction = "eps" if isinstance(noise, VP) else "flow"
        self.shape = (1, SIZE, SIZE)

    def predict(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """eps, or a flow's u = eps - x0."""
        alpha, sigma = self.noise.alpha(t), self.noise.sigma(t)
        c_noise = ((sigma / alpha.clamp(min=1e-3)).log() / 4).to(x_t.dtype)
        output: Tensor = self.module(x_t, c_noise, label)
        return output

    def predict_x0(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        output = self.predict(x_t, t, condition["label"])
        return x0_from(self.prediction, output, x_t, self.noise.alpha(t), self.noise.sigma(t))

    def null_condition(self, condition: Condition) -> Condition:
        return {"label": torch.full_like(condition["label"], self.classes)}

    def file_metadata(self) -> dict[str, str]:
        return {}


def train(network: DigitsMLP, steps: int) -> None:
    """Denoising at uniform timesteps, labels dropped one time in ten. A function of `steps`."""
    batch, rate = 256, 2e-3
    data, parameters = digits(), list(network.module.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01, fused=True)
    for step in range(steps):
        gen = generator(CPU, 0, step, "digits eps teacher")
        rows = torch.randint(len(data.image), (batch,), generator=gen)
        dropped = torch.rand(batch, generator=gen) < 0.1
        label = data.label[rows].masked_fill(dropped, CLASSES)
        t = torch.randint(TIMESTEPS, (batch,), generator=gen)
        x0 = data.image[rows]
        eps = randn(x0.shape, gen)
        target = eps if network.prediction == "eps" else eps - x0
        output = network.predict(network.noise.add(x0, eps, t), t, label)
        optimizer.zero_grad(set_to_none=True)
        (output - target).square().mean().backward()
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 100) * (1 - step / steps)
        optimizer.step()


class Held(NamedTuple):
    """What students are held against. z, image: (N, C, H, W); label: (N,), a row of conditions."""

    z: Tensor
    label: Tensor
    image: Tensor


class Numbers(NamedTuple):
    """Frechet distance to the guided teacher's samples from the same noise, and the samples'
    standard deviation within a condition over the teacher's."""

    distance: float
    diversity: float


@dataclass
class Testbed:
    """A teacher and its conditions. folder: where what is made once is kept; None: nowhere."""

    loaded: Loaded
    conditions: Conditions
    of_held: Tensor
    """Rows of the conditions that are held against, round robin."""
    folder: Path | None = None
    sampler: str = SAMPLER

    @property
    def network(self) -> Network:
        return self.loaded.network

    @cached_property
    def _held(self) -> dict[float, Held]:
        return {}

    def held(self, guidance: float) -> Held:
        """The guided teacher's samples."""
        if guidance not in self._held:
            z = randn((HELD, *self.network.shape), generator(CPU, 0, "held"))
            label = self.of_held[torch.arange(HELD) % len(self.of_held)]

            def teacher(z: Tensor, condition: Condition) -> Tensor:
                return sample_teacher(
                    self.network, z, condition, self.sampler, SAMPLER_STEPS, guidance
                )

            image = kept(
                self.folder and self.folder / f"held-{guidance}.safetensors",
                lambda: {"image": self._in_parts(teacher, z, label)},
            )["image"]
            self._held[guidance] = Held(z, label, image)
        return self._held[guidance]

    def _in_parts(
        self, draw: Callable[[Tensor, Condition], Tensor], z: Tensor, rows: Tensor
    ) -> Tensor:
        parts = zip(z.split(CHUNK), rows.split(CHUNK), strict=True)
        with torch.no_grad():
            return torch.cat([draw(x, self.conditions.take(row, CPU)) for x, row in parts])

    def measure(self, network: Network, recipe: Recipe) -> Numbers:
        """A student's, or with the teacher itself what a student starts from."""
        held = self.held(recipe.baked_guidance)
        _, *between = step_noise(network.shape, HELD, 1, recipe.nfe, CPU)
        images = self._in_parts(
            lambda z, condition: sample_student(network, recipe, condition, list(z.unbind(1))),
            torch.stack([held.z, *between], dim=1),
            held.label,
        )
        spread = intra_class_std_ratio(images, held.label, held.image, held.label)
        return Numbers(frechet_distance(images, held.image), spread)

    def distil(self, config: Config, change: Callable[[Ready], None] = lambda _: None) -> "Learned":
        """A run of the engine from its first step to its last. change: what is tried on it."""
        fresh = replace(self.loaded, network=self.network.copy())
        cost = count_evaluations(fresh.network.module)
        with RunFolder(config) as run:
            preparation = prepare(run, fresh, conditions=self.conditions, pictures=False)
            ready = carried_out(preparation, lambda _: None)
            change(ready)
            recipe, state = ready.state.recipe, ready.state
            with closing(distil(ready)) as reports:
                for _ in reports:
                    pass
        made = sum(cost)
        first = self.measure(self.network, recipe)
        with state.ema.swapped_in():
            last = self.measure(state.roles.student.network, recipe)
        return Learned(first, last, made)


class Learned(NamedTuple):
    """A run's first and last numbers, and what it cost: a forward of a sample is 1, with its
    backward 3; the pairs' are in it."""

    first: Numbers
    last: Numbers
    cost: int


def count_evaluations(module: nn.Module) -> list[int]:
    """A list that grows by the cost of each call of the module or of a copy made from now on."""
    cost: list[int] = []

    def count(_: nn.Module, args: tuple[Any, ...]) -> None:
        cost.append(len(args[0]) * (3 if torch.is_grad_enabled() else 1))

    module.register_forward_pre_hook(count)
    return cost


def kept(file: Path | None, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of a file, made where it is not there yet."""
    if file is None:
        return make()
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(make(), file)
    return load_file(file)


def testbed_m(folder: Path | None = None, steps: int = 4000, noise: VP | Flow = SD) -> Testbed:
    """Digits; the teacher is trained where `folder` has none."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = DigitsMLP("sd1", noise)

    def weights() -> dict[str, Tensor]:
        train(network, steps)
        return network.module.state_dict()

    file = folder and folder / f"{network.prediction}-{steps}.safetensors"
    network.module.load_state_dict(kept(file, weights))
    network.freeze()
    loaded = Loaded(network, None, "8x8 digits", "")
    sampler = SAMPLER if network.prediction == "eps" else "euler"
    return Testbed(loaded, Classes(CLASSES), torch.arange(CLASSES), folder, sampler)


COLOURS = ("red", "green", "blue", "yellow", "white", "black")
THINGS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    *("circle", "square", "triangle", "cross"),
)
PROMPTS = [
    f"a {colour} {thing} on {ground}"
    for colour in COLOURS
    for thing in THINGS
    for ground in COLOURS
    if ground != colour
]


class Encoded(NamedTuple):
    """Prompts encoded once, in memory."""

    text: Tensor
    number: dict[str, int]

    def encode(self, prompts: list[str]) -> Condition:
        return {"text": self.text[[self.number[prompt] for prompt in prompts]]}


def testbed_c(folder: Path | None = None) -> Testbed:
    """Coloured digits. Held against are 64 prompts, of every colour, thing and ground."""
    loaded = load(str(COLOURED_DIGITS), CPU)
    assert loaded.text
    text = loaded.text.encode(PROMPTS)["text"]
    conditions = Prompts(PROMPTS, Encoded(text, {p: i for i, p in enumerate(PROMPTS)}))
    of_held = torch.arange(64) * 13 % len(PROMPTS)
    return Testbed(replace(loaded, text=None), conditions, of_held, folder)
