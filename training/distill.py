"""One frozen base as all networks of a method, and a training step of TDD or TDM on it.

The teacher is the base with no LoRA active, the student the base with its LoRA; the target network
has that LoRA's moving average, TDM's fake score a LoRA of its own. With LoRAs, whatever the method,
memory holds the base's weights once.
"""

import copy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

import tdm
from common.walkers import Walkers
from sdxl import num_steps
from sdxl.lora import LoRA, active_adapters, add_adapter
from sdxl.pipeline import scalar_network
from solvers import SOLVERS, Schedule, ddim, to_device
from tdd import (
    StepSample,
    TargetSet,
    conditioned,
    ema_update,
    guided,
    sample_step,
    squared_l2,
    tdd_loss,
)
from training import distributed
from training.adversarial import Discriminator
from unet import Block, UNet

# ---------------------------------------------------------------------------------------- networks
#
# tdd.py wants three callables; these are three views of one set of weights. Switching a LoRA on and
# off costs nothing, while merging it for a pass costs more than it saves and rounds it in bf16.


class LoRANetwork(nn.Module):
    """eps(x_t, t, cond) of the frozen base with one LoRA active, or with none: the teacher.

    The LoRA's parameters are its only ones, so DDP and optimizers find nothing else.
    """

    def __init__(self, base: nn.Module, name: str = "", lora: LoRA | None = None):
        super().__init__()
        # A plain attribute: the base is no submodule of any one network.
        object.__setattr__(self, "base", base)
        self.lora = lora
        self.active = {name: 1.0} if name else {}
        if lora is not None:
            add_adapter(base, name, lora)

    def forward(self, x_t: Tensor, t: Tensor, cond, *scalar: Tensor) -> Tensor:
        embedding = None if self.lora is None else self.lora.scalar_embedding
        with active_adapters(self.base, **self.active):
            return scalar_network(self.base, embedding)(x_t, t, cond, *scalar)


class FullNetwork(nn.Module):
    """eps(x_t, t, cond) of a UNet that is trained as a whole."""

    def __init__(self, unet: UNet):
        super().__init__()
        self.base = unet
        self.lora = None

    def forward(self, x_t: Tensor, t: Tensor, cond, *scalar: Tensor) -> Tensor:
        embedding = getattr(self.base, "scalar_embedding", None)
        return scalar_network(self.base, embedding)(x_t, t, cond, *scalar)


# -------------------------------------------------------------------------------------- TDD's step
#
# As in tdd.py: `sample` holds all of a step's randomness, `losses` all of its arithmetic.


@dataclass(frozen=True)
class TDDConfig:
    """Algorithm 1's settings, in the paper's symbols; w is the range that w' is drawn from.

    told_ks: the K that the student is told apart (sdxl/num_steps.py): its targets have a K each.
    """

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
    told_ks: tuple[int, ...] = ()


@dataclass(frozen=True)
class TDDStepSample:
    """All random numbers of a step: Algorithm 1's, w', and the discriminator's, if there is one.

    walkers: (b,) indices of those whose places the examples are, if not of data.
    """

    step: StepSample
    w: Tensor | float  # (b,) or one for all
    walkers: Tensor | None = None
    adv_u: Tensor | None = None  # (b,)
    adv_noise: Tensor | None = None  # (2b, ..)

    @property
    def timesteps(self) -> Tensor:
        """Where the examples start, for messages."""
        return self.step.t_next


