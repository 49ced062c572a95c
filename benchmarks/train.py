"""One training step beside the published recipe's.

The published script keeps two whole UNets in float32 under autocast, and takes three plain passes
and one with gradients. On a GPU it is also measured with both bases in bf16, which its users could
choose. Rank, targets, batch, loss and checkpointing are equal on all sides.
"""

import math
import time
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measure
from benchmarks.measure import BenchConfig, Report
from benchmarks.models import call_diffusers, diffusers_unet, random_batch, random_unet
from sdxl.lora import TARGET_MODULES
from sdxl.pipeline import DTYPES, null_condition
from solvers import integrate_eps, sdxl_schedule
from tdd import StepSample, sample_step, targets_of
from training.build import DistillConfig, build_optimizers, build_step, loss_scaler
from training.distill import TDDStepSample

# -------------------------------------------------------------------------------------- both sides
#
# The published step is written as its script takes it, of diffusers' and peft's parts alone, so its
# cost is the recipe's and not this project's.


class Published:
    """The published recipe's networks, optimizer and loss; dtype: of both bases."""

    def __init__(self, config: BenchConfig, dtype: torch.dtype):
        from peft import LoraConfig

        self.teacher = diffusers_unet(config.unet, dtype, config.device)
        self.student = diffusers_unet(config.unet, dtype, config.device)
        targets = TARGET_MODULES.pattern[1:-2].replace("\\", "").split("|")
        self.student.add_adapter(LoraConfig(r=64, lora_alpha=8, target_modules=targets))
        self.student.train()
        self.student.enable_gradient_checkpointing()
        self.trained = [p for p in self.student.parameters() if p.requires_grad]
        # Trained weights are float32 under autocast, whatever the precision of the base.
        for p in self.trained:
            p.data = p.data.float()
        self.optimizer = torch.optim.AdamW(self.trained, 1e-6, weight_decay=0)
        self.scaler = loss_scaler(config.device, False)
        self.autocast = torch.autocast("cuda", torch.bfloat16, config.on_gpu)
        self.schedule = sdxl_schedule()

    def jump(self, unet, x_t: Tensor, t: Tensor, s: Tensor, cond: dict) -> Tensor:
        with self.autocast:
            eps = call_diffusers(unet, x_t, t, cond)
        return integrate_eps(x_t, eps.float(), t, s, self.schedule)

    def loss(self, x_0: Tensor, cond: dict, null: dict, sample: StepSample) -> Tensor:
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
    """The same by training/build.py's parts; dtype: of the base, by name."""

    def __init__(self, config: BenchConfig, dtype: str, compile: bool = False):
        distill = DistillConfig(compile=compile)
        base = random_unet(config.unet, DTYPES[dtype], config.device)
        self.step = build_step(distill, base, config.device)
        self.trained = list(self.step.student.parameters())
        self.optimizer = build_optimizers(distill, self.step)["adam"]
        self.scaler = loss_scaler(config.device, dtype == "fp16")

    def loss(self, x_0: Tensor, cond: dict, null: dict, sample: StepSample) -> Tensor:
        return self.step.losses(x_0, cond, null, TDDStepSample(sample, 3.5))["total"]


def make_call(config: BenchConfig, side: Published | Ours, b: int):
    """A call that takes one training step on b random latents; all sides draw the same."""
    generator, targets = torch.Generator().manual_seed(0), targets_of("tdd", 250)
    x_0, cond = random_batch(config.unet, b, config.side, config.device)
    null = {name: tensor.expand_as(cond[name]) for name, tensor in null_condition(cond).items()}

    def call():
        sample = sample_step(targets, x_0.shape, 0.3, 0.2, generator).to(config.device)
        side.scaler.scale(side.loss(x_0, cond, null, sample)).backward()
        side.scaler.unscale_(side.optimizer)
        torch.nn.utils.clip_grad_norm_(side.trained, 1.0)
        side.scaler.step(side.optimizer)
        side.scaler.update()
        side.optimizer.zero_grad()

    return call


