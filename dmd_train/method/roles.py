"""Who learns: the frozen teacher, the critic that follows the student, the student."""

from dataclasses import dataclass

from torch import nn

from .adapters import Adapted, Adapters
from .network import Network
from .processes import Processes


@dataclass(frozen=True)
class Role:
    """A network in its part, and the parameters that part trains (by name; none for a teacher)."""

    network: Network
    parameters: dict[str, nn.Parameter]


@dataclass(frozen=True)
class Roles:
    teacher: Role
    critic: Role
    student: Role


def three_networks(teacher: Network, processes: Processes | None = None) -> Roles:
    """Critic and student start as exact copies of the teacher (DMD algorithm 1, line 2).

    The teacher is frozen in place. All in eval mode: dropout is off (DMD B.1, B.2). Each is spread
    over the processes where that is asked for.
    """
    processes = processes or Processes(teacher.device)
    critic, student = _trained_copy(teacher, processes), _trained_copy(teacher, processes)
    teacher.freeze()
    processes.shard(teacher.module)
    return Roles(Role(teacher, {}), critic, student)


def _trained_copy(teacher: Network, processes: Processes) -> Role:
    network = teacher.copy()
    network.module.eval().float().requires_grad_(True)
    processes.shard(network.module)
    named = network.module.named_parameters()
    return Role(network, {network.canonical_name(name): p for name, p in named})


def two_adapters(teacher: Network, rank: int, alpha: float, seed: int) -> Roles:
    """One frozen network: the teacher is it without adapters, critic and student with theirs.

    An adapter starts as zero: critic and student start as the teacher (DMD algorithm 1, line 2).
    """
    teacher.freeze()
    adapters = Adapters(teacher, ("critic", "student"), rank, alpha, seed)
    return Roles(
        Role(Adapted(teacher, adapters, None), {}),
        Role(Adapted(teacher, adapters, "critic"), adapters.parameters("critic")),
        Role(Adapted(teacher, adapters, "student"), adapters.parameters("student")),
    )
