"""A distillation from its settings: training step, optimizers, loss scale."""

import copy
from dataclasses import dataclass, replace

import torch
from torch import nn

from sdxl import num_steps
from sdxl.lora import LoRA, init_scalar_embedding
from sdxl.pipeline import compile_blocks
from solvers import ONE_STEP, SOLVERS, sdxl_schedule
from tcd import TCF
from tdd import pseudo_huber, squared_l2, targets_of
from training import loop
from training.adversarial import Discriminator
from training.distill import TDDConfig, TDDStep, TDMConfig, TDMStep
from unet import UNet

DISTANCES = {"l2": squared_l2, "huber": pseudo_huber}


@dataclass(frozen=True)
class DistillConfig:
    """What is distilled, and how: the paper's settings for SDXL unless given.

    method: tdd, cm, pcm, tcd or tdm. reach: e of Eq. 7, T/kmin unless given. Ks: TDM's K, or the K
    whose next stops are TDD's targets. tell_k: tell the student which of several K. w: the range of
    w', or TDM's guidance twice. mu: rate of the moving average. tcf, solver: names in tcd.TCF and
    solvers.SOLVERS. pairs: from "data" or the "teacher"'s path. full: train the whole UNet.
    """

    method: str = "tdd"
    tcf: str = "1"
    kmin: int = 4
    kmax: int = 8
    reach: float | None = None
    eta: float = 0.3
    rho: float = 0.2
    w: tuple[float, float] = (3.5, 3.5)
    solver_steps: int = 250
    solver: str = "ddim"
    mu: float = 0.0
    loss: str = "l2"
    adv: bool = False
    adv_weight: float = 0.1
    Ks: tuple[int, ...] = ()
    tell_k: bool = True
    k_lr: float = 1e-4
    pairs: str = "data"
    fake_weight: str = "exact"
    full: bool = False
    rank: int = 64
    alpha: float = 8.0
    lr: float = 1e-6
    adv_lr: float = 1e-5
    fake_lr: float = 5e-6
    weight_decay: float = 0.0
    seed: int = 0
    checkpointing: bool = True
    compile: bool = False

    @classmethod
    def of_method(cls, method: str) -> "DistillConfig":
        """The paper's settings for a method: the offset eta is TDD's alone, TDM has its own."""
        if method == "tdm":
            return cls(method, w=(7.0, 7.0), loss="huber", Ks=(4,))
        return cls(method, eta=0.3 if method == "tdd" else 0.0)

    @property
    def scalar(self) -> str:
        """The kind of scalar that the student takes as an input, "" for none."""
        return "target_time" if self.tcf == "s" else ""

    @property
    def told_ks(self) -> tuple[int, ...]:
        """The K that the student is told apart, () for none."""
        return self.Ks if self.tell_k and len(self.Ks) > 1 else ()


def describe_guidance(config: DistillConfig) -> str:
    """g and the paper's w', for whoever starts a run."""
    low, high = config.w
    g, w = f"{1 + low:g}", f"{low:g}"
    if low < high:
        g, w = f"{g} to {1 + high:g}", f"{w} to {high:g}"
    return f"guidance to distil: g = {g}, the paper's w' = g - 1 = {w}"


def build_tdd_config(config: DistillConfig, device) -> TDDConfig:
    """Algorithm 1's settings; ValueError if kmin, kmax and N do not go together, or for no Phi."""
    if config.solver not in ONE_STEP:
        raise ValueError(
            f"--solver {config.solver} remembers the step before, of other examples: take "
            f"{', '.join(ONE_STEP)}"
        )
    return TDDConfig(
        targets=targets_of(
            config.method, config.solver_steps, config.kmin, config.kmax, config.reach, config.Ks
        ),
        schedule=sdxl_schedule(), eta=config.eta, rho=config.rho, w=config.w,
        mu=config.mu, solver=SOLVERS[config.solver](), jump=TCF[config.tcf],
        distance=DISTANCES[config.loss], adv_weight=config.adv_weight, told_ks=config.told_ks,
    )  # fmt: skip


def build_step(
    config: DistillConfig, unet: UNet, device, init_lora: LoRA | None = None
) -> TDDStep | TDMStep:
    """The frozen UNet on its device, and all that is trained on it; init_lora: where to go on from.

    Raises ValueError if the UNet takes a scalar, or the LoRA another one than the student.
    """
    if unet.config.scalar:
        raise ValueError("the model's UNet takes a target time: it cannot be a teacher")
    unet.to(device, memory_format=torch.channels_last)
    unet.checkpoint_blocks(config.checkpointing)
    # The seed alone decides: every process starts from the same LoRA.
    generator = torch.Generator().manual_seed(config.seed)
    if config.method == "tdm":
        step = _build_tdm(config, unet, device, generator, init_lora)
    else:
        step = _build_tdd(config, unet, device, generator, init_lora)
    if config.compile:
        compile_blocks(unet)
    return step


