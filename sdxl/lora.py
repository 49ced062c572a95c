"""LoRA: low-rank updates over a frozen base, switched per call, stacked, merged, read and written.

Teacher, student and target network live on one copy of the base: `attach` hands layers their
updates and `using` says which of them count, and how much, for the calls inside its block.
"""

import math
import re
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet import Block, Told, UNet

# The published TDD LoRA's layers: all attention and feed-forward projections and convolutions.
TARGETS = re.compile(
    r"(to_q|to_k|to_v|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2|conv1|conv2"
    r"|conv_shortcut|downsamplers\.0\.conv|upsamplers\.0\.conv|time_emb_proj)$"
)


# ----------------------------------------------------------------------------------------- updates
#
# For a convolution the down matrix looks at the whole kernel and the up matrix is 1x1, as in PEFT.


class Update(nn.Module):
    """One layer's update, scale * up @ down with scale = alpha / rank.

    down (r, in) and up (out, r), or (r, in, k, k) and (out, r, 1, 1) for a convolution.
    """

    def __init__(self, down: Tensor, up: Tensor, alpha: float):
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.scale = alpha / len(down)

    def add(self, y: Tensor, x: Tensor, layer: nn.Module, weight: float) -> Tensor:
        """y + weight * scale * up(down(x)), in y's own memory."""
        # Float32 weights, as training keeps them, beside a base in half precision. The factor goes
        # onto the small matrix: on y it would be another pass over all activations.
        down, up = self.down.to(x.dtype), (weight * self.scale * self.up).to(x.dtype)
        if isinstance(layer, nn.Conv2d):
            h = F.conv2d(x, down, None, layer.stride, layer.padding)
            return y.add_(F.conv2d(h, up))
        return y.addmm_(F.linear(x, down), up.T)

    def scaled(self, scale: float) -> "Update":
        """The same update with this scale, and an up matrix that makes up for it.

        Its gradients, and so what a learning rate means, are those of a LoRA begun with the scale.
        """
        up = self.up.detach().float() * (self.scale / scale)
        return Update(self.down.detach().float(), up, scale * len(self.down))


class LoRA(nn.ModuleDict):
    """Updates by the name of their layer, whose dots stand as slashes in parameter names.

    told: the embedding of one more number, for a student that is told of one; it is all that is
    added to a base besides updates.
    """

    def items(self):
        own = super().items()
        return [(name.replace("/", "."), update) for name, update in own if name != "number"]

    @property
    def told(self) -> Told | None:
        return self._modules.get("number")

    @classmethod
    def of(cls, updates: dict[str, Update], told: Told | None = None) -> "LoRA":
        own = {name.replace(".", "/"): update for name, update in updates.items()}
        return cls(own | ({} if told is None else {"number": told}))

    @classmethod
    def fresh(cls, base: nn.Module, rank: int, alpha: float, generator, told: str = "") -> "LoRA":
        """A LoRA over the base's TARGETS that changes nothing yet: up is zero.

        told: "s" or "K", to have a `Told` of it, which changes nothing yet either.
        """
        updates = {}
        for name, layer in _layers(base).items():
            if TARGETS.search(name):
                out, *inner = layer.weight.shape
                # PEFT's start, uniform in +-1/sqrt(fan in), which is where learning rates are from.
                down = torch.rand((rank, *inner), generator=generator) * 2 - 1
                up = torch.zeros((out, rank, *(1 for _ in inner[1:])))
                updates[name] = Update(down / math.prod(inner) ** 0.5, up, alpha)
        return cls.of(updates, fresh_told(base, told, generator) if told else None)


def fresh_told(base: UNet, of: str, generator: torch.Generator) -> Told:
    """An embedding of "s" or "K" for this UNet that changes nothing yet."""
    c = base.config.channels[0]
    embedding = Told(c, of)
    for p in embedding.linear_1.parameters():
        # torch's own start for a linear layer, but from the generator.
        p.data = (torch.rand(p.shape, generator=generator) * 2 - 1) / c**0.5
    return embedding


def _layers(base: nn.Module) -> dict[str, nn.Module]:
    kinds = nn.Linear, nn.Conv2d
    return {name: layer for name, layer in base.named_modules() if isinstance(layer, kinds)}


# -------------------------------------------------------------------------------- on a frozen base
#
# A layer takes on a class that knows of updates; its weights, and so the base's state dict, stay
# what and where they were.


class _Updated:
    def forward(self, x: Tensor) -> Tensor:
        on = [(self.updates[k], w) for k, w in self.active.items() if w and k in self.updates]
        # With nothing switched on, the base's output is what it always was, bit by bit.
        if not on:
            return super().forward(x)
        # Rows of channels: adding in place to what is a view costs the backward pass a copy.
        rows = x if isinstance(self, nn.Conv2d) else x.flatten(0, -2)
        y = super().forward(rows)
        for update, weight in on:
            y = update.add(y, rows, self, weight)
        return y.view(*x.shape[:-1], -1) if x.ndim == 3 else y


class UpdatedLinear(_Updated, nn.Linear):
    """A linear layer with updates."""


class UpdatedConv2d(_Updated, nn.Conv2d):
    """A convolution with updates."""


def attach(base: nn.Module, name: str, lora: LoRA) -> None:
    """Give the base's layers the updates of a LoRA, switched off, under a name."""
    layers = _layers(base)
    base.active_loras = getattr(base, "active_loras", {})
    for layer_name, update in lora.items():
        layer = layers[layer_name]
        if not isinstance(layer, _Updated):
            layer.__class__ = UpdatedConv2d if isinstance(layer, nn.Conv2d) else UpdatedLinear
            # Plain attributes: neither parameters nor state of the base. `active` is shared by all.
            object.__setattr__(layer, "updates", {})
            object.__setattr__(layer, "active", base.active_loras)
        layer.updates[name] = update
    for module in base.modules():
        # A block worked out again in the backward pass, by then outside of `using`, needs the same.
        if isinstance(module, Block):
            module.contexts = lambda: (nullcontext(), using(base, **base.active_loras))


@contextmanager
def using(base: nn.Module, **weights: float):
    """Run the base with exactly these attached LoRAs at their weights; without any, it is plain."""
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
    """Add a LoRA to the base's weights for good."""
    layers = _layers(base)
    for name, update in lora.items():
        own = layers[name].weight
        # In float32: in half precision the product would lose what small updates consist of.
        product = update.up.float().flatten(1) @ update.down.float().flatten(1)
        delta = weight * (update.scale * product.view(own.shape)).to(own.device)
        # A new tensor: the old one may be a file's memory-mapped pages.
        layers[name].weight = nn.Parameter((own.float() + delta).to(own.dtype), requires_grad=False)
