"""Every path on torch's meta device, which computes nothing: there a GPU would not be waited for.

Mixed devices and reads of values raise on that device by themselves. Copies from the CPU do not,
and neither do indices that lie there: the two modes below make them raise as well.
"""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.models import random_batch
from common import files
from sdxl.controlnet import ControlNet, ControlNetConfig
from sdxl.pipeline import SamplerConfig, null_condition, sample_latents, with_controlnets
from sdxl.vae import VAE, VAEConfig
from solvers import CLEAN, SOLVERS, sdxl_schedule, solve
from tdd import equidistant, guided
from tests import count
from tests.count import meta_unet
from training import loop
from training.build import DistillConfig, build_optimizers, build_step, loss_scaler
from training.checkpoint import TrainState
from training.paths import PathLoader
from unet import UNetConfig

TINY = UNetConfig(
    channels=(64, 128), transformer_depth=(0, 1), heads=(1, 2), mid_transformer_depth=1,
    layers_per_block=1,
)  # fmt: skip


def sized(names, full):
    """Each name with the tiny network and 16 latent pixels, and with SDXL's and 128 where in full.

    Full size has more blocks and no other code, so a few of it are enough.
    """
    sdxl = UNetConfig(), 128
    return [
        *(pytest.param(name, TINY, 16, id=f"{name}-tiny") for name in names),
        *(pytest.param(name, *sdxl, id=f"{name}-full", marks=pytest.mark.slow) for name in full),
    ]


class Waits(Exception):
    """Here a GPU would be waited for, or be given a tensor of the CPU's."""


