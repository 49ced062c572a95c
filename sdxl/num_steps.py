"""Telling a student its number of steps K as crop_top = 8 K, in a plain LoRA.

SDXL's UNet takes the crop among its sizes, and add_embedding.linear_1 reads the sinusoids of it. A
LoRA on that layer whose first factor reads K off those sinusoids has a vector for each K in its
second. Any program that lets a user set the crop can sample such a student. Everything else is
told the crop (0, 0): the teacher, the adversary, a ControlNet. Not in the papers.
"""

import math
import sys

import torch
from torch import Tensor, nn

from sdxl.lora import Adapter, LoRA
from tdm import nearest
from unet import UNet, timestep_embedding

# The sinusoids of 8, 16, 24 .. lie far enough apart, those of 1, 2, 3 .. do not: for K of 1 to 8
# the smallest singular value is 5.3, and would be 0.0003.
CROP_PER_K = 8
LINEAR_1, LINEAR_2 = "add_embedding.linear_1", "add_embedding.linear_2"


# ------------------------------------------------------------------------------------ conditions


def with_crop_top(cond: dict, crop_top) -> dict:
    """The condition with the crop (crop_top, 0); a number, or (b,)."""
    time_ids = cond["time_ids"].clone()
    time_ids[:, 2], time_ids[:, 3] = crop_top, 0
    return {**cond, "time_ids": time_ids}


def with_k(network, K):
    """network(x_t, t, cond) that is told K, a number or (b,); K = 0 tells nothing."""
    return lambda x_t, t, cond, *more: network(x_t, t, with_crop_top(cond, CROP_PER_K * K), *more)


def with_nearest_k(network, k: int, Ks: tuple[int, ...]):
    """The same, told the nearest of Ks to k; the network itself if there are none."""
    return with_k(network, nearest(k, Ks)) if Ks else network


def choose_k(asked: int | None, steps: int, Ks: tuple[int, ...], student: str) -> int | None:
    """The K to tell a student that knows these Ks for so many steps, None if it knows none.

    Raises ValueError if it does not know the K that is asked for.
    """
    if asked is not None and asked not in Ks:
        raise ValueError(f"--tell-k {asked}: {student} knows {[*Ks] or 'no K'}")
    if not Ks or asked is not None:
        return asked
    if (K := nearest(steps, Ks)) != steps:
        print(f"{steps} steps: told K = {K}, the nearest of {[*Ks]}", file=sys.stderr)
    return K


def check_strength(recipes: list[dict], scales: list[float]) -> None:
    """ValueError unless the LoRAs that are told K have full strength together.

    Theirs is to cancel what the base makes of the crop, of which there is one.
    """
    told = [scale for recipe, scale in zip(recipes, scales, strict=True) if "told_ks" in recipe]
    if told and not math.isclose(sum(told), 1):
        raise ValueError(
            f"--lora: those that are told K have scales of {sum(told):g} together, and need 1: "
            "write them for one K by --export-k first"
        )


# ---------------------------------------------------------------------------------------- adapters


class KAdapter(Adapter):
    """linear_1's adapter: down, which is frozen, reads K; a column of up is the vector of a K."""

    def __init__(self, down: Tensor, up: Tensor):
        nn.Module.__init__(self)
        self.register_buffer("down", down)
        self.up, self.scale = nn.Parameter(up), 1.0

    @classmethod
    def from_adapter(cls, adapter: Adapter) -> "KAdapter":
        """An adapter from a file, to train on."""
        return cls(adapter.down.detach().float(), adapter.scale * adapter.up.detach().float())


def sinusoids(Ks, width: int) -> Tensor:
    """What the UNet makes of crop_top = 8 K, (|Ks|, width), and width / 2 = |sinusoids of 0|^2."""
    return timestep_embedding(torch.tensor([CROP_PER_K * K for K in Ks]), width)


def check_rank(Ks: tuple[int, ...], rank: int) -> None:
    """ValueError if a LoRA of this rank has no room for a vector of each K."""
    # One rank for all layers: programs that know no ranks by layer then get the scale right.
    if len(Ks) > rank:
        raise ValueError(f"a rank of {rank} is too low to tell {len(Ks)} K: give --rank {len(Ks)}")


