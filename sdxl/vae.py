"""SDXL's autoencoder: images in [-1, 1] to latents and back, (b, 3, 8h, 8w) <-> (b, 4, h, w)."""

import reprlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, product

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from solvers import to_device
from unet import ResnetBlock, check_config, entry, per_level


@dataclass(frozen=True)
class VAEConfig:
    """The sizes of an autoencoder; the defaults are SDXL's. channels: from the finest level."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    groups: int = 32
    latent_channels: int = 4
    scaling_factor: float = 0.13025

    def __post_init__(self):
        for c in self.channels:
            if c < 1 or c % self.groups:
                raise ValueError(f"{c} channels do not make {self.groups} groups")

    @classmethod
    def from_json(cls, config: dict) -> "VAEConfig":
        """From a diffusers config.json; ValueError if it is broken or of another kind."""
        default = {
            "_class_name": "AutoencoderKL", "use_quant_conv": True, "use_post_quant_conv": True,
            "mid_block_add_attention": True, "shift_factor": None, "latents_mean": None,
            "latents_std": None, "act_fn": "silu", "in_channels": 3, "out_channels": 3,
        }  # fmt: skip
        check_config(config, "SDXL's AutoencoderKL", {}, default)
        channels = per_level(config, "block_out_channels")
        levels = range(len(channels), len(channels) + 1)
        for name, kind in (("down", "DownEncoderBlock2D"), ("up", "UpDecoderBlock2D")):
            per_level(config, f"{name}_block_types", (kind,), levels)
        return cls(
            channels, entry(config, "layers_per_block", range(1, 9)),
            entry(config, "norm_num_groups"), entry(config, "latent_channels"),
            real_number(config, "scaling_factor", 1e-3, 1e3),
        )  # fmt: skip


def real_number(config: dict, name: str, low: float, high: float) -> float:
    """A config's entry that is a number from low to high; ValueError for anything else."""
    value = config.get(name)
    if type(value) not in (int, float) or not low <= value <= high:
        raise ValueError(f"{name} is {reprlib.repr(value)}, not a number from {low:g} to {high:g}")
    return float(value)


# ------------------------------------------------------------------------------- encoder, decoder
#
# Each direction is one chain of modules, so nested Sequentials suffice; their keys are the
# checkpoints' names. The residual block is the UNet's, here without a time embedding.


class Attention(nn.Module):
    """One head over all pixels of x (b, c, h, w), added to it."""

    def __init__(self, c: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(c, c) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x: Tensor) -> Tensor:
        h = rearrange(self.group_norm(x), "b c h w -> b 1 (h w) c")
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + rearrange(self.to_out[0](h), "b 1 (h w) c -> b c h w", h=x.shape[2])


class Middle(nn.Module):
    """Attention between two residual blocks, at the coarsest size."""

    def __init__(self, c: int, groups: int):
        super().__init__()
        self.resnets = _resnets(c, c, 2, groups)
        self.attentions = nn.ModuleList([Attention(c, groups)])

    def forward(self, h: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](h)))


def _resnets(c_in: int, c: int, blocks: int, groups: int) -> nn.Sequential:
    widths = [c_in] + [c] * blocks
    return nn.Sequential(*(ResnetBlock(a, b, 0, groups, eps=1e-6) for a, b in pairwise(widths)))


def _levels(widths, blocks: int, groups: int, name: str, resize: Callable) -> nn.Sequential:
    """A level a width: residual blocks, then resize(c) under that name, except after the last."""
    levels = nn.Sequential()
    for c_in, c in pairwise([widths[0], *widths]):
        level = nn.Sequential(OrderedDict(resnets=_resnets(c_in, c, blocks, groups)))
        if len(levels) < len(widths) - 1:
            level.add_module(name, resize(c))
        levels.append(level)
    return levels


def _downsampler(c: int) -> nn.Sequential:
    # A border on the right and below only: the weights were trained for it.
    border, conv = nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(c, c, 3, stride=2)
    return nn.Sequential(nn.Sequential(OrderedDict(border=border, conv=conv)))


def _upsampler(c: int) -> nn.Sequential:
    nearest, conv = nn.Upsample(scale_factor=2), nn.Conv2d(c, c, 3, padding=1)
    return nn.Sequential(nn.Sequential(OrderedDict(nearest=nearest, conv=conv)))


