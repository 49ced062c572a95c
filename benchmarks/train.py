"""One training step beside the published recipe's.

The published script keeps two whole UNets in float32 under autocast, and takes three plain passes
and one with gradients. "diffusers bf16" is the same with both bases in bfloat16, which its users
could choose. Rank, targets, batch, loss and checkpointing are equal on all sides.
"""

from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.inference import as_theirs, inputs, theirs_config
from benchmarks.measure import BenchConfig, alternate, peak_rss, report, run_alone
from sdxl.load import cast
from sdxl.lora import TARGET_MODULES
from sdxl.pipeline import DTYPES, null_condition
from solvers import integrate_eps, sdxl_schedule
from tdd import sample_step, targets_of
from training.build import DistillConfig, build_optimizers, build_step
from training.distill import TDDStepSample
from unet import UNet

# -------------------------------------------------------------------------------------- both sides
#
# The published step is written as its script takes it, of diffusers' and peft's parts alone, so its
# cost is the recipe's and not this project's.


class Published:
    """The published recipe's step, from diffusers and peft."""

    def __init__(self, config: BenchConfig, dtype):
        from diffusers import UNet2DConditionModel
        from peft import LoraConfig

        with torch.device(config.device):
            model = UNet2DConditionModel
            unets = [model(**theirs_config(config.unet)).to(dtype) for _ in range(2)]
        self.teacher, self.student = (unet.requires_grad_(False) for unet in unets)
        targets = TARGET_MODULES.pattern[1:-2].replace("\\", "").split("|")
        self.student.add_adapter(LoraConfig(r=64, lora_alpha=8, target_modules=targets))
        self.student.train()
        self.student.enable_gradient_checkpointing()
        self.trained = [p for p in self.student.parameters() if p.requires_grad]
        # Trained weights are float32 under autocast, whatever the precision of the base.
        for p in self.trained:
            p.data = p.data.float()
        self.optimizer = torch.optim.AdamW(self.trained, 1e-6, weight_decay=0)
        self.autocast = torch.autocast("cuda", torch.bfloat16, config.on_gpu)
        self.schedule = sdxl_schedule()

    def jump(self, unet, x_t, t, s, cond):
        with self.autocast:
            eps = as_theirs(unet, x_t, t, cond)
        return integrate_eps(x_t, eps.float(), t, s, self.schedule)

    def loss(self, x_0, cond, null, sample):
        t_next, t_n, tau = sample.t_next, sample.t_n, sample.tau
        x_next = self.schedule.diffuse(x_0, sample.noise, t_next)
        prediction = self.jump(self.student, x_next, t_next, tau, cond)
        # A pass for each condition and the whole batch: dropped prompts are guided as well.
        with torch.no_grad():
            x_cond = self.jump(self.teacher, x_next, t_next, t_n, cond)
            x_null = self.jump(self.teacher, x_next, t_next, t_n, null)
            x_n = x_cond + 3.5 * (x_cond - x_null)
            target = self.jump(self.student, x_n, t_n, tau, cond)
        return (prediction - target).square().mean()


class Ours:
    """The same step by training/build.py's parts."""

    def __init__(self, config: BenchConfig, compile: bool = False):
        distill_config = DistillConfig(compile=compile)
        with torch.device(config.device):
            unet = UNet(config.unet).requires_grad_(False)
        cast(unet, DTYPES[config.dtype])
        self.step = build_step(distill_config, unet, config.device)
        self.trained = list(self.step.student.parameters())
        self.optimizer = build_optimizers(distill_config, self.step)["adam"]

    def loss(self, x_0, cond, null, sample):
        return self.step.losses(x_0, cond, null, TDDStepSample(sample, 3.5))["total"]


# ---------------------------------------------------------------------------------------- measuring
#
# Times are compared in one process where all sides take turns; memory needs a process for each.


def make_sides(config: BenchConfig) -> dict:
    """What builds each side, by name."""
    sides = {"diffusers": partial(Published, config, torch.float32), "ours": partial(Ours, config)}
    if config.on_gpu:
        sides["diffusers bf16"] = partial(Published, config, torch.bfloat16)
    if config.compile:
        sides["ours compiled"] = partial(Ours, config, compile=True)
    return sides


def make_call(config: BenchConfig, make_side):
    """A call that takes one training step on random data; all sides draw the same."""
    side, generator, targets = make_side(), torch.Generator().manual_seed(0), targets_of("tdd", 250)
    x_0, _, cond = inputs(config, config.batch_size, torch.float32)
    null = {name: tensor.expand_as(cond[name]) for name, tensor in null_condition(cond).items()}

    def call():
        sample = sample_step(targets, x_0.shape, 0.3, 0.2, generator)
        side.loss(x_0, cond, null, sample.to(config.device)).backward()
        torch.nn.utils.clip_grad_norm_(side.trained, 1.0)
        side.optimizer.step()
        side.optimizer.zero_grad()

    return call


def measure_peak(config: BenchConfig, side: str) -> float:
    """A side's peak memory in GiB, on a CPU beyond the imports."""
    before = peak_rss()
    call = make_call(config, make_sides(config)[side])
    call()
    call()
    if config.on_gpu:
        return torch.cuda.max_memory_allocated() / 2**30
    return (peak_rss() - before) / 2**20


def bench_train(config: BenchConfig):
    """Seconds with all sides in one process, memory with each in its own; returns our call."""
    sides = make_sides(config)
    peaks = {name: run_alone(measure_peak, config, name) for name in sides}
    calls = {name: make_call(config, make_side) for name, make_side in sides.items()}
    seconds = alternate(calls, config.rounds, config.device)
    with FlopCounterMode(display=False) as counter:
        # A mean of four: the number of examples that the teacher guides varies from step to step.
        for _ in range(4):
            calls["ours"]()
    flops = counter.get_total_flops() / 4
    best = min(value for name, value in seconds.items() if name.startswith("ours"))
    rate = matmul_rate(config.device, DTYPES[config.dtype])
    theirs = peaks["diffusers"]
    figures = {f"peak GiB {name}": f"{x:.2f} ({x / theirs:.2f})" for name, x in peaks.items()}
    figures |= {
        "ours, images/s": f"{config.batch_size / best:.3g}", "TFLOP a step": f"{flops / 1e12:.3g}",
        "of the matmul rate": f"{flops / best / rate:.2f} ({rate / 1e12:.3g} TFLOP/s)",
    }  # fmt: skip
    title = f"training step, batch {config.batch_size}, {8 * config.side} pixels"
    report(title, seconds, **figures)
    return calls["ours"]


def matmul_rate(device: str, dtype) -> float:
    """FLOP/s of a large square product in this precision, the best that the machine can do."""
    n = 8192 if device.startswith("cuda") else 2048
    # Large enough that memory's speed does not count, small enough to take little time.
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / alternate({"matmul": lambda: a @ b}, 10, device)["matmul"]
