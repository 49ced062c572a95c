"""LoRA: low-rank adapters on a frozen base, switched on for a call, stacked with weights, merged.

Teacher, student and target network share one copy of the base. `add_adapter` gives it a LoRA under
a name; within `active_adapters` the named LoRAs count, with their weights.
"""

import math
import re
from contextlib import contextmanager, nullcontext
from functools import partial

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
    def init(cls, base: nn.Module, rank: int, alpha: float, generator, scalar: str = "") -> "LoRA":
        """A LoRA on the base's TARGET_MODULES that has no effect yet.

        scalar: "target_time" for a `ScalarEmbedding`, which has no effect yet either; "" for none.
        """
        layers = {k: layer for k, layer in named_layers(base).items() if TARGET_MODULES.search(k)}
        adapters = {k: Adapter.init(layer, rank, alpha, generator) for k, layer in layers.items()}
        return cls(adapters, init_scalar_embedding(base, generator) if scalar else None)


def init_scalar_embedding(base: UNet, generator: torch.Generator) -> ScalarEmbedding:
    """A scalar embedding for this UNet that has no effect yet."""
    c = base.config.channels[0]
    embedding = ScalarEmbedding(c)
    # torch's initialisation of a linear layer, but from the generator.
    for p in embedding.linear_1.parameters():
        p.data = (torch.rand(p.shape, generator=generator) * 2 - 1) / c**0.5
    return embedding


# -------------------------------------------------------------------------- precision to compute in
#
# What is trained is in float32, beside a base in half precision. A LoRA has 1,600 matrices, each
# too small to occupy a GPU: cast layer by layer, they would keep it waiting for the host. So all
# are cast at once, whenever a pass begins.


class _CastAll(torch.autograd.Function):
    """All tensors in another precision, times a factor each or not; gradients in their own."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, factors: list[float] | None, *tensors: Tensor):
        ctx.factors, ctx.dtype = factors, tensors[0].dtype
        if factors is not None:
            tensors = torch._foreach_mul(tensors, factors)
        return tuple(_cast_all(tensors, dtype))

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        gradients = _cast_all(gradients, ctx.dtype)
        if ctx.factors is not None:
            gradients = torch._foreach_mul(gradients, ctx.factors)
        return None, None, *gradients


def _cast_all(tensors, dtype: torch.dtype) -> list[Tensor]:
    if all(tensor.dtype == dtype for tensor in tensors):
        return list(tensors)
    result = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(result, tensors)
    return result


def compute_weights(lora: LoRA, weight: float, dtype: torch.dtype) -> dict:
    """Layer -> its down matrix, and its up matrix times weight and scale, in this precision."""
    adapters = lora.adapters.values()
    downs = [adapter.down for adapter in adapters]
    if any(down.dtype != dtype for down in downs):
        downs = _CastAll.apply(dtype, None, *downs)
    # The factor is applied to the small matrix: on the layer's output it would be another pass over
    # all activations.
    factors = [weight * adapter.scale for adapter in adapters]
    ups = _CastAll.apply(dtype, factors, *(adapter.up for adapter in adapters))
    return dict(zip(lora.adapters, zip(downs, ups, strict=True), strict=True))


# -------------------------------------------------------------------------------- on a frozen base
#
# Layers become LoRA subclasses in place, so the base's state dict is unchanged.


class _LoRALayer:
    """The forward pass of a layer with .active, pairs of a down and an up matrix."""

    def forward(self, x: Tensor) -> Tensor:
        # With none active the output is the base's, bit for bit.
        if not self.active:
            return super().forward(x)
        # Rows of channels: adding in place to a view would cost the backward pass a copy.
        rows = x if isinstance(self, nn.Conv2d) else x.flatten(0, -2)
        y = super().forward(rows)
        for down, up in self.active:
            # The same precision already, but for layers that stay in float32 beside half.
            y = self.add_product(y, rows, down.to(rows.dtype), up.to(rows.dtype))
        return y.view(*x.shape[:-1], -1) if x.ndim == 3 else y


class LoRALinear(_LoRALayer, nn.Linear):
    """A linear layer with adapters."""

    def add_product(self, y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """y + up(down(x)), in y's own memory."""
        return y.addmm_(F.linear(x, down), up.T)


class LoRAConv2d(_LoRALayer, nn.Conv2d):
    """A convolution with adapters."""

    def add_product(self, y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """y + up(down(x)), in y's own memory."""
        return y.add_(F.conv2d(F.conv2d(x, down, None, self.stride, self.padding), up))


def add_adapter(base: nn.Module, name: str, lora: LoRA) -> None:
    """Give the base a LoRA under a name, inactive until `active_adapters`."""
    # Plain dicts, which are neither parameters nor state of the base.
    base.loras = {**getattr(base, "loras", {}), name: lora}
    layers = named_layers(base)
    for layer_name in lora.adapters:
        layer = layers[layer_name]
        if not isinstance(layer, _LoRALayer):
            layer.__class__ = LoRAConv2d if isinstance(layer, nn.Conv2d) else LoRALinear
            layer.active = ()
    base.lora_layers = {k: layer for k, layer in layers.items() if isinstance(layer, _LoRALayer)}
    for module in base.modules():
        if isinstance(module, Block):
            of_block = [m for m in module.modules() if isinstance(m, _LoRALayer)]
            module.recompute_context = partial(_recompute_context, of_block)


@contextmanager
def active_adapters(base: nn.Module, **weights: float):
    """Run the base with exactly these LoRAs, name=weight; with none it is the plain base."""
    layers, dtype = getattr(base, "lora_layers", {}), next(base.parameters()).dtype
    active = dict.fromkeys(layers, ())
    for name, weight in weights.items():
        if weight and base.loras[name].adapters:
            for layer, pair in compute_weights(base.loras[name], weight, dtype).items():
                active[layer] += (pair,)
    with _activate(layers.values(), active.values()):
        yield base


@contextmanager
def _activate(layers, active):
    """Run these layers with these pairs of matrices each."""
    before = [layer.active for layer in layers]
    # Past nn.Module's setter, which would take longer than all the rest.
    for layer, pairs in zip(layers, active, strict=True):
        layer.__dict__["active"] = pairs
    try:
        yield
    finally:
        for layer, pairs in zip(layers, before, strict=True):
            layer.__dict__["active"] = pairs


def _recompute_context(layers):
    # A block is recomputed in the backward pass, outside of the `active_adapters` of its first run:
    # with the very tensors of that run, to which the gradient belongs.
    return nullcontext(), _activate(layers, [layer.active for layer in layers])


# ------------------------------------------------------------------------------------------ merging
#
# An update is a thousand times smaller than W: half precision rounds a part of their sum away, and
# eight bits all of it. So what is merged is in the precision to compute in, not in the file's.


@torch.no_grad()
def merge(base: nn.Module, loras: list[tuple[LoRA, float]]) -> None:
    """Add LoRAs times their weights to the base's weights for good.

    The sum is rounded once: float32 is for one layer at a time.
    """
    for name, layer in named_layers(base).items():
        changes = [(lora.adapters[name], weight) for lora, weight in loras if name in lora.adapters]
        if not changes:
            continue
        total = layer.weight.float()
        for adapter, weight in changes:
            down, up = (x.to(total.device).float().flatten(1) for x in (adapter.down, adapter.up))
            total = total + weight * adapter.scale * (up @ down).view(total.shape)
        # A new tensor: the old one may be a file's memory-mapped pages.
        layer.weight = nn.Parameter(total.to(layer.weight.dtype), requires_grad=False)