@dataclass
class TDDStep:
    """Algorithm 1 on a frozen base: a student LoRA, or `full`, a copy of the base to train whole.

    walkers: the teacher's path as the source of x_{t_{n+1}}, instead of data.
    .modules: everything that training changes, by name.
    """

    base: nn.Module
    lora: LoRA | None
    config: TDDConfig
    discriminator: Discriminator | None = None
    full: UNet | None = None
    walkers: Walkers | None = None
    ddp_modules: list = field(default_factory=list)

    def __post_init__(self):
        self.schedule = self.config.schedule
        self.teacher = LoRANetwork(self.base)
        self.student = self.student_ddp = self._network("student", self.lora, self.full)
        self.modules = {"student": self.student}
        # mu = 0 is the student itself under stop-gradient, the published choice.
        self.target_net = self.student
        if self.config.mu:
            lora, full = copy.deepcopy(self.lora), copy.deepcopy(self.full)
            self.target_net = self._network("target", lora, full).requires_grad_(False)
            self.modules["target"] = self.target_net
        if self.full is not None:
            for network in self.modules.values():
                distributed.apply_fsdp(network, Block, UNet.KEEP_IN_FP32)
        if self.discriminator is not None:
            self.modules["heads"] = self.discriminator.heads
        # The moving average, where there is one, is what is sampled and written.
        self.output_network = self.target_net

    def _network(self, name: str, lora: LoRA | None, full: UNet | None) -> nn.Module:
        return LoRANetwork(self.base, name, lora) if full is None else FullNetwork(full)

    def sampler(self, k: int):
        """The student's network eps(x_t, t, cond) for k steps, and a maker of the jump for them."""
        network = num_steps.with_nearest_k(self.output_network, k, self.config.told_ks)
        return network, lambda: self.config.jump

    def distribute(self, wrap_ddp) -> None:
        """Average the gradients of everything trained over the processes."""
        # A full student is sharded, and its gradients with it.
        if self.full is None:
            self.student_ddp = wrap_ddp(self.student)
            self.ddp_modules.append(self.student_ddp)
        if self.discriminator is not None:
            self.discriminator.heads_ddp = wrap_ddp(self.discriminator.heads)
            self.ddp_modules.append(self.discriminator.heads_ddp)

    def sample(
        self, shape, generator: torch.Generator, device, walkers: Tensor | None = None
    ) -> TDDStepSample:
        """A step's random numbers for x_0 of this shape (b, ..), from a CPU generator.

        walkers: (b,) which of self.walkers to use, if there are any.
        """
        config, b = self.config, shape[0]
        if walkers is None:
            step = sample_step(config.targets, shape, config.eta, config.rho, generator)
            w, (low, high) = config.w[0], config.w
            if low < high:
                w = to_device(low + (high - low) * torch.rand(b, generator=generator), device)
        else:
            step = self.walkers.sample(walkers, config.targets, config.eta)
            w = self.walkers.guidance(walkers)
        sample = TDDStepSample(step.to(device), w, walkers)
        if self.discriminator is None:
            return sample
        u = to_device(torch.rand(b, generator=generator), device)
        noise = to_device(torch.randn((2 * b, *shape[1:]), generator=generator), device)
        return replace(sample, adv_u=u, adv_noise=noise)

    def losses(self, x_0: Tensor | None, cond, null, sample: TDDStepSample) -> dict[str, Tensor]:
        """Algorithm 1, lines 10-16: "total" for the backward pass, and its parts; batch means.

        x_0 is not used where the sample is of walkers, which this moves on.
        """
        config, student, target_net = self.config, self.student_ddp, self.target_net
        if config.told_ks:
            cond, null = num_steps.with_crop_top(cond, 0), num_steps.with_crop_top(null, 0)
            student, target_net = (
                num_steps.with_k(f, sample.step.K) for f in (student, target_net)
            )
        loss, prediction, target, cond, x_n = tdd_loss(
            student, target_net, self.teacher, x_0, cond, null, sample.step,
            sample.w, config.schedule, config.solver, config.jump, config.distance,
        )  # fmt: skip
        if sample.walkers is not None:
            self.walkers.advance(sample.walkers, x_n)
        loss = loss.mean()
        if self.discriminator is None:
            return {"total": loss, "loss": loss}
        g_loss, d_loss = self.discriminator.losses(
            prediction, target, cond, sample.step.tau, sample.adv_u, sample.adv_noise,
            config.schedule,
        )  # fmt: skip
        total = loss + config.adv_weight * g_loss + d_loss
        return {"total": total, "loss": loss, "adv_student": g_loss, "adv_heads": d_loss}

    def after_step(self) -> None:
        """Algorithm 1, line 18."""
        if self.target_net is not self.student:
            ema_update(self.target_net.parameters(), self.student.parameters(), self.config.mu)


