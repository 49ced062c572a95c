"""LoRA: low-rank adapters on a frozen base, switched on for a call, stacked with weights, merged.

Teacher, student and target network share one copy of the base. `add_adapter` gives its layers a
LoRA's adapters under a name; within `active_adapters` the named LoRAs count, with their weights.
"""

import math
import re
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet import Block, ScalarEmbedding, UNet

# The published TDD LoRA's layers: all attention and feed-forward projections and convolutions.
TARGET_MODULES = re.compile(
    r"(to_q|to_k|to_v|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2|conv1|conv2"
    r"|conv_shortcut|downsamplers\.0\.conv|upsamplers\.0\.conv|time_emb_proj)$"
)


def named_layers(base: nn.Module) -> dict[str, nn.Module]:
    """All layers that can have an adapter: linear layers and convolutions, by dotted name."""
    return {k: m for k, m in base.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


# ----------------------------------------------------------------------------------------- adapters
#
# For a convolution the down matrix looks at the whole kernel and the up matrix is 1x1, as in PEFT.


class Adapter(nn.Module):
    """One layer's adapter, scale * up @ down with scale = alpha / rank.

    down (r, in) and up (out, r), or (r, in, k, k) and (out, r, 1, 1) for a convolution.
    """

    def __init__(self, down: Tensor, up: Tensor, alpha: float):
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.scale = alpha / len(down)

    @classmethod
    def init(cls, layer: nn.Module, rank: int, alpha: float, generator) -> "Adapter":
        """An adapter that has no effect yet: up is zero."""
        out, *fan_in = layer.weight.shape
        # PEFT's start, uniform in +-1/sqrt(fan in): published learning rates assume it.
        down = torch.rand((rank, *fan_in), generator=generator) * 2 - 1
        up = torch.zeros([out, rank] + [1] * (len(fan_in) - 1))
        return cls(down / math.prod(fan_in) ** 0.5, up, alpha)

    def add(self, y: Tensor, x: Tensor, layer: nn.Module, weight: float) -> Tensor:
        """y + weight * scale * up(down(x)), in y's own memory."""
        # The weights may be in float32, for training, beside a base in half precision. The factor
        # is applied to the small matrix: on y it would be another pass over all activations.
        down, up = self.down.to(x.dtype), (weight * self.scale * self.up).to(x.dtype)
        if isinstance(layer, nn.Conv2d):
            h = F.conv2d(x, down, None, layer.stride, layer.padding)
            return y.add_(F.conv2d(h, up))
        return y.addmm_(F.linear(x, down), up.T)

    def scaled(self, scale: float) -> "Adapter":
        """The same adapter in float32 with this scale, and an up matrix that makes up for it.

        A learning rate then means the same as for a new LoRA of this scale.
        """
        up = self.up.detach().float() * (self.scale / scale)
        return Adapter(self.down.detach().float(), up, scale * len(self.down))


class LoRA(nn.Module):
    """Adapters by the dotted name of their layer, and for some students a scalar embedding."""

    def __init__(self, adapters: dict[str, Adapter], embedding: ScalarEmbedding | None = None):
        super().__init__()
        self.adapters = adapters
        # A dict registers nothing, and a module's name cannot have dots: checkpoints have slashes.
        for name, adapter in adapters.items():
            self.add_module(name.replace(".", "/"), adapter)
        self.scalar_embedding = embedding

    @classmethod
    def init(cls, base: nn.Module, rank: int, alpha: float, generator, kind: str = "") -> "LoRA":
        """A LoRA on the base's TARGET_MODULES that has no effect yet.

        kind: of a `ScalarEmbedding`, which has no effect yet either; "" for none.
        """
        layers = {k: layer for k, layer in named_layers(base).items() if TARGET_MODULES.search(k)}
        adapters = {k: Adapter.init(layer, rank, alpha, generator) for k, layer in layers.items()}
        return cls(adapters, init_scalar_embedding(base, kind, generator) if kind else None)


def init_scalar_embedding(base: UNet, kind: str, generator: torch.Generator) -> ScalarEmbedding:
    """A scalar embedding for this UNet that has no effect yet."""
    c = base.config.channels[0]
    embedding = ScalarEmbedding(c, kind)
    # torch's initialisation of a linear layer, but from the generator.
    for p in embedding.linear_1.parameters():
        p.data = (torch.rand(p.shape, generator=generator) * 2 - 1) / c**0.5
    return embedding


# -------------------------------------------------------------------------------- on a frozen base
#
# Layers become LoRA subclasses in place, so the base's state dict is unchanged.


class _LoRALayer:
    """The forward pass of a layer with .adapters and the .active weights, each by LoRA's name."""

    def forward(self, x: Tensor) -> Tensor:
        names = [name for name, weight in self.active.items() if weight and name in self.adapters]
        # With none active the output is the base's, bit for bit.
        if not names:
            return super().forward(x)
        # Rows of channels: adding in place to a view would cost the backward pass a copy.
        rows = x if isinstance(self, nn.Conv2d) else x.flatten(0, -2)
        y = super().forward(rows)
        for name in names:
            y = self.adapters[name].add(y, rows, self, self.active[name])
        return y.view(*x.shape[:-1], -1) if x.ndim == 3 else y


class LoRALinear(_LoRALayer, nn.Linear):
    """A linear layer with adapters."""


class LoRAConv2d(_LoRALayer, nn.Conv2d):
    """A convolution with adapters."""


def add_adapter(base: nn.Module, name: str, lora: LoRA) -> None:
    """Give the base's layers a LoRA's adapters under a name, inactive until `active_adapters`."""
    if not hasattr(base, "active_loras"):
        base.active_loras = {}
    layers = named_layers(base)
    for layer_name, adapter in lora.adapters.items():
        layer = layers[layer_name]
        if not isinstance(layer, _LoRALayer):
            layer.__class__ = LoRAConv2d if isinstance(layer, nn.Conv2d) else LoRALinear
            # Plain dicts are neither parameters nor state of the base. All layers share `active`.
            layer.adapters, layer.active = {}, base.active_loras
        layer.adapters[name] = adapter

    def recompute_context():
        return nullcontext(), active_adapters(base, **base.active_loras)

    # A block is recomputed in the backward pass, outside of the `active_adapters` of its first run.
    for module in base.modules():
        if isinstance(module, Block):
            module.recompute_context = recompute_context


@contextmanager
def active_adapters(base: nn.Module, **weights: float):
    """Run the base with exactly these LoRAs, name=weight; with none it is the plain base."""
    active = getattr(base, "active_loras", {})
    before = dict(active)
    active.clear()
    active.update(weights)
    try:
        yield base
    finally:
        active.clear()
        active.update(before)


@torch.no_grad()
def merge(base: nn.Module, lora: LoRA, weight: float = 1.0) -> None:
    """Add weight times a LoRA to the base's weights for good."""
    layers = named_layers(base)
    for name, adapter in lora.adapters.items():
        old = layers[name].weight
        # In float32: half precision would round away what small adapters add.
        product = adapter.up.float().flatten(1) @ adapter.down.float().flatten(1)
        delta = weight * (adapter.scale * product.view(old.shape)).to(old.device)
        # A new tensor: the old one may be a file's memory-mapped pages.
        layers[name].weight = nn.Parameter((old.float() + delta).to(old.dtype), requires_grad=False)