def _build_tdd(config: DistillConfig, unet: UNet, device, generator, init_lora) -> TDDStep:
    lora = full = discriminator = None
    if config.full:
        full = copy_unet(unet, config.scalar, generator)
    else:
        lora = build_lora(config, unet, generator, init_lora).to(device)
    if config.adv:
        discriminator = Discriminator(unet, sdxl_schedule().T // config.kmin, config.seed)
    return TDDStep(unet, lora, build_tdd_config(config, device), discriminator, full)


def _build_tdm(config: DistillConfig, unet: UNet, device, generator, init_lora) -> TDMStep:
    lora = build_lora(config, unet, generator, init_lora).to(device)
    fake_lora = build_lora(config, unet, generator, None).to(device)
    tdm_config = TDMConfig(
        schedule=sdxl_schedule(), Ks=config.Ks, told_ks=config.told_ks, N=config.solver_steps,
        w=config.w[0], fake_weight=config.fake_weight, loss=config.loss,
        make_solver=SOLVERS[config.solver],
    )  # fmt: skip
    return TDMStep(unet, lora, fake_lora, tdm_config)


def build_lora(config: DistillConfig, unet: UNet, generator, init_lora: LoRA | None) -> LoRA:
    """The student's LoRA, new or from init_lora; ValueError if that takes another scalar or K."""
    lora = LoRA.init(unet, config.rank, config.alpha, generator, config.scalar)
    if Ks := config.told_ks:
        lora = num_steps.add_k_adapter(lora, unet, Ks, config.rank, config.alpha, generator)
    if init_lora is None:
        return lora
    embedding = init_lora.scalar_embedding
    if embedding is not None and not config.scalar:
        raise ValueError("--init takes a target time as an input, this student no scalar")
    # A file's adapters are at full strength, and stay so under this run's alpha.
    scale = config.alpha / config.rank
    adapters = {name: adapter.scaled(scale) for name, adapter in init_lora.adapters.items()}
    linear_1, linear_2 = num_steps.LINEAR_1, num_steps.LINEAR_2
    if Ks and linear_1 in adapters:
        adapter, reader = init_lora.adapters[linear_1], lora.adapters[linear_1].down
        down = adapter.down[: len(Ks)].float()
        if len(down) < len(Ks) or not torch.allclose(down, reader[: len(Ks)], atol=5e-3):
            raise ValueError(f"--init changes {linear_1}, but not to be told these K")
        adapters[linear_1] = num_steps.KAdapter.from_adapter(adapter)
    if Ks:
        adapters = {name: lora.adapters[name] for name in (linear_1, linear_2)} | adapters
    return LoRA(adapters, embedding or lora.scalar_embedding).requires_grad_()


def copy_unet(unet: UNet, scalar: str, generator: torch.Generator) -> UNet:
    """A float32 copy of the UNet to train as a whole, with an embedding of its scalar, if any."""
    # Not channels_last: what is sharded must lie in memory as it is indexed.
    full = copy.deepcopy(unet).float().to(memory_format=torch.contiguous_format)
    full.config = replace(unet.config, scalar=scalar)
    if scalar:
        embedding = init_scalar_embedding(unet, generator)
        full.scalar_embedding = embedding.to(unet.conv_in.weight.device)
    return full.requires_grad_()


def build_optimizers(config: DistillConfig, step: TDDStep | TDMStep) -> dict:
    """An AdamW for the student, and one for the fake score or the discriminator's heads."""
    student = _student_groups(config, step.student)
    # Each of two networks is what the other trains against: momentum would lead to where that was.
    no_momentum = (0.0, 0.999)
    if config.method == "tdm":
        # The fake score has to follow the student in all that the student learns.
        k_lr = config.k_lr * config.fake_lr / config.lr if config.lr else config.k_lr
        fake = _student_groups(replace(config, lr=config.fake_lr, k_lr=k_lr), step.fake)
        return {
            "adam": loop.adamw(student, config.lr, config.weight_decay, no_momentum),
            "adam_fake": loop.adamw(fake, config.fake_lr, config.weight_decay, no_momentum),
        }
    optimizers = {"adam": loop.adamw(student, config.lr, config.weight_decay)}
    if step.discriminator is not None:
        heads = step.discriminator.heads.parameters()
        optimizers["adam_heads"] = loop.adamw(
            heads, config.adv_lr, config.weight_decay, no_momentum
        )
    return optimizers


def _student_groups(config: DistillConfig, student: nn.Module) -> list[dict]:
    """The student's weights for an optimizer; the vectors of K at a rate of their own.

    At 1e-6 a vector could move by 0.02 in 20,000 steps, which is a rounding error beside the
    base's. Nor should a decay draw them to 0, where they would cancel nothing any more.
    """
    vectors = [m.up for m in student.modules() if isinstance(m, num_steps.KAdapter)]
    others = [p for p in student.parameters() if all(p is not vector for vector in vectors)]
    groups = [{"params": others, "lr": config.lr, "weight_decay": config.weight_decay}]
    if vectors:
        groups.append({"params": vectors, "lr": config.k_lr, "weight_decay": 0.0})
    return groups


def loss_scaler(device: str, enabled: bool) -> torch.amp.GradScaler:
    """What multiplies losses by up to 2^16 and more, so that fp16's gradients do not vanish.

    The factor is halved after a step whose gradient overflows, and doubled after 2,000 others.
    """
    return torch.amp.GradScaler(torch.device(device).type, enabled=enabled)
