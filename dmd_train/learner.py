"""How a role learns: its optimiser, and the moving average of the student."""

import math

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .config import Config
from .roles import Role


class Learner:
    """A role's parameters with their AdamW; the learning rate is a function of the step."""

    def __init__(self, role: Role, config: Config) -> None:
        self.parameters = role.parameters
        self.config = config
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=config.learning_rate,
            betas=(0.9, 0.999),
            weight_decay=config.weight_decay,
            fused=True,
        )

    def learning_rate(self, step: int) -> float:
        """At student update `step` (from 0): linear warm-up, then constant or cosine to zero."""
        warmup = min(1.0, (step + 1) / max(1, self.config.warmup_steps))
        if self.config.schedule == "constant":
            return self.config.learning_rate * warmup
        decay = 0.5 * (1 + math.cos(math.pi * step / self.config.steps))
        return self.config.learning_rate * warmup * decay

    def update(self, loss: Tensor, step: int) -> Tensor:
        """One optimiser step on `loss`. Returns the gradient's L2 norm before clipping."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.optimizer.step()
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and optimiser state, flat."""
        flat = {name: parameter.detach() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                flat[f"{name}@{key}"] = value
        return flat

    @torch.no_grad()
    def restore(self, flat: dict[str, Tensor]) -> None:
        states = {}
        for i, (name, parameter) in enumerate(self.parameters.items()):
            parameter.copy_(flat[name])
            keys = ("step", "exp_avg", "exp_avg_sq")
            states[i] = {key: flat[f"{name}@{key}"] for key in keys}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": states, "param_groups": groups})


class StudentEMA:
    """Exponential moving average of the student's parameters; the student that is saved.

    The decay is min(ema_decay, (1 + n)/(10 + n)) at update n, so that a short run is not held
    back by the teacher it started from.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.average = {name: value.detach().clone() for name, value in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        average = get_ema_multi_avg_fn(decay)
        average(list(self.average.values()), list(self.parameters.values()), torch.tensor(step))
