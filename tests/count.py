"""What full-size networks cost, counted on torch's meta device: it has shapes and computes nothing.

    python -m tests.count       counts everything anew, into docs/count.json

Weights, activations and moments are counted as the program allocates them; a GPU adds workspace of
its kernels, and half a gigabyte of context that no program sees. Attention is counted as the fused
kernel has it.
"""

import weakref
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.models import random_batch
from common import files
from sdxl.clip import TextConfig, TextEncoder
from sdxl.controlnet import ControlNet, ControlNetConfig
from sdxl.pipeline import SamplerConfig, null_condition, sample_latents, with_controlnets
from sdxl.vae import VAE, VAEConfig
from sdxl.weights import cast
from training.build import DistillConfig, build_step
from unet import UNet, UNetConfig

# ------------------------------------------------------------------------------------------ meters


@dataclass(frozen=True)
class Cost:
    """What a call costs: TFLOP, memory in GiB before it and at most, and how many operators run."""

    tflop: float
    held_gib: float
    peak_gib: float
    operators: int


@contextmanager
def fused_attention():
    """Attention by the fused kernel, which a GPU takes and the meta device would not."""

    def fused(q, k, v, is_causal=False):
        op = torch.ops.aten._scaled_dot_product_flash_attention
        return op(q, k, v, is_causal=is_causal)[0]

    # Replaced by name: a mode would not be there when blocks are recomputed in the backward pass.
    with mock.patch.object(F, "scaled_dot_product_attention", fused):
        yield


