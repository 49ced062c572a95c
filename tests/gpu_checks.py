"""Sections of `bench.py gpu` that ask whether a GPU computes the right thing, and how it is driven.

All but `effect` run tiny networks, on a CPU as on a GPU.
"""

import copy
import tempfile
import traceback
import warnings
import zlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import TINY, BenchConfig, Report, relative_error
from benchmarks.models import random_batch, random_unet
from sdxl.lora import LoRA, merge, named_layers
from sdxl.pipeline import DTYPES, SamplerConfig, null_condition, sample_latents
from sdxl.weights import cast, use_exact_float32
from solvers import SOLVERS
from training import cache, distributed, loop
from training.build import DistillConfig, build_optimizers, build_step, loss_scaler
from training.checkpoint import TrainState
from training.distill import LoRANetwork
from training.paths import PathLoader

ROOT = Path(__file__).resolve().parent.parent
BATCH = 2
# Not where waits come from; an environment may lie in the project's folder.
SKIPPED = ("benchmarks", "bench.py", "venv", ".venv")

# Every method and option of a training step.
_SMALL = {"rank": 8, "alpha": 8.0, "solver_steps": 50}
_TCD, _TDM = DistillConfig.of_method("tcd"), DistillConfig.of_method("tdm")
STEPS = {
    "tdd": DistillConfig(**_SMALL),
    "adv": DistillConfig(adv=True, **_SMALL),
    "ema, range of w": DistillConfig(mu=0.9, w=(1.0, 13.0), **_SMALL),
    "tcf 2": replace(_TCD, tcf="2", **_SMALL),
    "tcf s": replace(_TCD, tcf="s", **_SMALL),
    "dpm++2s": DistillConfig(solver="dpm++2s", **_SMALL),
    "tdm": replace(_TDM, **_SMALL),
    "tdm-unify": replace(_TDM, Ks=(1, 2, 4), **_SMALL),
    "told K": DistillConfig(Ks=(4, 6, 8), eta=0.0, **_SMALL),
}
# From the teacher's path, which is walked before the first step.
PATHS = {
    "told K, paths": replace(STEPS["told K"], pairs="teacher", solver_steps=10),
    "adv, range of w, paths": replace(
        STEPS["adv"], pairs="teacher", w=(1.0, 13.0), solver_steps=10
    ),
}

# ---------------------------------------------------------------------------------- what they share


def noise_like(name: str, p: Tensor) -> Tensor:
    """Standard normal numbers in p's shape that depend on the name alone."""
    generator = torch.Generator(p.device).manual_seed(zlib.crc32(name.encode()))
    return torch.randn(p.shape, generator=generator, device=p.device)


@torch.no_grad()
def set_effect(lora: LoRA, base: torch.nn.Module, size: float, seed: str = "") -> LoRA:
    """Give a LoRA adapters that change each layer's weight W by dW, with |dW| = size |W|."""
    layers = named_layers(base)
    for name, adapter in lora.adapters.items():
        up = noise_like(f"{seed}{name}", adapter.up)
        change = adapter.scale * up.flatten(1) @ adapter.down.flatten(1)
        adapter.up.copy_(up * (size * layers[name].weight.float().norm() / change.norm()))
    if lora.scalar_embedding is not None:
        for name, p in lora.scalar_embedding.linear_2.named_parameters():
            p.copy_(0.1 * noise_like(f"{seed}{name}", p))
    return lora


def set_effects(step, size: float = 0.02) -> None:
    """Give all LoRAs of a training step an effect, the fake score's another one."""
    for name, module in step.modules.items():
        if module_lora := getattr(module, "lora", None):
            set_effect(module_lora, step.base, size, "fake" if name == "fake" else "")


class RandomLatents:
    """An endless loader of one batch in pinned memory, as training/streams.py's Loader has it."""

    bad = position = 0

    def __init__(self, config: BenchConfig, b: int):
        x_0, cond = random_batch(config.unet, b, config.side)
        self.batch = {"latents": x_0, **cond}
        if config.on_gpu:
            self.batch = {name: tensor.pin_memory() for name, tensor in self.batch.items()}
        self.batch["names"] = [f"latents {i}" for i in range(b)]

    def __next__(self) -> dict:
        return dict(self.batch)


class UnsavedState(TrainState):
    """A TrainState without checkpoints."""

    def save(self, keep: int) -> None:
        """Nothing: a check is not resumed."""