# ------------------------------------------------------------------------------------ autoencoder
#
# One example at a time: at 1024 pixels the decoder's widest layers take 1 GB for each example. A
# larger image is decoded in tiles, which cross-fade where they overlap.


class VAE(nn.Module):
    """Images to latents in the UNet's scale and back; keep it in float32, as float16 overflows."""

    tile, overlap = 128, 32  # in latents

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.factor = 2 ** (len(config.channels) - 1)  # pixels a latent, in height and width
        fine, coarse = config.channels[0], config.channels[-1]
        c, groups, blocks = config.latent_channels, config.groups, config.layers_per_block
        self.encoder = nn.Sequential(OrderedDict(
            conv_in=nn.Conv2d(3, fine, 3, padding=1),
            down_blocks=_levels(config.channels, blocks, groups, "downsamplers", _downsampler),
            mid_block=Middle(coarse, groups),
            conv_norm_out=nn.GroupNorm(groups, coarse, eps=1e-6), conv_act=nn.SiLU(),
            conv_out=nn.Conv2d(coarse, 2 * c, 3, padding=1),
        ))  # fmt: skip
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1)
        self.post_quant_conv = nn.Conv2d(c, c, 1)
        self.decoder = nn.Sequential(OrderedDict(
            conv_in=nn.Conv2d(c, coarse, 3, padding=1),
            mid_block=Middle(coarse, groups),
            up_blocks=_levels(config.channels[::-1], blocks + 1, groups, "upsamplers", _upsampler),
            conv_norm_out=nn.GroupNorm(groups, fine, eps=1e-6), conv_act=nn.SiLU(),
            conv_out=nn.Conv2d(fine, 3, 3, padding=1),
        ))  # fmt: skip

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images (b, 3, H, W) in [-1, 1] -> latents (b, 4, H/8, W/8).

        noise: standard normal, of the latents' shape, to sample them; without it they are the mean.
        """
        dtype = self.quant_conv.weight.dtype
        # quant_conv gives a Gaussian for each example: its mean and its log variance.
        moments = [self.quant_conv(self.encoder(x)) for x in images.to(dtype).split(1)]
        latents, log_variance = torch.cat(moments).chunk(2, 1)
        if noise is not None:
            latents = latents + noise.to(dtype) * (log_variance.clamp(-30, 20) / 2).exp()
        return latents * self.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (b, 4, h, w) -> images (b, 3, 8h, 8w), near [-1, 1] but not clamped to it."""
        latents = latents.to(self.post_quant_conv.weight.dtype) / self.config.scaling_factor
        return torch.cat([self._decode_one(z) for z in latents.split(1)])

    def _decode_one(self, z: Tensor) -> Tensor:
        h, w = z.shape[2:]
        # By area: SDXL's portraits and landscapes hold no more pixels than its square.
        if h * w <= self.tile**2:
            return self.decoder(self.post_quant_conv(z))
        f, size = self.factor, self.tile
        image = z.new_zeros(1, 3, f * h, f * w)
        for (y, window_y), (x, window_x) in product(self._windows(h), self._windows(w)):
            part = self.decoder(self.post_quant_conv(z[..., y : y + size, x : x + size]))
            window = to_device((window_y[:, None] * window_x).to(part.dtype), part.device)
            image[..., f * y : f * (y + size), f * x : f * (x + size)] += window * part
        return image

    def _windows(self, n: int) -> list[tuple[int, Tensor]]:
        """The start of each tile along n latents, and its weights, (8 tile,)."""
        f, size = self.factor, self.tile
        starts = [*range(0, n - size, size - self.overlap), max(n - size, 0)]
        pixel = torch.arange(f * n, dtype=torch.float64) / f
        # Each tile fades in over its overlap with the one before, and that one loses what it takes,
        # so that the weights add up to one everywhere.
        fade_in = [torch.ones_like(pixel)]
        for start, following in pairwise(starts):
            fade_in.append(((pixel - following) / (start + size - following)).clamp(0, 1))
        fade_in.append(torch.zeros_like(pixel))
        windows = []
        for start, (fade, next_fade) in zip(starts, pairwise(fade_in), strict=True):
            windows.append((start, (fade - next_fade)[f * start : f * (start + size)]))
        return windows