class Meter(TorchDispatchMode):
    """Counts operators that compute, and the memory of all tensors on the meta device."""

    # These allocate or describe memory, and start no kernel.
    NO_KERNEL = ("empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view", "detach")

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.operators = 0
        self.storages = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        on_device = [x for x in tree_leaves(output) if torch.is_tensor(x) and x.is_meta]
        for tensor in on_device:
            self._hold(tensor.untyped_storage())
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if on_device and not is_view and func._schema.name.split("::")[1] not in self.NO_KERNEL:
            self.operators += 1
        return output

    def _hold(self, storage) -> None:
        if storage not in self.storages:
            self.storages.add(storage)
            size = -(-storage.nbytes() // 512) * 512  # as torch's allocator hands it out
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.live -= size


def measure(build) -> Cost:
    """The cost of the call that build() returns; what it builds is held in memory, and counted."""
    with Meter() as meter, fused_attention():
        call = build()
        held = meter.live
        meter.operators, meter.peak = 0, held
        call()
    # A second time, because this mode splits operators into parts, which would be counted as well.
    with FlopCounterMode(display=False) as flops, fused_attention():
        call()
    tflop = flops.get_total_flops() / 1e12
    return Cost(tflop, held / 2**30, meter.peak / 2**30, meter.operators)


# -------------------------------------------------------------------------------------- what is run

FULL = UNetConfig()
TEXT_ENCODERS = (
    TextConfig(),
    TextConfig(1280, 5120, layers=32, heads=20, activation="gelu", projection=1280),
)


def meta_unet(config: UNetConfig = FULL) -> UNet:
    """A UNet without values, in fp16."""
    with torch.device("meta"):
        unet = UNet(config).requires_grad_(False)
    cast(unet, torch.float16)
    return unet.to(memory_format=torch.channels_last)


def training_step(config: DistillConfig, b: int, side: int):
    """A call of one training step, forward and backward, with the optimizers' moments beside it."""
    step = build_step(config, meta_unet(), "meta")
    x_0, cond = random_batch(FULL, b, side, "meta", torch.float16)
    generator, moments = torch.Generator().manual_seed(0), []
    for module in step.modules.values():
        for p in module.parameters():
            if p.requires_grad:
                moments += [torch.zeros_like(p), torch.zeros_like(p)]

    def call():
        sample = step.sample(x_0.shape, generator, "meta")
        step.losses(x_0, cond, null_condition(cond), sample)["total"].backward()
        step.after_step()

    call.moments = moments  # in memory as long as the call is
    return call


def denoising(config: SamplerConfig, side: int, controlled: bool = False):
    """A call of the sampler for one picture, under a ControlNet or not."""
    network = unet = meta_unet()
    if controlled:
        with torch.device("meta"):
            controlnet = ControlNet(ControlNetConfig()).half()
            image = torch.empty(1, 3, 8 * side, 8 * side)
        network = with_controlnets(unet, [(controlnet, image, 1.0)])
    _, cond = random_batch(FULL, 1, side, "meta", torch.float16)

    def call():
        shape = (4, side, side)
        sample_latents(config, network, cond, null_condition(cond), shape, [0], "meta")

    return call


def encoding():
    """A call of both text encoders for one prompt."""
    with torch.device("meta"):
        encoders = [TextEncoder(each).half() for each in TEXT_ENCODERS]
        ids = torch.empty(1, 77, dtype=torch.int64)
    end = 49407  # in CLIP's vocabulary
    return torch.no_grad()(lambda: [encoder(ids, end) for encoder in encoders])


def decoding(side: int):
    """A call of the decoder for one picture."""
    with torch.device("meta"):
        vae, latents = VAE(VAEConfig()), torch.empty(1, 4, side, side)
    return torch.no_grad()(lambda: vae.decode(latents))


# ---------------------------------------------------------------------------------- what is counted

TRAINING = {
    "TDD": DistillConfig(),
    "TDD, --no-checkpointing": DistillConfig(checkpointing=False),
    "TDD, --adv": DistillConfig(adv=True),
    "TDD, --ema 0.95": DistillConfig(mu=0.95),
    "TCD, --tcf 2": DistillConfig("tcd", tcf="2", eta=0.0),
    "TCD, --tcf s": DistillConfig("tcd", tcf="s", eta=0.0),
    "TDM-4": DistillConfig.of_method("tdm"),
    "TDM-unify, --ks 1 2 4": replace(DistillConfig.of_method("tdm"), Ks=(1, 2, 4)),
}
BATCHES = (1, 4, 16)
SIDE = 128  # latents of 1024 pixels
SAMPLING = {
    "text encoders": encoding,
    "UNet, 4 steps, g = 2": partial(denoising, SamplerConfig(), SIDE),
    "UNet, 4 steps, g = 1": partial(denoising, SamplerConfig(w=0.0), SIDE),
    "UNet and ControlNet, g = 2": partial(denoising, SamplerConfig(), SIDE, controlled=True),
    "decoder": partial(decoding, SIDE),
}
PARTS = ("text encoders", "UNet, 4 steps, g = 2", "decoder")  # of a picture


def builds() -> dict:
    """Everything that is counted, by its name in count.json."""
    builds = {}
    for name, config in TRAINING.items():
        for b in BATCHES:
            builds[f"{name}; batch {b}"] = partial(training_step, config, b, SIDE)
    return builds | SAMPLING


def main() -> None:
    """Count all of `builds`, into docs/count.json."""
    costs = {}
    for name, build in tqdm(builds().items(), desc="count", dynamic_ncols=True):
        costs[name] = measure(build)
    picture = {"resident": resident_gib(costs), "low_memory": low_memory_gib(costs)}
    content = {"costs": {name: asdict(cost) for name, cost in costs.items()}, "picture": picture}
    files.write_json(Path(__file__).parents[1] / "docs" / "count.json", content)


def resident_gib(costs: dict[str, Cost]) -> float:
    """Memory of a picture with all parts on the device: all weights and the largest activations."""
    parts = [costs[name] for name in PARTS]
    return sum(c.held_gib for c in parts) + max(c.peak_gib - c.held_gib for c in parts)


def low_memory_gib(costs: dict[str, Cost]) -> float:
    """Memory of a picture with one part on the device at a time."""
    return max(costs[name].peak_gib for name in PARTS)


if __name__ == "__main__":
    main()