class RandomPaths(PathLoader):
    """Walkers on the teacher's path to conditions of random numbers, b a batch."""

    def __init__(self, config: BenchConfig, step, b: int, generator: torch.Generator):
        shape = (4, config.side, config.side)
        super().__init__(step, shape, b, generator, config.device, self.draw_conds)
        _, self.cond = random_batch(config.unet, b, config.side)
        if config.on_gpu:
            self.cond = {name: tensor.pin_memory() for name, tensor in self.cond.items()}
        on_device = {k: tensor.to(config.device) for k, tensor in self.cond.items()}
        self.start(partial(self.encode, on_device))

    def draw_conds(self, count: int) -> list:
        """Which of them it is does not matter here."""
        return [("", "noise")] * count

    def encode(self, cond: dict, conds: list) -> tuple:
        """The first of them, and their null condition."""
        cond = {name: tensor[: len(conds)] for name, tensor in cond.items()}
        return cond, null_condition(cond)

    def __next__(self) -> dict:
        return {**super().__next__(), **self.cond}


class Training:
    """train_sdxl.py's training on b random latents, as from --cache, of LoRAs with an effect.

    Or on the teacher's path to random conditions. wrap: as of `step.distribute`.
    """

    def __init__(self, config: BenchConfig, distill: DistillConfig, dtype: str, b: int, wrap=None):
        self.device = config.device
        base = random_unet(config.unet, DTYPES[dtype], config.device)
        self.step = build_step(distill, base, config.device)
        set_effects(self.step)
        self.generator = torch.Generator().manual_seed(0)
        self.shape = (b, 4, config.side, config.side)
        if distill.pairs == "teacher":
            loader = RandomPaths(config, self.step, b, self.generator)
        else:
            loader = RandomLatents(config, b)
        self.folder = tempfile.TemporaryDirectory()
        scaler = loss_scaler(config.device, dtype == "fp16")
        self.state = UnsavedState(
            Path(self.folder.name), self.step.modules, build_optimizers(distill, self.step),
            self.generator, loader, {}, scaler=scaler,
        )  # fmt: skip
        if wrap is not None:
            self.step.distribute(wrap)

    def losses(self, batch: dict) -> dict:
        tensors = {name: batch[name] for name in cache.TENSORS if name in batch}
        cond = {name: x.to(self.device, non_blocking=True) for name, x in tensors.items()}
        x_0 = cond.pop("latents", None)
        walkers = {"walkers": batch["walkers"]} if x_0 is None else {}
        sample = self.step.sample(self.shape, self.generator, self.device, **walkers)
        batch["timesteps"] = sample.timesteps
        return self.step.losses(x_0, cond, null_condition(cond), sample)

    def fit(self, steps: int) -> list[dict]:
        """Train so many steps; returns their lines in the log."""
        target = self.state.step + steps
        train_config = loop.TrainConfig(steps=target, lr_lambda=lambda step: 1.0)
        step = self.step
        loop.fit(self.state, train_config, self.losses, step.after_step, step.ddp_modules)
        return self.state.log[-steps:]


def compare_logs(log: list[dict], expected: list[dict]) -> dict:
    """The largest relative differences of loss and gradient norm between two runs' logs.

    Raises ValueError if they are not of the same steps.
    """
    if [line["step"] for line in log] != [line["step"] for line in expected]:
        raise ValueError(f"the logs have {len(log)} and {len(expected)} steps")
    figures = {}
    for name in ("loss", "grad_norm"):
        differences = [0.0]
        for line, other in zip(log, expected, strict=True):
            # A step that overflowed has no gradient norm.
            if None not in (line[name], other[name]):
                differences.append(abs(line[name] - other[name]) / abs(other[name]))
        figures[name] = max(differences)
    return figures


# ----------------------------------------------------------------------------- correct: CPU and GPU


def correct(config: BenchConfig, report: Report) -> None:
    """Latents and gradients of a tiny SDXL: the device against the CPU's float32."""
    use_exact_float32(torch.float32)
    side = replace(config, tiny=True).side
    for clip_steps in (0, 2):
        with report.part(f"latents, C in {clip_steps} of 4 steps") as figures:
            sampler = SamplerConfig(clip_steps=clip_steps)
            expected = tiny_latents(sampler, "float32", side, "cpu")
            for dtype in DTYPES:
                latents = tiny_latents(sampler, dtype, side, config.device)
                figures[dtype] = relative_error(latents, expected)
    for name, distill in STEPS.items():
        with report.part(f"step: {name}") as figures:
            loss, expected, _ = tiny_gradient(distill, "float32", side, "cpu")
            figures["loss"] = loss
            for dtype in DTYPES:
                step = tiny_gradient(distill, dtype, side, config.device)
                figures[dtype] = compare_gradient(*step, loss, expected)