# --------------------------------------------------------------------------------------- measuring

LARGEST_PUBLISHED = 8  # images a step: with 16, the published step takes a GPU several seconds
COUNTED_IMAGES = 16  # how many of them the teacher guides, and so the FLOP, varies


def bench_train(config: BenchConfig, report: Report):
    """A step of TDD on all sides for each batch size; returns our call with the first."""
    sides = {
        "published": partial(Published, config, torch.float32),
        "ours": partial(Ours, config, config.dtype),
    }
    if config.on_gpu:
        sides["published_bf16"] = partial(Published, config, torch.bfloat16)
    if config.compile:
        sides["ours_compiled"] = partial(Ours, config, config.dtype, compile=True)
    calls = compare_steps(config, report, sides)
    if config.on_gpu or config.tiny:
        for b in config.batch_sizes:
            with report.part(f"batch {b}, kernels of ours") as figures:
                figures |= measure.count_kernels(config, calls["ours", b])
    return calls.get(("ours", config.batch_sizes[0]))


def compiled_step(config: BenchConfig, report: Report) -> None:
    """Our step with torch.compile, batch 4."""
    sides = {"ours_compiled": partial(Ours, config, config.dtype, compile=True)}
    compare_steps(replace(config, batch_sizes=(4,)), report, sides)


def compare_steps(config: BenchConfig, report: Report, sides: dict) -> dict:
    """Memory and seconds of a step of each side, and what share of the matmul rate ours reaches.

    sides: what builds each, by name. Returns the calls that take a step, by name and batch size.
    """
    if not config.on_gpu and not config.tiny:
        # Before anything is built: a process inherits its parent's peak.
        with report.part("peak GiB") as figures:
            for b in config.batch_sizes:
                for name, build in sides.items():
                    peak = measure.run_alone(measure_rss, config, build, b)
                    figures[f"{name}, batch {b}"] = peak
    calls = {}
    for name, build in sides.items():
        with report.part(name) as figures:
            others = measure.allocated_gib(config)
            side, start = build(), time.perf_counter()
            # The first step makes the optimizer's moments.
            make_call(config, side, config.batch_sizes[0])()
            figures["first_step_s"] = time.perf_counter() - start
            for b in config.batch_sizes:
                if not name.startswith("ours") and b > LARGEST_PUBLISHED:
                    figures[f"batch {b}"] = f"left out, above {LARGEST_PUBLISHED}"
                    continue
                call = make_call(config, side, b)
                memory = measure.memory_gib(config, call, others)
                figures |= {f"batch {b}, {key}": value for key, value in memory.items()}
                calls[name, b] = call
    if "ours" in sides:
        with report.part("rates") as rates:
            b = max(config.batch_sizes)
            tflop = count_tflop(calls["ours", b], steps=math.ceil(COUNTED_IMAGES / b))
            rates["tflop_an_image"] = tflop / b
            rates["matmul_tflops"] = measure.matmul_rate(config)
    for b in config.batch_sizes:
        with report.part(f"batch {b}") as figures:
            turns = {name: calls[name, b] for name in sides if (name, b) in calls}
            figures |= measure.compare(config, turns)
            if "ours" in turns:
                images_per_s = figures["images_per_s"] = b / figures["ours_s"]
                tflops = images_per_s * rates["tflop_an_image"]
                figures["share_of_matmul_rate"] = tflops / rates["matmul_tflops"]
    return calls


def count_tflop(call, steps: int) -> float:
    """TFLOP of a step, recomputation included, as a mean; on a CPU without attention."""
    with FlopCounterMode(display=False) as counter:
        for _ in range(steps):
            call()
    return counter.get_total_flops() / 1e12 / steps


def measure_rss(config: BenchConfig, build, b: int) -> float:
    """A side's peak memory in GiB on a CPU beyond the imports, in a process of its own."""
    before = measure.peak_rss()
    call = make_call(config, build(), b)
    call()
    call()
    return (measure.peak_rss() - before) / 2**20
