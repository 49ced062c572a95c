"""bench.py's `train`: one training step beside the published recipe's.

The published script keeps two whole UNets, in float32 and under autocast, and takes three plain
passes and one with gradients. "diffusers bf16" is the same with both bases in bfloat16, which is in
its users' reach. Rank, targets, batch, loss and checkpointing are equal on all sides.
"""

import json
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

import train_sdxl
from benchmarks.inference import as_theirs, inputs, theirs_config
from benchmarks.measure import alternate, child, peak_rss, report
from sdxl.load import cast
from sdxl.lora import TARGETS
from sdxl.pipeline import DTYPES, null_of
from solvers import integrate_eps, sdxl_schedule
from tdd import draw, targets_of
from training import build
from training.distill import StepDraws
from unet import UNet, UNetConfig

# -------------------------------------------------------------------------------------- both sides
#
# The published step is written down here as its script takes it, of stock parts alone: what it
# costs is then the recipe's own cost and none of this project's making.


class Published:
    """The published recipe's step, from diffusers and peft."""

    def __init__(self, config: UNetConfig, device: str, dtype):
        from diffusers import UNet2DConditionModel
        from peft import LoraConfig

        with torch.device(device):
            unets = [UNet2DConditionModel(**theirs_config(config)).to(dtype) for _ in range(2)]
        self.teacher, self.student = (unet.requires_grad_(False) for unet in unets)
        targets = TARGETS.pattern[1:-2].replace("\\", "").split("|")
        self.student.add_adapter(LoraConfig(r=64, lora_alpha=8, target_modules=targets))
        self.student.train()
        self.student.enable_gradient_checkpointing()
        self.trained = [p for p in self.student.parameters() if p.requires_grad]
        # What is trained stays in float32 under autocast, whatever the base is kept in.
        for p in self.trained:
            p.data = p.data.float()
        self.optimizer = torch.optim.AdamW(self.trained, 1e-6, weight_decay=0)
        self.autocast = torch.autocast("cuda", torch.bfloat16, device.startswith("cuda"))
        self.schedule = sdxl_schedule().to(device)

    def jump(self, unet, x_t, t, s, cond):
        with self.autocast:
            eps = as_theirs(unet, x_t, t, cond)
        return integrate_eps(x_t, eps.float(), t, s, self.schedule)

    def __call__(self, x_0, cond, null, d) -> None:
        x_next = self.schedule.diffuse(x_0, d.noise, d.t_next)
        pred = self.jump(self.student, x_next, d.t_next, d.tau, cond)
        # Both conditions a pass each, for the whole batch: dropped prompts are guided as well.
        with torch.no_grad():
            given = self.jump(self.teacher, x_next, d.t_next, d.t_n, cond)
            empty = self.jump(self.teacher, x_next, d.t_next, d.t_n, null)
            aim = self.jump(self.student, given + 3.5 * (given - empty), d.t_n, d.tau, cond)
        (pred - aim).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Ours:
    """The same step by train_sdxl.py's own parts."""

    def __init__(self, config: UNetConfig, device: str, dtype, *flags: str):
        args = train_sdxl.parser().parse_args(["--model", "-", "--data", "-", *flags])
        train_sdxl.check(args)
        with torch.device(device):
            unet = UNet(config).requires_grad_(False)
        cast(unet, dtype)
        self.nets = build.distillation_of(args, unet, device)
        self.optimizer = build.optimizers_of(args, self.nets)["adam"]

    def __call__(self, x_0, cond, null, d) -> None:
        self.nets.losses(x_0, cond, null, StepDraws(d, 3.5))["total"].backward()
        torch.nn.utils.clip_grad_norm_(self.nets.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


# ---------------------------------------------------------------------------------------- measuring
#
# Time is compared in one process, where all sides take turns; memory has to be each side's own.


def makers(args, config: UNetConfig) -> dict:
    """What makes each side, by name."""
    ours = config, args.device, DTYPES[args.dtype]
    made = {"diffusers": partial(Published, config, args.device, torch.float32)}
    made["ours"] = partial(Ours, *ours)
    if args.device.startswith("cuda"):
        made["diffusers bf16"] = partial(Published, config, args.device, torch.bfloat16)
    return made | ({"ours compiled": partial(Ours, *ours, "--compile")} if args.compile else {})


def stepper(args, make, config: UNetConfig, side: int):
    """A call that takes one training step on random data; both sides draw the same."""
    step, generator, targets = make(), torch.Generator().manual_seed(0), targets_of("tdd", 250)
    x_0, _, cond = inputs(config, args.batch_size, side, args.device, torch.float32)
    null = {k: v.expand_as(cond[k]) for k, v in null_of(cond).items()}

    def call():
        d = draw(targets, x_0.shape, 0.3, 0.2, generator)
        step(x_0, cond, null, d.to(args.device))

    return call


def bench_train(args, config: UNetConfig, side: int):
    """Seconds with all sides in one process, memory with each in its own; returns our step."""
    # What the imports alone take is no side's doing.
    made, before = makers(args, config), peak_rss()
    if args.child:
        step = stepper(args, made[args.child], config, side)
        step(), step()
        gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        return print(json.dumps((gpu or 1024 * (peak_rss() - before)) / 2**30))
    peaks = {name: child(args, name) for name in made}
    steps = {name: stepper(args, make, config, side) for name, make in made.items()}
    seconds = alternate(steps, args.rounds, args.device)
    with FlopCounterMode(display=False) as counter:
        # The mean of some: how many examples the teacher guides changes from step to step.
        for _ in range(4):
            steps["ours"]()
    best, flops = min(v for k, v in seconds.items() if "ours" in k), counter.get_total_flops() / 4
    rate = matmul_rate(args.device, DTYPES[args.dtype])
    more = {f"peak GiB {k}": f"{v:.2f} ({v / peaks['diffusers']:.2f})" for k, v in peaks.items()}
    more["ours, images/s"] = f"{args.batch_size / best:.3g}"
    more["TFLOP a step"] = f"{flops / 1e12:.3g}"
    more["of the matmul rate"] = f"{flops / best / rate:.2f} ({rate / 1e12:.3g} TFLOP/s)"
    report(f"training step, batch {args.batch_size}, {8 * side} pixels", seconds, **more)
    return steps["ours"]


def matmul_rate(device: str, dtype) -> float:
    """FLOP/s of a large square product in this precision: what the machine can do at best."""
    n = 8192 if device.startswith("cuda") else 2048
    # Large enough that memory's speed does not count, small enough to take no time itself.
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / alternate({"matmul": lambda: a @ b}, 10, device)["matmul"]
