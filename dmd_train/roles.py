"""Who learns: the frozen teacher, the critic that follows the student, the student."""

from dataclasses import dataclass

from torch import nn

from .network import Network


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


def three_networks(teacher: Network) -> Roles:
    """Critic and student start as exact copies of the teacher (DMD algorithm 1, line 2).

    The teacher is frozen in place. All in eval mode: dropout is off (DMD B.1, B.2).
    """
    teacher.module.eval().requires_grad_(False)
    return Roles(Role(teacher, {}), _trained_copy(teacher), _trained_copy(teacher))


def _trained_copy(teacher: Network) -> Role:
    network = teacher.copy()
    network.module.requires_grad_(True)
    return Role(network, dict(network.module.named_parameters()))
