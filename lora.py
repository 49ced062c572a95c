"""LoRA: low-rank updates over a frozen base, switched per call, stacked, merged, read and written.

Teacher, student and target network live on one copy of the base: `attach` hands layers their
updates and `using` says which of them count, and how much, for the calls inside its block.
"""

import json
import math
import re
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cli
import names
from load import assign, read_json, read_tensors
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


# ----------------------------------------------------------------------------------------- reading
#
# Four spellings of the same three things. A file is read whole or not at all: a key that no layer
# answers to is an error, since a LoRA applied in part looks like a bad LoRA.

SUFFIXES = {
    ".lora_A.weight": "down", ".lora_B.weight": "up",
    ".lora.down.weight": "down", ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".alpha": "alpha",
}  # fmt: skip
DOTTED = ("unet", "text_encoder", "text_encoder_2")
KOHYA = ("lora_unet", "lora_te1", "lora_te2")
TOLD = "unet.told."


def read_lora(path: Path, unet: UNet, encoder_1: nn.Module, encoder_2: nn.Module) -> list[LoRA]:
    """A file's LoRAs for the UNet and both text encoders (empty where it has none).

    PEFT/diffusers, older diffusers and kohya naming, with our module names or the original ones.
    Raises ValueError naming keys that fit no layer, halves without the other, and wrong shapes.
    """
    tensors, metadata = read_tensors(path)
    own = {k.removeprefix(TOLD): tensors.pop(k) for k in [*tensors] if k.startswith(TOLD)}
    bases = [unet, encoder_1, encoder_2]
    layers, table = [_layers(base) for base in bases], _spellings(bases)
    # (component, layer) -> its down, up and alpha, as the keys come.
    found, strangers = {}, []
    # The oldest diffusers files hold attention processors: .processor.to_out_lora.up.weight
    oldest = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora\.(down|up)")
    for key, tensor in tensors.items():
        key = oldest.sub(r".\1.lora.\2", key).replace(".to_out.lora.", ".to_out.0.lora.")
        suffix = next((s for s in SUFFIXES if key.endswith(s)), None)
        place = table.get(key.removesuffix(suffix or "").removeprefix("base_model.model."))
        if suffix is None or place is None:
            strangers.append(key)
        else:
            found.setdefault(place, {})[SUFFIXES[suffix]] = tensor
    if strangers or not found:
        some = ", ".join(strangers[:3]) or "no LoRA key at all"
        count = f"{len(strangers)} keys fit nothing"
        raise ValueError(f"{path} is no LoRA for this model: {count}: {some}")
    updates, header = [{}, {}, {}], _header(path, metadata)
    # Raw PEFT files keep their settings beside them, and only there.
    if any(key.startswith("base_model.model.") for key in tensors):
        config = read_json(Path(path).parent / "adapter_config.json")
        header = {f"unet.{name}": value for name, value in config.items()}
    for (component, name), parts in found.items():
        if "alpha" not in parts and "down" in parts:
            parts["alpha"] = _header_alpha(header, DOTTED[component], name, len(parts["down"]))
        updates[component][name] = _update(f"{path}: {name}", layers[component][name], **parts)
    told = _told(path, own, metadata.get("told"), unet) if own else None
    return [LoRA.of(each, None if i else told) for i, each in enumerate(updates)]


def _told(path: Path, tensors: dict[str, Tensor], of: str | None, unet: UNet) -> Told:
    if of not in ("s", "K"):
        raise ValueError(f"{path} has an embedding, but its header does not say what of")
    return assign(Told(unet.config.channels[0], of), tensors, path)


def _spellings(bases) -> dict[str, tuple[int, str]]:
    """Every spelling of a layer's name, to its component and name."""
    # kohya turns dots into underscores, which cannot be undone: look up, do not parse.
    table, original = {}, dict(names.unet_modules(bases[0].config))
    for component, base in enumerate(bases):
        for name in _layers(base):
            # Transformers 5 drops text_model., raw PEFT files name no component.
            ours = [name, name.removeprefix("text_model.")]
            spelled = ours if component else [name, names.original(name, original)]
            table |= {f"{DOTTED[component]}.{one}": (component, name) for one in ours}
            for one in spelled:
                table[f"{KOHYA[component]}_{one.replace('.', '_')}"] = component, name
            if component == 0:
                table[name] = component, name
    return table


