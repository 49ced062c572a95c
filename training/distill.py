"""One frozen base as all networks of a method, and a training step of TDD or TDM on it.

The teacher is the base with no LoRA on, the student the base with its LoRA; the target network has
that LoRA's moving average, TDM's fake score a LoRA of its own. One copy of the weights in memory,
whatever the method.
"""

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import tdm
from sdxl.lora import LoRA, attach, using
from sdxl.pipeline import tell
from solvers import Schedule, ddim
from tdd import Draws, TargetSet, bind, draw, ema_update, guided, jumps, squared_l2, told
from training import distributed
from training.adversarial import Adversary
from unet import Block, UNet


class Network(nn.Module):
    """eps(x_t, t, cond) of the base with one LoRA switched on, or with none: the teacher.

    Its only parameters are the LoRA's, so those are all that DDP and optimizers find; or the
    base's own, if it is to be trained as a whole.
    """

    def __init__(self, base: nn.Module, name="", lora: LoRA | None = None, whole=False):
        super().__init__()
        if whole:
            self.base = base
        else:
            object.__setattr__(self, "base", base)
        self.on, self.lora = {name: 1.0} if name else {}, lora
        if lora is not None:
            attach(base, name, lora)

    def forward(self, x_t: Tensor, t: Tensor, cond, *n: Tensor) -> Tensor:
        with using(self.base, **self.on):
            return tell(self.base, self.lora)(x_t, t, cond, *n)


# -------------------------------------------------------------------------------------- TDD's step
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
    jump: object = ddim
    distance: object = squared_l2
    adv_weight: float = 0.1


@dataclass(frozen=True)
class StepDraws:
    """All random numbers of a step: Algorithm 1's, w' (b,), and the adversary's."""

    tdd: Draws
    w: Tensor | float
    u: Tensor | None = None
    noise: Tensor | None = None

    @property
    def timesteps(self) -> Tensor:
        """Where the examples start, for messages."""
        return self.tdd.t_next


@dataclass
class Distillation:
    """A student LoRA on a frozen base, and what its training needs.

    own: instead of a LoRA, a UNet to train as a whole, which was the base's copy to begin with.
    .modules: all that training changes, by name.
    """

    base: nn.Module
    lora: LoRA | None
    algorithm: Algorithm
    adversary: Adversary | None = None
    own: UNet | None = None
    parallel: list = field(default_factory=list)

    def __post_init__(self):
        self.teacher = Network(self.base)
        self.student = self.call = self._network("student", self.lora, self.own)
        self.modules, self.schedule = {"student": self.student}, self.algorithm.schedule
        # mu = 0 is the student itself under stop-gradient, the published choice.
        self.target = self.student
        if self.algorithm.mu:
            ema = (copy.deepcopy(trained) for trained in (self.lora, self.own))
            self.target = self._network("target", *ema).requires_grad_(False)
            self.modules["target"] = self.target
        for network in self.modules.values() if self.own is not None else ():
            distributed.shard(network, Block, UNet.FLOAT32)
        if self.adversary:
            self.modules["heads"] = self.adversary.heads
        # Sampled and written is the moving average where there is one.
        self.result = self.target

    def _network(self, name: str, lora: LoRA | None, own: UNet | None) -> Network:
        return Network(self.base, name, lora) if own is None else Network(own, whole=True)

    def sampler(self, k: int):
        """The result's network eps(x_t, t, cond), and the jump to sample it with in k steps."""
        return self.result, self.algorithm.jump

    def distribute(self, wrap) -> None:
        """Have `wrap` (DDP) average the gradients of all that is trained over the processes."""
        # A student of its own is sharded, and its gradients with it.
        if self.own is None:
            self.call = wrap(self.student)
            self.parallel.append(self.call)
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
        pred, aim, c = jumps(*nets, x_0, cond, null, d.tdd, d.w, a.schedule, a.solver, a.jump)
        loss = a.distance(pred - aim).mean()
        if self.adversary is None:
            return {"total": loss, "loss": loss}
        fooled, found = self.adversary.losses(pred, aim, c, d.tdd.tau, d.u, d.noise, a.schedule)
        total = loss + a.adv_weight * fooled + found
        return {"total": total, "loss": loss, "adv_student": fooled, "adv_heads": found}

    def after_step(self) -> None:
        """Algorithm 1, line 18."""
        if self.target is not self.student:
            ema_update(self.target.parameters(), self.student.parameters(), self.algorithm.mu)


# -------------------------------------------------------------------------------------- TDM's step
#
# Algorithm 1 has the fake score updated first, and the student against the new one (as on the toy,
# toy_tdm.py). Here both go backward at once, so that the student's step sees the fake score an
# update earlier: gradients can then be accumulated and sent between processes once a step, as for
# every other method.


@dataclass
class Matching:
    """Student and fake score as two LoRAs on a frozen base, which is the real score.

    Ks: what K is drawn from; if the LoRAs have an embedding, they are told of it. N: the grid of
    the student's steps. weight, loss: of tdm.fake_loss and tdm.student_loss. w: of the real score.
    """

    base: nn.Module
    lora: LoRA
    fake_lora: LoRA
    schedule: Schedule
    Ks: tuple[int, ...] = (4,)
    N: int = 250
    w: float = 7.0
    weight: str = "exact"
    loss: str = "huber"
    solver: object = ddim
    parallel: list = field(default_factory=list)

    def __post_init__(self):
        self.teacher = Network(self.base)
        self.student = self.result = self.call = Network(self.base, "student", self.lora)
        self.fake = self.call_fake = Network(self.base, "fake", self.fake_lora)
        self.modules = {"student": self.student, "fake": self.fake}

    def sampler(self, k: int):
        """The student's network eps(x_t, t, cond), told of k if it is told at all; and its jump."""
        return self._told(self.student, k), ddim

    def distribute(self, wrap) -> None:
        """Have `wrap` (DDP) average the gradients of both LoRAs over the processes."""
        self.call, self.call_fake = self.parallel = [wrap(self.student), wrap(self.fake)]

    def draw(self, shape, generator: torch.Generator, device) -> tdm.Draws:
        """A step's random numbers for samples of this shape, from a CPU generator."""
        return tdm.draw(self.Ks, shape, self.N, generator).to(device)

    def losses(self, cond, null, d: tdm.Draws) -> dict[str, Tensor]:
        """Algorithm 1, lines 4-12: "total" to go backward, and its parts, means over the batch."""
        p = tdm.generate(bind(self._told(self.call, d.K), cond), d, self.schedule, self.solver)
        # Neither loss has a gradient for the other's weights.
        fake = bind(self._told(self.call_fake, d.K), cond)
        denoised = tdm.fake_loss(fake, p.detach(), self.schedule, self.weight).mean()
        real = guided(self.teacher, cond, null, self.w)
        fake = bind(self._told(self.fake, d.K), cond)
        loss = tdm.student_loss(real, fake, p, self.schedule, self.loss).mean()
        return {"total": loss + denoised, "loss": loss, "fake": denoised}

    def after_step(self) -> None:
        """Nothing: there is no moving average."""

    def _told(self, network, K: int):
        return network if self.lora.told is None else told(network, K)