@torch.no_grad()
def tiny_latents(sampler: SamplerConfig, dtype: str, side: int, device) -> Tensor:
    """Latents of two pictures by the gamma-sampler."""
    unet = random_unet(TINY, DTYPES[dtype], "cpu").to(device)
    _, cond = random_batch(TINY, BATCH, side, device)
    shape = (4, side, side)
    return sample_latents(sampler, unet, cond, null_condition(cond), shape, range(BATCH), device)


def tiny_gradient(
    distill: DistillConfig, dtype: str, side: int, device
) -> tuple[float, Tensor, float]:
    """A training step's loss, its gradient in all that is trained, and what the loss was scaled by.

    Weights and random numbers come from the CPU. In fp16 the scale is halved until nothing
    overflows, as the training loop does over its first steps.
    """
    unet = random_unet(TINY, torch.float32, "cpu")
    step = build_step(distill, unet, "cpu")
    set_effects(step)
    cast(unet, DTYPES[dtype])
    for module in (unet, *step.modules.values()):
        module.to(device)
    x_0, cond = random_batch(TINY, BATCH, side, device)
    sample = step.sample(x_0.shape, torch.Generator().manual_seed(7), device)
    trained = []
    for module in step.modules.values():
        trained += [p for p in module.parameters() if p.requires_grad]
    scale = 2.0**16 if dtype == "fp16" else 1.0
    while True:
        total = step.losses(x_0, cond, null_condition(cond), sample)["total"]
        gradients = torch.autograd.grad(scale * total, trained)
        gradient = torch.cat([each.flatten().double().cpu() for each in gradients]) / scale
        if gradient.isfinite().all() or scale <= 1:
            return total.item(), gradient, scale
        scale /= 2


def compare_gradient(
    loss: float, gradient: Tensor, scale: float, expected_loss: float, expected: Tensor
) -> dict:
    """Figures of a training step against the CPU's float32."""
    return {
        "loss_error": abs(loss - expected_loss) / abs(expected_loss),
        "gradient_error": relative_error(gradient, expected),
        "cosine": F.cosine_similarity(gradient, expected, dim=0).item(),
        "norm_ratio": (gradient.norm() / expected.norm()).item(),
        "loss_scale": scale,
    }


# ------------------------------------------------------------ waits: where the host waits for a GPU


def waits(config: BenchConfig, report: Report) -> None:
    """Host waits of the sampling loop (the aim is 0) and of a whole training step (1)."""
    config = replace(config, tiny=True)
    unet, side = random_unet(TINY, DTYPES["fp16"], config.device), config.side
    _, cond = random_batch(TINY, BATCH, side, config.device)
    samplers = {name: SamplerConfig(sampler=name, w=1.0) for name in SOLVERS}
    for gamma in (0.0, 0.2):
        for clip_steps in (0, 4):
            name = f"gamma {gamma:g}, C in {clip_steps} steps"
            samplers[name] = SamplerConfig(gamma=gamma, clip_steps=clip_steps)

    def sample(sampler: SamplerConfig) -> None:
        shape, null = (4, side, side), null_condition(cond)
        sample_latents(sampler, unet, cond, null, shape, range(BATCH), config.device)

    for name, sampler in samplers.items():
        with report.part(f"sampling: {name}") as figures, torch.no_grad():
            figures |= count_waits(config, partial(sample, sampler))
    for name, distill in {**STEPS, **PATHS}.items():
        with report.part(f"step: {name}") as figures:
            training = Training(config, distill, "fp16", BATCH)
            figures |= count_waits(config, partial(training.fit, 1))


def count_waits(config: BenchConfig, call) -> dict:
    """How often a call makes the host wait, and in which lines; calls it once before.

    On a CPU nothing waits, and nothing is counted.
    """
    call()
    if not config.on_gpu:
        call()
        return {"waits": None}
    lines = Counter()

    def count(message, category, filename, lineno, file=None, line=None):
        if "called a synchronizing" in str(message):
            lines[_calling_lines()] += 1

    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        warnings.showwarning = count
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {"waits": lines.total(), "lines": dict(lines)}


def _calling_lines() -> str:
    """The three innermost lines of this project that are being run, checks aside."""
    lines = []
    for frame in traceback.extract_stack():
        path = Path(frame.filename)
        is_ours = path.is_relative_to(ROOT) and path != Path(__file__)
        if is_ours and path.relative_to(ROOT).parts[0] not in SKIPPED:
            lines.append(f"{path.relative_to(ROOT)}:{frame.lineno}")
    return " < ".join(lines[:-4:-1]) or "outside of this project"


