"""One frozen base as teacher, student and target network, and Algorithm 1's step on it.

The teacher is the base with no LoRA on, the student the base with its LoRA, the target network the
base with that LoRA's moving average: one copy of the weights in memory, whatever the method.
"""

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from adversarial import Adversary
from lora import LoRA, attach, using
from solvers import Schedule, ddim
from tdd import Draws, TargetSet, draw, ema_update, jumps, squared_l2

# ----------------------------------------------------------------------------------------- networks
#
# Three callables, as tdd.py wants them, over one set of weights. Switching a LoRA on and off costs
# nothing; merging it in for a pass costs more than it saves, and in bf16 rounds it away.


class Network(nn.Module):
    """eps(x_t, t, cond) of the base with one LoRA switched on, or with none: the teacher.

    Its only parameters are the LoRA's, so those are all that DDP and optimizers find.
    """

    def __init__(self, base: nn.Module, name: str = "", lora: LoRA | None = None):
        super().__init__()
        object.__setattr__(self, "base", base)
        self.on, self.lora = {name: 1.0} if name else {}, lora
        if lora is not None:
            attach(base, name, lora)

    def forward(self, x_t: Tensor, t: Tensor, cond) -> Tensor:
        with using(self.base, **self.on):
            return self.base(x_t, t, cond)


# ----------------------------------------------------------------------------------------- the step
#
# As in tdd.py: `draw` is all of a step's randomness, `losses` all of its arithmetic.


@dataclass(frozen=True)
class Algorithm:
    """Algorithm 1's settings, in the paper's symbols; w is the range that w' is drawn from."""

    targets: TargetSet
    schedule: Schedule
    eta: float = 0.3
    rho: float = 0.2
    w: tuple[float, float] = (3.5, 3.5)
    mu: float = 0.0
    solver: object = ddim
    distance: object = squared_l2
    adv_weight: float = 0.1


@dataclass(frozen=True)
class StepDraws:
    """All random numbers of a step: Algorithm 1's, w' (b,), and the adversary's."""

    tdd: Draws
    w: Tensor | float
    u: Tensor | None = None
    noise: Tensor | None = None


@dataclass
class Distillation:
    """A student LoRA on a frozen base, and what its training needs."""

    base: nn.Module
    lora: LoRA
    algorithm: Algorithm
    adversary: Adversary | None = None
    parallel: list = field(default_factory=list)

    def __post_init__(self):
        self.teacher = Network(self.base)
        self.student = self.call = Network(self.base, "student", self.lora)
        # mu = 0 is the student itself under stop-gradient, the published choice.
        self.target = self.student
        if self.algorithm.mu:
            ema = copy.deepcopy(self.lora).requires_grad_(False)
            self.target = Network(self.base, "target", ema)

    @property
    def result(self) -> Network:
        """What is sampled and written: the moving average where there is one."""
        return self.target

    @property
    def modules(self) -> dict[str, nn.Module]:
        """All that training changes, by name."""
        found = {"student": self.student}
        if self.target is not self.student:
            found["target"] = self.target
        return found | ({"heads": self.adversary.heads} if self.adversary else {})

    def distribute(self, wrap) -> None:
        """Have `wrap` (DDP) average the gradients of all that is trained over the processes."""
        self.call = wrap(self.student)
        self.parallel = [self.call]
        if self.adversary:
            self.adversary.call = wrap(self.adversary.heads)
            self.parallel.append(self.adversary.call)

    def draw(self, shape, generator: torch.Generator, device) -> StepDraws:
        """A step's random numbers for x_0 of this shape, from a CPU generator."""
        a, b = self.algorithm, shape[0]
        draws = draw(a.targets, shape, a.eta, a.rho, generator).to(device)
        low, high = a.w
        w = low
        if low < high:
            w = (low + (high - low) * torch.rand(b, generator=generator)).to(device)
        if self.adversary is None:
            return StepDraws(draws, w)
        u = torch.rand(b, generator=generator).to(device)
        noise = torch.randn((2 * b, *shape[1:]), generator=generator).to(device)
        return StepDraws(draws, w, u, noise)

    def losses(self, x_0: Tensor, cond, null, d: StepDraws) -> dict[str, Tensor]:
        """Algorithm 1, lines 10-16: "total" to go backward, and its parts, means over the batch."""
        a = self.algorithm
        nets = self.call, self.target, self.teacher
        pred, aim, c = jumps(*nets, x_0, cond, null, d.tdd, d.w, a.schedule, a.solver)
        loss = a.distance(pred - aim).mean()
        if self.adversary is None:
            return {"total": loss, "loss": loss}
        fooled, told = self.adversary.losses(pred, aim, c, d.tdd.tau, d.u, d.noise, a.schedule)
        total = loss + a.adv_weight * fooled + told
        return {"total": total, "loss": loss, "adv_student": fooled, "adv_heads": told}

    def after_step(self) -> None:
        """Algorithm 1, line 18."""
        if self.target is not self.student:
            ema_update(self.target.parameters(), self.student.parameters(), self.algorithm.mu)