# -------------------------------------------------------------------------------------- TDM's step
#
# Algorithm 1 updates the fake score first and the student against the new one, as toy/tdm.py does.
# Here both go backward at once, so the student sees the fake score of one update before: gradients
# can then be accumulated and sent between processes once a step, as for every other method.


@dataclass(frozen=True)
class TDMConfig:
    """TDM's settings. Ks: the numbers of steps that K is drawn from. N: the grid of those steps.

    told_ks: those that student and fake score are told apart (sdxl/num_steps.py).
    w: guidance of the real score. fake_weight, loss: of tdm.fake_loss and tdm.student_loss.
    """

    schedule: Schedule
    Ks: tuple[int, ...] = (4,)
    told_ks: tuple[int, ...] = ()
    N: int = 250
    w: float = 7.0
    fake_weight: str = "exact"
    loss: str = "huber"
    make_solver: object = SOLVERS["ddim"]


@dataclass
class TDMStep:
    """TDM on a frozen base, the real score: student and fake score are LoRAs.

    Of several K (TDM-unify) both are told which it is.
    """

    base: nn.Module
    lora: LoRA
    fake_lora: LoRA
    config: TDMConfig
    ddp_modules: list = field(default_factory=list)

    def __post_init__(self):
        self.schedule = self.config.schedule
        self.teacher = LoRANetwork(self.base)
        self.student = self.output_network = LoRANetwork(self.base, "student", self.lora)
        self.fake = LoRANetwork(self.base, "fake", self.fake_lora)
        self.student_ddp, self.fake_ddp = self.student, self.fake
        self.modules = {"student": self.student, "fake": self.fake}

    def sampler(self, k: int):
        """The student's network eps(x_t, t, cond) for k steps, and a maker of its solver."""
        return self._tell(self.student, k), self.config.make_solver

    def distribute(self, wrap_ddp) -> None:
        """Average the gradients of both LoRAs over the processes."""
        self.student_ddp, self.fake_ddp = wrap_ddp(self.student), wrap_ddp(self.fake)
        self.ddp_modules = [self.student_ddp, self.fake_ddp]

    def sample(self, shape, generator: torch.Generator, device) -> tdm.StepSample:
        """A step's random numbers for samples of this shape, from a CPU generator."""
        return tdm.sample_step(self.config.Ks, shape, self.config.N, generator).to(device)

    def losses(self, x_0, cond, null, sample: tdm.StepSample) -> dict[str, Tensor]:
        """Algorithm 1, lines 4-12: "total" for the backward pass, and its parts; batch means.

        x_0 is not used: TDM trains from prompts alone.
        """
        config, schedule = self.config, self.schedule
        if config.told_ks:
            cond, null = num_steps.with_crop_top(cond, 0), num_steps.with_crop_top(null, 0)
        # Lines 4-7: the student's sample at t_m, and the same diffused to tau.
        student = conditioned(self._tell(self.student_ddp, sample.K), cond)
        p = tdm.generate(student, sample, schedule, config.make_solver)
        # Lines 9 and 10: the fake score denoises the student's samples.
        fake = conditioned(self._tell(self.fake_ddp, sample.K), cond)
        fake_loss = tdm.fake_loss(fake, p.detach(), schedule, config.fake_weight).mean()
        # Line 12. Neither loss has a gradient for the other's weights.
        real = guided(self.teacher, cond, null, config.w)
        fake = conditioned(self._tell(self.fake, sample.K), cond)
        loss = tdm.student_loss(real, fake, p, schedule, config.loss).mean()
        return {"total": loss + fake_loss, "loss": loss, "fake": fake_loss}

    def after_step(self) -> None:
        """TDM has no moving average."""

    def _tell(self, network, k: int):
        return num_steps.with_nearest_k(network, k, self.config.told_ks)
