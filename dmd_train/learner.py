"""How a role learns: its optimiser, and the moving average of the student."""

import contextlib
import importlib.util
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .config import Config
from .errors import UserError
from .method.processes import Processes, as_spread, whole
from .method.roles import Role


def require_optimizer(config: Config) -> None:
    """Refusal, a UserError, of an optimiser that is not installed."""
    if config.optimizer == "adamw-8bit" and not _has_bitsandbytes():
        raise UserError("optimizer: adamw-8bit needs bitsandbytes: pip install bitsandbytes")


def _has_bitsandbytes() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def make_optimizer(parameters: list[nn.Parameter], config: Config) -> torch.optim.Optimizer:
    """AdamW with beta2 = 0.999, in 8 bits where the config says so."""
    require_optimizer(config)
    lr, betas, decay = config.learning_rate, (config.beta1, 0.999), config.weight_decay
    may_be_8bit = config.optimizer == "auto" and parameters[0].is_cuda and _has_bitsandbytes()
    kind, faster = torch.optim.AdamW, {"fused": True}
    if config.optimizer == "adamw-8bit" or may_be_8bit:
        from bitsandbytes.optim import AdamW8bit

        kind, faster = AdamW8bit, {}
    return kind(parameters, lr=lr, betas=betas, weight_decay=decay, **faster)


class Learner:
    """A role's parameters with their AdamW; the learning rate is a function of the step."""

    def __init__(self, role: Role, config: Config, processes: Processes) -> None:
        self.parameters = role.parameters
        self.config, self.processes = config, processes
        self.optimizer = make_optimizer(list(self.parameters.values()), config)

    def update(self, step: int) -> Tensor:
        """One optimiser step on the gradients so far. Returns their L2 norm before clipping."""
        parameters = list(self.parameters.values())
        self.processes.average_gradients(parameters)
        norm = whole(nn.utils.clip_grad_norm_(parameters, self.config.clip_norm))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and optimiser state, flat and whole."""
        flat = {name: whole(parameter.detach()) for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                flat[f"{name}@{key}"] = whole(torch.as_tensor(value))
        return flat

    @torch.no_grad()
    def restore(self, flat: dict[str, Tensor]) -> None:
        states: dict[int, dict[str, Tensor]] = {i: {} for i in range(len(self.parameters))}
        index = {name: i for i, name in enumerate(self.parameters)}
        for key, value in flat.items():
            name, at, entry = key.partition("@")
            parameter = self.parameters[name]
            spread = value if value.shape != parameter.shape else as_spread(value, parameter)
            if at:
                states[index[name]][entry] = spread
            else:
                parameter.copy_(spread)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": states, "param_groups": groups})


class StudentEMA:
    """Exponential moving average of the student's parameters; the student that is saved.

    The decay is min(ema_decay, (1 + n)/(10 + n)) at update n, so that a short run is not held
    back by the teacher it started from. With ema_decay 0 it is the parameters themselves.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        averaged = parameters if decay > 0 else {}
        self.average = {name: value.detach().clone() for name, value in averaged.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        if not self.average:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        average = get_ema_multi_avg_fn(decay)
        average(list(self.average.values()), list(self.parameters.values()), torch.tensor(step))

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the student's parameters are their average. Nothing is copied."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, average in self.average.items():
            parameter = self.parameters[name]
            parameter.data, average.data = average.data, parameter.data