def reader(Ks: tuple[int, ...], width: int) -> Tensor:
    """Rows that make a one-hot code of K's sinusoids, and zeros of those of crop_top = 0.

    (|Ks|, width). Raises ValueError if so few sinusoids do not tell the Ks apart, in bf16 too.
    """
    s_0, s = sinusoids([0], width).double(), sinusoids(Ks, width).double()
    rows = torch.linalg.pinv(torch.cat([s - s_0, s_0]).T)[: len(Ks)]
    # Large rows, which only just cancel, would read noise.
    code = rows.bfloat16().double() @ s.bfloat16().double().T
    if not torch.allclose(code, torch.eye(len(Ks), dtype=code.dtype), atol=0.02):
        raise ValueError(
            f"{width} sinusoids of the crop do not tell K of {[*Ks]} apart: give fewer"
        )
    return rows.float()


def crop_columns(unet: UNet) -> slice:
    """Where linear_1's input has crop_top's sinusoids: behind those of the original size."""
    width = unet.config.time_ids_width
    first = unet.config.add_embedding_dim - 4 * width
    return slice(first, first + width)


def crop_effect(unet: UNet, Ks) -> Tensor:
    """What linear_1 of the base makes of crop_top = 8 K, compared with 0: (out, |Ks|)."""
    width = unet.config.time_ids_width
    weight = unet.get_submodule(LINEAR_1).weight[:, crop_columns(unet)].float()
    change = sinusoids(Ks, width) - sinusoids([0], width)
    return weight @ change.T.to(weight.device)


def add_k_adapter(lora: LoRA, unet: UNet, Ks: tuple[int, ...], rank: int, alpha: float, generator):
    """The LoRA with adapters that take K and have no effect yet: they cancel the base's answer.

    Raises ValueError if K are more than the rank, or too many to tell apart.
    """
    check_rank(Ks, rank)
    layer = unet.get_submodule(LINEAR_1)
    down = torch.zeros(rank, layer.in_features)
    down[: len(Ks), crop_columns(unet)] = reader(Ks, unet.config.time_ids_width)
    up = torch.zeros(layer.out_features, rank, device=layer.weight.device)
    up[:, : len(Ks)] = -crop_effect(unet, Ks)
    linear_2 = Adapter.init(unet.get_submodule(LINEAR_2), rank, alpha, generator)
    adapters = {**lora.adapters, LINEAR_1: KAdapter(down, up), LINEAR_2: linear_2}
    return LoRA(adapters, lora.scalar_embedding)


def reads_k(adapter: Adapter, unet: UNet) -> bool:
    """Whether a file's adapter of linear_1 is a KAdapter: it reads the crop alone, and 0 as 0."""
    down, columns = adapter.down.float(), crop_columns(unet)
    code = down[:, columns] @ sinusoids([0], unet.config.time_ids_width)[0].to(down.device)
    is_elsewhere = down.square().sum() - down[:, columns].square().sum() > 0
    return bool(down.any() and not is_elsewhere and code.abs().max() < 0.02)


def for_one_K(lora: LoRA, unet: UNet, K: int) -> LoRA:
    """The same student for K steps alone, as a LoRA that needs no crop.

    One row reads crop_top = 0, whose sinusoids are constant, and carries all that K does.
    """
    adapter, columns = lora.adapters[LINEAR_1], crop_columns(unet)
    width = unet.config.time_ids_width
    code = adapter.down.float()[:, columns] @ sinusoids([K], width)[0].to(adapter.down.device)
    vector = adapter.scale * adapter.up.detach().float() @ code
    down, up = torch.zeros_like(adapter.down).float(), torch.zeros_like(adapter.up).float()
    down[0, columns] = sinusoids([0], width)[0].to(down) / (width / 2)
    up[:, 0] = vector + crop_effect(unet, [K])[:, 0].to(vector)
    return LoRA({**lora.adapters, LINEAR_1: KAdapter(down, up)}, lora.scalar_embedding)
