"""One iteration of DMD: the student's update, then the critic's (DMD algorithm 1, DMD2 4.2)."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from .config import Config
from .data.conditions import Conditions
from .data.images import Images
from .data.pairs import Pairs
from .learner import Learner, StudentEMA
from .method.adversarial import Adversarial, Noised, with_head
from .method.network import Condition
from .method.objectives import Denoising, Distance, DistributionMatching
from .method.processes import Processes
from .method.recipe import Recipe
from .method.roles import Roles
from .method.sample import rollout
from .method.seeding import generator, randn


@dataclass(frozen=True)
class Draw:
    """Everything random of one update: of the whole batch, or of a part of it.

    row: (B,) on the CPU; z, eps: (B, C, H, W); t: (B,); between: (B, k, C, H, W), the noise of the
    k steps after the student's first, up to the one whose x0 it is.
    """

    row: Tensor
    z: Tensor
    between: Tensor
    t: Tensor
    eps: Tensor

    def __len__(self) -> int:
        return len(self.row)

    def split(self, size: int) -> Iterator["Draw"]:
        """Micro-batches of `size`; 0: the whole."""
        columns = (self.row, self.z, self.between, self.t, self.eps)
        for part in zip(*(x.split(size or len(x)) for x in columns), strict=True):
            yield Draw(*part)


Part = TypeVar("Part", Draw, Tensor)


class Distillation:
    """The state of a run and one iteration of it.

    distance: of the regression on pairs (DMD eq 9).
    """

    def __init__(
        self,
        roles: Roles,
        recipe: Recipe,
        conditions: Conditions,
        config: Config,
        distance: Distance = functional.mse_loss,
        processes: Processes | None = None,
        images: Images | None = None,
    ) -> None:
        self.device = roles.teacher.network.device
        self.processes = processes or Processes(self.device)
        self.images, self.adversarial = images, None
        if images is not None:
            any_one = conditions.take(torch.tensor([0]), self.device)
            critic, head = with_head(roles.critic, any_one, config.seed, self.processes)
            self.adversarial = Adversarial(
                critic.network, head, config.adversarial_t_min, config.adversarial_t_max
            )
            roles = replace(roles, critic=critic)
        self.roles, self.recipe, self.conditions, self.config = roles, recipe, conditions, config
        self.distance = distance
        self.student = Learner(roles.student, config, self.processes)
        self.critic = Learner(roles.critic, config, self.processes)
        self.ema = StudentEMA(roles.student.parameters, config.ema_decay)
        self.distribution_matching = DistributionMatching(
            roles.teacher.network, roles.critic.network, config.guidance, config.t_min, config.t_max
        )
        self.denoising = Denoising(roles.critic.network)
        if config.gradient_checkpointing:
            for role in (roles.critic, roles.student):
                role.network.checkpoint_gradients()

    def iteration(self, step: int, pairs: Pairs | None) -> dict[str, Tensor]:
        """Losses and gradient norms, by name, of student update `step` (from 0) and the critic's.

        The first critic update uses the very samples the student was just updated on. In the
        warm-up the student learns from pairs alone (DMD2 4.5), and the critic waits.
        """
        values: dict[str, Tensor] = {}
        warming_up = step < self.config.regression_warmup_steps
        if not warming_up:
            draw = self._draw(self.distribution_matching, step, "student")
            values, samples = self._match(draw, step)
        if pairs is not None and (warming_up or self.config.regression_weight > 0):
            weight = 1.0 if warming_up else self.config.regression_weight
            values["student/regression"] = self._regress(step, pairs, weight)
        values["student/gradient_norm"] = self.student.update(step)
        self.ema.update(step)
        if warming_up:
            return values

        for update in range(self.config.critic_updates):
            noised = self._draw(self.denoising, step, f"critic {update}")
            if update == 0:
                noised = replace(noised, row=draw.row)
                values["critic/denoising"], _ = self._denoise(noised, samples)
            else:
                values["critic/denoising"], samples = self._denoise(noised)
            if self.adversarial:
                judged = self._judge(self.adversarial, step, update, noised.row, samples)
                values["critic/adversarial"] = judged
            values["critic/gradient_norm"] = self.critic.update(step)
        return values

    def _draw(
        self, objective: DistributionMatching | Denoising | Adversarial, step: int, purpose: str
    ) -> Draw:
        gen = generator(self.device, self.config.seed, step, purpose)
        rows = generator(torch.device("cpu"), self.config.seed, step, purpose, "conditions")
        shape = torch.Size((self.config.batch_size, *self.roles.student.network.shape))
        row, z = self.conditions.rows(shape[0], rows), randn(shape, gen)
        whole = (row, z, self._draw_between(shape, step, purpose), *objective.draw(shape, gen))
        return Draw(*(self.processes.part(x) for x in whole))

    def _draw_between(self, shape: torch.Size, step: int, purpose: str) -> Tensor:
        """Noise (B, k, C, H, W) of the steps up to one drawn at random, all alike (DMD2 4.5)."""
        cpu, seed = torch.device("cpu"), self.config.seed
        chosen = generator(cpu, seed, step, purpose, "student's step")
        k = int(torch.randint(self.recipe.nfe, (), generator=chosen))
        return randn(
            (shape[0], k, *shape[1:]), generator(self.device, seed, step, purpose, "between")
        )

    def _generate(self, draw: Draw, condition: Condition) -> Tensor:
        noise = [draw.z, *draw.between.unbind(1)]
        return rollout(self.roles.student.network, self.recipe, condition, noise)

    def _match(self, draw: Draw, step: int) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Gradients of the distribution matching, and with images of the adversarial objective.

        Returns their values, without weights, and the samples.
        """
        samples: list[Tensor] = []
        fooled: list[Tensor] = []
        weight, size = self.config.adversarial_weight, self.config.micro_batch_size
        judged = (
            self._draw(self.adversarial, step, "judged").split(size) if self.adversarial else ()
        )
        judging = iter(judged)

        def loss(part: Draw) -> Tensor:
            condition = self.conditions.take(part.row, self.device)
            x = self._generate(part, condition)
            samples.append(x.detach())
            matching = self.distribution_matching(x, condition, part.t, part.eps)
            if not self.adversarial:
                return matching
            noised = next(judging)
            told = self._judged(condition)
            fooling = self.adversarial.of_student(Noised(x, told, noised.t, noised.eps))
            fooled.append(fooling.detach() * (len(part) / len(draw)))
            return matching + weight * fooling

        value = self._accumulate(draw.split(size), len(draw), loss)
        if not fooled:
            return {"student/distribution_matching": value}, samples
        adversarial = torch.stack(fooled).sum()
        matching = value - weight * adversarial
        return {
            "student/distribution_matching": matching,
            "student/adversarial": adversarial,
        }, samples

    def _regress(self, step: int, pairs: Pairs, weight: float) -> Tensor:
        """Gradients of weight times the regression. Returns its value, without the weight.

        A pair is of the deterministic student's last step, whose x0 follows from the noise alone;
        of a stochastic one's first.
        """
        steps = self.recipe.nfe if self.recipe.sampler == "deterministic" else 1
        gen = generator(torch.device("cpu"), self.config.seed, step, "pairs")
        numbers = self.processes.part(pairs.draw(self.config.pair_batch_size, gen))

        def loss(part: Tensor) -> Tensor:
            ref = pairs.take(part, self.device)
            condition = self.conditions.take(ref.row, self.device)
            x_ref = rollout(self.roles.student.network, self.recipe, condition, steps * [ref.noise])
            return self.distance(x_ref, ref.image)

        parts = numbers.split(self.config.micro_batch_size or len(numbers))
        return self._accumulate(parts, len(numbers), loss, weight)

    def _denoise(
        self, draw: Draw, samples: list[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Gradients of the critic's loss on `samples`, or on fresh ones.

        Returns its value, and the samples.
        """
        given = iter(samples or ())
        seen: list[Tensor] = []

        def loss(part: Draw) -> Tensor:
            condition = self.conditions.take(part.row, self.device)
            if samples is None:
                with torch.no_grad():
                    x = self._generate(part, condition)
            else:
                x = next(given)
            seen.append(x)
            return self.denoising(x, condition, part.t, part.eps)

        return self._accumulate(draw.split(self.config.micro_batch_size), len(draw), loss), seen

    def _judge(
        self, adversarial: Adversarial, step: int, update: int, row: Tensor, samples: list[Tensor]
    ) -> Tensor:
        """Gradients of weight times the critic's adversarial loss on samples and as many images.

        row: of the samples. Returns its value, without the weight.
        """
        assert self.images
        images, given, size = self.images, iter(samples), self.config.micro_batch_size
        fake = replace(self._draw(adversarial, step, f"fake {update}"), row=row)
        gen = generator(torch.device("cpu"), self.config.seed, step, f"images {update}")
        numbers = self.processes.part(images.draw(self.config.batch_size, gen))
        real = replace(self._draw(adversarial, step, f"real {update}"), row=numbers)
        reals = real.split(size)

        def loss(part: Draw) -> Tensor:
            other = next(reals)
            told = self._judged(self.conditions.take(part.row, self.device))
            real_told = images.condition(other.row, self.device)
            return adversarial.of_critic(
                Noised(next(given), told, part.t, part.eps),
                Noised(
                    images.take(other.row, self.device),
                    told if real_told is None else real_told,
                    other.t,
                    other.eps,
                ),
            )

        weight = self.config.critic_adversarial_weight
        return self._accumulate(fake.split(size), len(fake), loss, weight)

    def _judged(self, condition: Condition) -> Condition:
        """What the discriminator is told of a sample: nothing where nothing is known of images."""
        if self.images and self.images.conditions:
            return condition
        return self.roles.critic.network.null_condition(condition)

    def _accumulate(
        self,
        parts: Iterable[Part],
        whole: int,
        loss: Callable[[Part], Tensor],
        weight: float = 1.0,
    ) -> Tensor:
        """Gradients of weight times the mean of `loss` over a batch of `whole`, part by part.

        Returns the mean, without the weight.
        """
        total = torch.zeros((), device=self.device)
        for part in parts:
            mean = loss(part) * (len(part) / whole)
            torch.autograd.backward(weight * mean)
            total += mean.detach()
        return total

    def tensors(self) -> dict[str, Tensor]:
        """Everything a run needs to go on, flat."""
        parts = {
            "student": self.student.tensors(),
            "critic": self.critic.tensors(),
            "ema": self.ema.average,
        }
        return {f"{part}/{k}": v for part, flat in parts.items() for k, v in flat.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        def part(name: str) -> dict[str, Tensor]:
            prefix = f"{name}/"
            return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

        self.student.restore(part("student"))
        self.critic.restore(part("critic"))
        for name, value in part("ema").items():
            self.ema.average[name].copy_(value)
