"""SDXL's autoencoder: pictures in [-1, 1] to latents and back, (b, 3, 8h, 8w) <-> (b, 4, h, w)."""

from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise, product

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from unet import ResnetBlock, check_config


@dataclass(frozen=True)
class VAEConfig:
    """The sizes of an autoencoder; the defaults are SDXL's. channels: from the finest level."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2
    groups: int = 32
    latent_channels: int = 4
    scaling_factor: float = 0.13025

    @classmethod
    def from_json(cls, config: dict) -> "VAEConfig":
        """From a diffusers config.json; ValueError if it describes another kind of autoencoder."""
        same = {"_class_name": "AutoencoderKL", "use_quant_conv": True, "use_post_quant_conv": True}
        same |= {"mid_block_add_attention": True, "shift_factor": None, "latents_mean": None}
        check_config(config, "SDXL's AutoencoderKL", {}, same)
        sizes = ("layers_per_block", "norm_num_groups", "latent_channels", "scaling_factor")
        if missing := [name for name in ("block_out_channels", *sizes) if name not in config]:
            raise ValueError(f"not the config of an AutoencoderKL: it has no {missing[0]}")
        return cls(tuple(config["block_out_channels"]), *(config[name] for name in sizes))


# ------------------------------------------------------------------------------- encoder, decoder
#
# Everything is one chain, so nested Sequentials suffice; their keys are the checkpoints' names. The
# UNet's residual block does nearly all the work, here without a time embedding.


class Attention(nn.Module):
    """One head over all pixels of x (b, c, h, w), added to it."""

    def __init__(self, c: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
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


def _coder(c_in: int, widths, c_out: int, groups: int, **inner: nn.Module) -> nn.Sequential:
    """One direction, (b, c_in, ..) -> (b, c_out, ..): the inner modules between convolutions."""
    first, last = (nn.Conv2d(*c, 3, padding=1) for c in ((c_in, widths[0]), (widths[-1], c_out)))
    norm = nn.GroupNorm(groups, widths[-1], eps=1e-6)
    return _named(conv_in=first, **inner, conv_norm_out=norm, conv_act=nn.SiLU(), conv_out=last)


def _levels(widths, blocks: int, groups: int, name: str, resize, **conv) -> nn.Sequential:
    """A level a width: residual blocks, and a change of size in front of the next level."""
    levels = [{"resnets": _resnets(*w, blocks, groups)} for w in pairwise((widths[0], *widths))]
    for level, c in zip(levels[:-1], widths):
        level[name] = nn.Sequential(_named(resize=resize, conv=nn.Conv2d(c, c, 3, **conv)))
    return nn.Sequential(*(_named(**level) for level in levels))


def _resnets(c_in: int, c: int, blocks: int, groups: int) -> nn.Sequential:
    widths = [c_in] + [c] * blocks
    return nn.Sequential(*(ResnetBlock(*w, 0, groups, eps=1e-6) for w in pairwise(widths)))


def _named(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


# ------------------------------------------------------------------------------------ autoencoder
#
# One example at a time: at 1024 pixels the decoder's widest layers take 1 GB an example. A larger
# picture is decoded in tiles, which cross-fade where they overlap.


class VAE(nn.Module):
    """Pictures to latents in the UNet's scale and back; keep it in float32, float16 overflows."""

    tile, overlap = 128, 32  # in latents

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config, self.factor = config, 2 ** (len(config.channels) - 1)
        widths, c, groups = config.channels, config.latent_channels, config.groups
        # A border on the right and below only: the weights were trained for it.
        border, nearest = nn.ZeroPad2d((0, 1, 0, 1)), nn.Upsample(scale_factor=2)
        down = _levels(widths, config.blocks, groups, "downsamplers", border, stride=2)
        up = _levels(widths[::-1], config.blocks + 1, groups, "upsamplers", nearest, padding=1)
        middle_1, middle_2 = Middle(widths[-1], groups), Middle(widths[-1], groups)
        self.encoder = _coder(3, widths, 2 * c, groups, down_blocks=down, mid_block=middle_1)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * c, 2 * c, 1), nn.Conv2d(c, c, 1)
        self.decoder = _coder(c, widths[::-1], 3, groups, mid_block=middle_2, up_blocks=up)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images (b, 3, H, W) in [-1, 1] -> latents (b, 4, H/8, W/8): by noise, or the mean."""
        dtype = self.quant_conv.weight.dtype
        # quant_conv gives a Gaussian an example: its mean and its log variance.
        moments = [self.quant_conv(self.encoder(x)) for x in images.to(dtype).split(1)]
        latents, log_variance = torch.cat(moments).chunk(2, 1)
        if noise is not None:
            latents = latents + noise.to(dtype) * (log_variance.clamp(-30, 20) / 2).exp()
        return latents * self.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Images (b, 3, 8h, 8w) of latents (b, 4, h, w), about [-1, 1] but not clamped to it."""
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
            window = (window_y[:, None] * window_x).to(part)  # (8 tile, 8 tile)
            image[..., f * y : f * (y + size), f * x : f * (x + size)] += window * part
        return image

    def _windows(self, n: int) -> list[tuple[int, Tensor]]:
        """Where the tiles along n latents start, and each one's weights, (8 tile,)."""
        f, size = self.factor, self.tile
        starts = [*range(0, n - size, size - self.overlap), max(n - size, 0)]
        place = torch.arange(f * n, dtype=torch.float64) / f
        # A tile fades in until the one before ends and loses what it takes: all sums are one.
        fades = [((place - b) / (a + size - b)).clamp(0, 1) for a, b in pairwise(starts)]
        shares = pairwise([torch.ones_like(place), *fades, torch.zeros_like(place)])
        return [(a, (b - c)[f * a : f * (a + size)]) for a, (b, c) in zip(starts, shares)]