class NoCopies(TorchDispatchMode):
    """Raises for copies that wait, and for operators of both devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        on_cpu = [x for x in tensors if not x.is_meta]
        # A number, or a tensor without axes, travels with the call.
        mixed = any(x.is_meta for x in tensors) and any(x.ndim for x in on_cpu)
        name = func._schema.name
        if name == "aten::_to_copy":
            to_device = str(kwargs.get("device", "")).startswith("meta")
            mixed = on_cpu and to_device and not kwargs.get("non_blocking")
        elif name == "aten::copy_":
            mixed = mixed and not (args[2:] and args[2])
        if mixed:
            raise Waits(f"{name} of {[tuple(x.shape) for x in on_cpu]} from the CPU")
        return func(*args, **kwargs)


class NoLiterals(TorchFunctionMode):
    """Raises where numbers become a tensor on the device: a copy that is not dispatched."""

    MAKERS = (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        was_there = args and torch.is_tensor(args[0]) and func is torch.as_tensor
        if func in self.MAKERS and output.is_meta and not was_there:
            raise Waits(f"{func.__name__}{args} on the device")
        return output


def without_waits(call):
    """call(), with every wait an error."""
    with NoCopies(), NoLiterals():
        return call()


META = torch.ones(5, 3, device="meta")
WAITS = {
    "tensor": lambda: torch.tensor([1], device="meta"),
    "as_tensor": lambda: torch.as_tensor(3, device="meta"),
    "new_tensor": lambda: META.new_tensor([1.0]),
    "to": lambda: torch.ones(3).to("meta"),
    "to, 0-dimensional": lambda: torch.ones(()).to("meta"),
    "assignment": lambda: META.clone().__setitem__(slice(0, 2), torch.ones(3)),
    "index": lambda: META[torch.tensor([1, 2])],
    "sum of two devices": lambda: META + torch.ones(3),
    "item": lambda: META.sum().item(),
    "bool": lambda: bool(META.sum() > 0),
    "nonzero": lambda: META.nonzero(),
    "mask": lambda: META[META > 0],
    "tolist": lambda: META.tolist(),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_is_seen(name):
    with pytest.raises((Waits, RuntimeError, NotImplementedError)):
        without_waits(WAITS[name])


def test_what_needs_no_wait_passes():
    without_waits(lambda: torch.ones(3).to("meta", non_blocking=True) * torch.tensor(2.0))
    without_waits(lambda: META[META.argmax(0)] + torch.full((3,), 2, device="meta"))


# ---------------------------------------------------------------------------------------- sampling


SETTINGS = [
    {}, {"gamma": 0.0}, {"w": 0.0}, {"clip_steps": 4}, {"clip_steps": 1, "gamma": 0.0},
    {"schedule": "nonequidistant", "steps": 6}, {"tcf": "2"}, {"w_distilled": 3.5, "w": 7.0},
    *({"sampler": name} for name in SOLVERS),
]  # fmt: skip


@pytest.mark.parametrize("settings, config, side", sized(SETTINGS, SETTINGS[:1]))
def test_sampling(settings, config, side):
    network = meta_unet(config)
    _, cond = random_batch(config, 2, side, "meta", torch.float16)
    sampler = SamplerConfig(**settings)
    sample = partial(sample_latents, sampler, network, cond, null_condition(cond))
    x_0 = without_waits(lambda: sample((4, side, side), [0, 1], "meta"))
    assert x_0.shape == (2, 4, side, side) and x_0.dtype == torch.float32 and x_0.is_meta


def test_controlnet_and_solvers_with_clipping():
    config, side = TINY, 16
    unet = meta_unet(config)
    x_T, cond = random_batch(config, 2, side, "meta", torch.float16)
    sizes = {name: getattr(config, name) for name in config.__dataclass_fields__}
    with torch.device("meta"):
        controlnet = ControlNet(ControlNetConfig(**sizes)).half()
        image = torch.empty(1, 3, 8 * side, 8 * side)
    network = with_controlnets(unet, [(controlnet, image, 0.5)])
    stops = [*equidistant(4), CLEAN]
    eps = guided(network, cond, null_condition(cond), 1.0)
    for make_solver in SOLVERS.values():
        run = partial(solve, eps, x_T, stops, sdxl_schedule(), make_solver())
        with torch.no_grad():
            x_0 = without_waits(run)
        assert x_0.shape == x_T.shape


@pytest.mark.parametrize("side", [128, 160])
def test_autoencoder_both_ways(side):
    """Whole at 1024 pixels, in tiles above."""
    with torch.device("meta"):
        vae = VAE(VAEConfig()).requires_grad_(False)
        images, noise = torch.empty(2, 3, 1024, 1024), torch.empty(2, 4, 128, 128)
        latents = torch.empty(2, 4, side, side)
    assert without_waits(lambda: vae.encode(images, noise)).shape == noise.shape
    assert without_waits(lambda: vae.decode(latents)).shape == (2, 3, 8 * side, 8 * side)


# ---------------------------------------------------------------------------------------- training

METHODS = {
    "tdd": DistillConfig(),
    "no checkpointing": DistillConfig(checkpointing=False),
    "cm": DistillConfig("cm", eta=0.0),
    "pcm": DistillConfig("pcm", eta=0.0),
    "adv": DistillConfig(adv=True),
    "ema, huber": DistillConfig(mu=0.9, loss="huber"),
    "range of w": DistillConfig(w=(2.0, 14.0)),
    "dpm++2s": DistillConfig(solver="dpm++2s"),
    "tcf 2": DistillConfig("tcd", tcf="2", eta=0.0),
    "tcf s": DistillConfig("tcd", tcf="s", eta=0.0),
    "tdm": DistillConfig.of_method("tdm"),
    "tdm, dpm++2m": replace(DistillConfig.of_method("tdm"), solver="dpm++2m"),
    "tdm-unify": replace(DistillConfig.of_method("tdm"), Ks=(1, 2, 4)),
    "K": DistillConfig(Ks=(4, 6, 8), eta=0.0, tell_k=False),
    "told K": DistillConfig(Ks=(4, 6, 8), eta=0.0),
    "told K, tcf s, adv": DistillConfig(Ks=(4, 6, 8), tcf="s", adv=True),
    "pairs, dpm++2s, range of w": DistillConfig(pairs="teacher", solver="dpm++2s", w=(2.0, 14.0)),
    "pairs, told K, adv, ema": DistillConfig(
        Ks=(4, 6, 8), eta=0.0, pairs="teacher", adv=True, mu=0.9
    ),
    "tdm, fisher, density": replace(
        DistillConfig.of_method("tdm"), loss="fisher", fake_weight="density", checkpointing=False
    ),
}


class Loader:
    """Endless batches of names, or of walkers."""

    def __init__(self, paths=None):
        self.paths, self.position, self.bad = paths, 0, 0

    def __next__(self):
        return {"names": ["a", "b"]} if self.paths is None else next(self.paths)


FULL_SIZE = ("told K",)


@pytest.mark.parametrize("method, config, side", sized(METHODS, FULL_SIZE))
def test_training_waits_once_a_step(method, config, side, tmp_path, monkeypatch):
    """Steps of the real loop, two of the tiny networks: one look at the numbers in each.

    Pairs from the teacher's path are staggered before, and begin anew when they arrive.
    """
    is_path = METHODS[method].pairs == "teacher"
    steps = (4 if is_path else 2) if config is TINY else 1
    distill_config = replace(METHODS[method], rank=4, solver_steps=8 if is_path else 50)
    # The fused optimizer takes no tensors without values.
    monkeypatch.setattr(torch.optim, "AdamW", partial(unfused, torch.optim.AdamW))
    step = build_step(distill_config, meta_unet(config), "meta")
    generator, looks = torch.Generator().manual_seed(0), []
    x_0, cond = random_batch(config, 2, side, "meta", torch.float16)
    loader = Loader()
    if is_path:
        begun = []

        def draw_conds(number):
            begun.extend(range(number))
            return [("", "a")] * number

        def encode(conds):
            part = {name: tensor[: len(conds)] for name, tensor in cond.items()}
            return part, null_condition(part)

        loader = Loader(PathLoader(step, (4, side, side), 2, generator, "meta", draw_conds, bool))
        without_waits(lambda: loader.paths.start(encode))

    def losses(batch):
        walkers = {"walkers": batch["walkers"]} if is_path else {}
        sample = step.sample(x_0.shape, generator, "meta", **walkers)
        batch["timesteps"] = sample.timesteps
        return step.losses(None if is_path else x_0, cond, null_condition(cond), sample)

    def look(numbers):
        assert all(number.is_meta and number.ndim == 0 for number in numbers)
        looks.append(len(numbers))
        return [1.0] * len(numbers)

    monkeypatch.setattr(loop, "_read", look)
    monkeypatch.setattr(TrainState, "save", lambda self, *_: None)
    optimizers = build_optimizers(distill_config, step)
    scaler = loss_scaler("cpu", True)
    state = TrainState(tmp_path, step.modules, optimizers, generator, loader, {}, scaler=scaler)
    train_config = loop.TrainConfig(steps, lambda i: 1.0)
    without_waits(lambda: loop.fit(state, train_config, losses, step.after_step))
    parts = 1 + METHODS[method].adv * 2 + method.startswith("tdm")
    assert looks == [parts + len(optimizers)] * steps
    if is_path and config is TINY:
        assert len(begun) > 8


def unfused(adamw, parameters, *args, fused, **kwargs):
    return adamw(parameters, *args, **kwargs)


# ---------------------------------------------------------------------------------------- counted

DOCS = Path(__file__).parents[1] / "docs"


def test_tables_are_those_of_the_count():
    """docs/performance.md, and the sums over a picture's parts, from docs/count.json."""
    content = files.read_json(DOCS / "count.json")
    costs = {name: count.Cost(**cost) for name, cost in content["costs"].items()}
    text = (DOCS / "performance.md").read_text(encoding="utf-8")
    for name in count.TRAINING:
        small, middle, large = (costs[f"{name}; batch {b}"] for b in count.BATCHES)
        memory = " | ".join(f"{cost.peak_gib:.1f}" for cost in (small, middle, large))
        row = f"| {name} | {memory} | {large.tflop / 16:.1f} | {middle.operators:,} |"
        assert row in text
        assert small.peak_gib < 12 or "no-checkpointing" in name
    for name in count.SAMPLING:
        cost = costs[name]
        memory = f"{cost.peak_gib:.2f} | {cost.held_gib:.2f}"
        assert f"| {name} | {cost.tflop:.1f} | {memory} | {cost.operators:,} |" in text
    low_memory, resident = count.low_memory_gib(costs), count.resident_gib(costs)
    assert content["picture"] == {"resident": resident, "low_memory": low_memory}
    assert low_memory < 8 and f"{resident:.1f} GiB, {low_memory:.1f}" in text


def test_memory_and_flops_of_a_layer_by_hand():
    """A linear layer and a sum: the output is the largest, and is gone before the backward pass."""

    def build():
        with torch.device("meta"):
            x, layer = torch.empty(1024, 256), torch.nn.Linear(256, 512, bias=False)
        return lambda: layer(x).sum().backward()

    cost = count.measure(build)
    x, w, y = (4 * n for n in (1024 * 256, 256 * 512, 1024 * 512))  # bytes
    assert cost.held_gib * 2**30 == x + w
    assert cost.peak_gib * 2**30 == x + w + y + 512  # of the sum, in the smallest of blocks
    assert cost.tflop * 1e12 == 2 * 2 * 1024 * 256 * 512  # forward, and the weight's gradient
    assert cost.operators == 4  # product, sum, the gradient's 1, product


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TDD; batch 1", "text encoders", "decoder"])
def test_count_is_what_the_docs_have(name):
    cost = count.measure(count.builds()[name])
    assert asdict(cost) == pytest.approx(files.read_json(DOCS / "count.json")["costs"][name], 1e-3)