# ---------------------------------------------------------- effect: what precision leaves of a LoRA

EFFECT = 0.0016  # |dW| / |W| of a distilled LoRA
PASS = 8  # samples that go through the UNet at once; two passes a step, in tiny one


@torch.no_grad()
def effect(config: BenchConfig, report: Report) -> None:
    """What a LoRA changes in the latents of 4 steps, merged and not, in each precision.

    The base is an fp16 file's. Figures of the change are in units of float32's, unmerged.
    """
    use_exact_float32(torch.float32)
    file = random_unet(config.unet, torch.float16, config.device)
    rank = 4 if config.tiny else 64
    lora = LoRA.init(file, rank, rank, torch.Generator().manual_seed(0)).to(config.device)
    set_effect(lora, file, EFFECT)
    expected = None
    for name in ("float32", "fp16", "bf16"):
        dtype = DTYPES[name]
        with report.part(f"{name}, unmerged") as figures:
            base = copy.deepcopy(file)
            cast(base, dtype)
            unmerged = LoRANetwork(base, "lora", lora)
            plain = effect_latents(config, LoRANetwork(base))
            change = effect_latents(config, unmerged) - plain
            expected = change if expected is None else expected
            figures["effect_of_lora"] = (change.norm() / plain.norm()).item()
            figures |= compare_effect(change, expected)
        base = unmerged = None
        with report.part(f"{name}, merged") as figures:
            merged = copy.deepcopy(file)
            cast(merged, dtype)
            merge(merged, [(lora, 1.0)])
            merged.to(memory_format=torch.channels_last)
            figures |= compare_effect(effect_latents(config, merged) - plain, expected)
        merged = None


def effect_latents(config: BenchConfig, network) -> Tensor:
    """Latents of all seeds after four steps without guidance and noise, at most at 512 pixels."""
    side = min(config.side, 64)
    count = PASS if config.tiny else 2 * PASS
    _, cond = random_batch(config.unet, count, side, config.device)
    sampler, latents = SamplerConfig(w=0.0, gamma=0.0), []
    for start in range(0, count, PASS):
        part = {name: tensor[start : start + PASS] for name, tensor in cond.items()}
        seeds = range(start, start + PASS)
        latents.append(sample_latents(
            sampler, network, part, null_condition(part), (4, side, side), seeds, config.device
        ))  # fmt: skip
    return torch.cat(latents)


def compare_effect(change: Tensor, expected: Tensor) -> dict:
    """The projection of a LoRA's effect on the expected one, over the seeds, and its error."""
    change, expected = change.double().flatten(1), expected.double().flatten(1)
    kept = (change * expected).sum(1) / expected.square().sum(1)
    return {
        "kept": kept.mean().item(), "kept_min": kept.min().item(), "kept_max": kept.max().item(),
        "relative_error": ((change - expected).norm() / expected.norm()).item(),
    }  # fmt: skip


# --------------------------------------------------------------------------- nccl: a single process


def nccl(config: BenchConfig, report: Report) -> None:
    """Three steps under DDP and FSDP with one process against none, and none against none."""
    use_exact_float32(torch.float32)
    jobs = {}
    for name in ("tdd", "adv", "tdm"):
        jobs[f"{name}, DDP"] = replace(STEPS[name], lr=1e-4, fake_lr=1e-4, adv_lr=1e-4)
    jobs["tcf s, full, FSDP"] = replace(STEPS["tcf s"], full=True, mu=0.9, lr=1e-4)
    for name, distill in jobs.items():
        with report.part(name) as figures:
            plain = train_three_steps(config, distill)
            figures["losses_without"] = [line["loss"] for line in plain]
            figures["without_twice"] = compare_logs(train_three_steps(config, distill), plain)
            with process_group(config):
                lines = train_three_steps(config, distill, distributed.wrap_ddp)
            figures["losses"] = [line["loss"] for line in lines]
            figures["against_without"] = compare_logs(lines, plain)


@contextmanager
def process_group(config: BenchConfig):
    """A group of this process alone, as training/distributed.py makes larger ones."""
    backend = "cpu:gloo,cuda:nccl" if config.on_gpu else "gloo"
    if config.on_gpu:
        torch.cuda.set_device(0)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            distributed.close()


def train_three_steps(config: BenchConfig, distill: DistillConfig, wrap=None) -> list[dict]:
    """The log of three steps in float32 from the same weights and random numbers."""
    return Training(replace(config, tiny=True), distill, "float32", 4, wrap).fit(3)