def _update(where: str, layer: nn.Module, down=None, up=None, alpha=None) -> Update:
    if down is None or up is None:
        raise ValueError(f"{where} has an up or a down matrix only: the file is not whole")
    # Some write linear layers as 1x1 convolutions.
    if layer.weight.ndim == 2:
        down, up = down.flatten(1), up.flatten(1)
    out, *inner = layer.weight.shape
    if list(down.shape[1:]) != inner or len(up) != out or up.shape[1] != len(down):
        raise ValueError(
            f"{where} is {tuple(up.shape)} x {tuple(down.shape)}, its layer "
            f"{tuple(layer.weight.shape)}: a LoRA for another model"
        )
    if not (down.is_floating_point() and up.is_floating_point()):
        raise ValueError(f"{where} is {down.dtype}: quantised LoRAs are not read")
    alpha = len(down) if alpha is None else torch.as_tensor(alpha).flatten()[0]
    return Update(down, up, float(alpha))


def _header(path: Path, metadata: dict) -> dict:
    """What PEFT writes into a file's header: its settings, by component."""
    try:
        header = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: its header's lora_adapter_metadata is broken")
    return header


def _header_alpha(header: dict, component: str, name: str, rank: int) -> float | None:
    """A layer's alpha by PEFT's rules, None if the header does not say."""
    # A pattern names layers by the end of their name, as a regular expression.
    patterns = header.get(f"{component}.alpha_pattern") or {}
    found = (v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", name))
    alpha = next(found, header.get(f"{component}.lora_alpha"))
    # Rank-stabilised LoRA: alpha / sqrt(rank) instead of alpha / rank.
    stable = rank**0.5 if header.get(f"{component}.use_rslora") else 1.0
    return None if alpha is None else alpha * stable


# ----------------------------------------------------------------------------------------- writing
#
# alpha / rank is folded into the up matrices, which makes alpha = rank: right in every loader, in
# those that never look for alpha as well. Losing it makes published LoRAs eight times too strong.


def write_peft(path: Path, lora: LoRA, **metadata: str) -> None:
    """A UNet's LoRA in PEFT/diffusers naming; what it is told, in keys that only we read."""
    # Layers may differ in rank; the header names the largest, and the others one by one.
    tensors, ranks = {}, {}
    for name, update in lora.items():
        tensors[f"unet.{name}.lora_A.weight"] = update.down
        tensors[f"unet.{name}.lora_B.weight"] = update.scale * update.up
        ranks[name] = len(update.down)
    rank = max(ranks.values())
    config = {
        "unet.r": rank, "unet.lora_alpha": rank, "unet.target_modules": sorted(ranks),
        "unet.rank_pattern": {k: r for k, r in ranks.items() if r != rank},
        "unet.alpha_pattern": {k: r for k, r in ranks.items() if r != rank},
    }  # fmt: skip
    if lora.told is not None:
        tensors |= {TOLD + k: v for k, v in lora.told.state_dict().items()}
        metadata["told"] = lora.told.of
    metadata["lora_adapter_metadata"] = json.dumps(config)
    cli.write_tensors(path, tensors, format="pt", **metadata)


def write_kohya(path: Path, lora: LoRA, **metadata: str) -> None:
    """A UNet's LoRA in kohya naming, which ComfyUI and diffusers read, alpha tensors included."""
    tensors = {}
    for name, update in lora.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = update.down
        tensors[f"{key}.lora_up.weight"] = update.scale * update.up
        tensors[f"{key}.alpha"] = torch.tensor(float(len(update.down)))
    cli.write_tensors(path, tensors, format="pt", **metadata)
