"""SDXL's UNet: eps(x_t, t, cond), with the names and shapes of the published checkpoints.

One class builds the full model (2.57 B parameters), tiny ones for tests and pixel-space ones for
CIFAR-10; only the config differs. A condition is a dict of tensors, the last for some students:

    prompt_embeds (b, n, 2048)  both text encoders' hidden states, attended to
    pooled (b, 1280)            the second encoder's projected end token
    time_ids (b, 6)             original height, width; crop top, left; target height, width
    scalar (b, 4 c)             from a `ScalarEmbedding`, for a network with one more input
"""

import math
import reprlib
from dataclasses import dataclass
from itertools import zip_longest

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn


@dataclass(frozen=True)
class UNetConfig:
    """The sizes of a UNet; the defaults are SDXL's.

    channels, transformer_depth and heads have one entry a level, from the finest; a depth of 0 is a
    level without attention. scalar: the kind of a `ScalarEmbedding`; a teacher has none.
    """

    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280)
    transformer_depth: tuple[int, ...] = (0, 2, 10)
    heads: tuple[int, ...] = (5, 10, 20)
    mid_transformer_depth: int = 10
    layers_per_block: int = 2
    groups: int = 32
    cross_attention_dim: int = 2048
    time_ids_width: int = 256
    add_embedding_dim: int = 2816
    scalar: str = ""

    def __post_init__(self):
        for c, heads in zip(self.channels, self.heads, strict=True):
            if min(c, heads) < 1 or c % heads or c % self.groups:
                raise ValueError(f"{c} channels do not make {heads} heads and {self.groups} groups")

    @classmethod
    def from_json(cls, config: dict) -> "UNetConfig":
        """From a diffusers config.json; ValueError if it is broken or of another family."""
        if "told" in config:
            raise ValueError('its "told" was written by an older version: export the UNet again')
        required = {"addition_embed_type": "text_time", "use_linear_projection": True}
        check_config(config, "an SDXL UNet", required, UNET_DEFAULTS)
        kinds = per_level(config, "down_block_types", ("DownBlock2D", "CrossAttnDownBlock2D"))
        up = [kind.replace("Down", "Up") for kind in reversed(kinds)]
        check_config(config, "an SDXL UNet", {}, {"up_block_types": up})
        levels = range(len(kinds), len(kinds) + 1)
        depth = per_level(config, "transformer_layers_per_block", range(33), levels)
        # diffusers' "attention_head_dim" holds the number of heads, for history's sake.
        return cls(
            entry(config, "in_channels"), entry(config, "out_channels"),
            per_level(config, "block_out_channels", SIZES, levels),
            tuple(d if "Attn" in kind else 0 for d, kind in zip(depth, kinds, strict=True)),
            per_level(config, "attention_head_dim", SIZES, levels), depth[-1],
            entry(config, "layers_per_block", range(1, 9)), entry(config, "norm_num_groups"),
            entry(config, "cross_attention_dim"), entry(config, "addition_time_embed_dim"),
            entry(config, "projection_class_embeddings_input_dim"),
            entry({"scalar": "", **config}, "scalar", ("", "target_time")),
        )  # fmt: skip


# ------------------------------------------------------------------------------------- config.json
#
# JSON may hold anything anywhere. Sizes have limits that no such model comes near, since a billion
# layers would take all memory, and what is not built here may not be asked for.

SIZES = range(1, 2**14 + 1)
UNET_DEFAULTS = {
    "act_fn": "silu", "center_input_sample": False, "class_embed_type": None, "freq_shift": 0,
    "downsample_padding": 1, "flip_sin_to_cos": True, "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-5, "num_attention_heads": None,
    "resnet_out_scale_factor": 1, "resnet_skip_time_act": False, "timestep_post_act": None,
    "resnet_time_scale_shift": "default", "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None, "time_embedding_act_fn": None, "time_embedding_type": "positional",
}  # fmt: skip


def check_config(config: dict, family: str, required: dict, default: dict) -> None:
    """ValueError unless all values are as they must be; those in `default` may be left out."""
    for name, value in {**required, **default}.items():
        actual = config.get(name, default.get(name))
        # In diffusers null is false.
        if (False if actual is None else actual) != (False if value is None else value):
            raise ValueError(f"not {family}: {name} is {reprlib.repr(actual)}, not {value!r}")


def entry(config: dict, name: str, allowed=SIZES):
    """A config's entry, one of the allowed numbers or strings; ValueError for anything else."""
    # 2.0 and true are in a range of whole numbers, but are none.
    if type(value := config.get(name)) is not type(allowed[0]) or value not in allowed:
        allowed = f"{allowed[0]!r} .. {allowed[-1]!r}"
        raise ValueError(f"{name} is {reprlib.repr(value)}, not in {allowed}")
    return value


def per_level(config: dict, name: str, allowed=SIZES, levels: range = range(1, 7)) -> tuple:
    """A config's list of so many allowed entries, or one for all; ValueError for anything else."""
    values = config.get(name)
    if isinstance(values, list) and len(values) not in levels:
        raise ValueError(f"{name} has {len(values)} entries, not {levels[0]} to {levels[-1]}")
    values = values if isinstance(values, list) else [values] * levels[0]
    return tuple(entry({name: value}, name, allowed) for value in values)


# ------------------------------------------------------------------------------------- embeddings
#
# Sinusoids are computed in float32 and then cast to the weights' precision: in bfloat16 the
# timesteps 997 to 1000 are one number.


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Sinusoids of t: cosines, then sines, of 10000^(-i/half) t; (b,) -> (b, width) in float32."""
    half = width // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
    phase = t.float()[:, None] * frequency
    return torch.cat([phase.cos(), phase.sin()], 1)


class Embedding(nn.Module):
    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(width_in, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x.to(self.linear_1.weight.dtype))))


class ScalarEmbedding(Embedding):
    """Where a jump ends (TCD, Eq. 24), (b,), as a vector to add to the time embedding, (b, 4 c).

    The last layer is zero-initialised, so it has no effect at first.
    """

    def __init__(self, c: int):
        super().__init__(c, 4 * c)
        nn.init.zeros_(self.linear_2.weight)
        nn.init.zeros_(self.linear_2.bias)

    def forward(self, value: Tensor) -> Tensor:
        return super().forward(timestep_embedding(value, self.linear_1.in_features))


# ----------------------------------------------------------------------------------------- blocks
#
# Module names are those of the published checkpoints, quirks included: an output layer is a list of
# one, and an empty place stands where a dropout was.


class Block(nn.Module):
    """A module whose activations may be checkpointed: recomputed in the backward pass."""

    # A full UNet's activations at 1024 pixels are far larger than its weights. recompute_context
    # (add_adapter sets it) restores what was active: managers for the forward pass and for this.
    checkpointing = False
    recompute_context = staticmethod(noop_context_fn)

    def __call__(self, *inputs):
        if self._compiled_call_impl is not None:
            for x in inputs:
                torch._dynamo.maybe_mark_dynamic(x, 0)
        if not (self.checkpointing and torch.is_grad_enabled()):
            return super().__call__(*inputs)
        return checkpoint(
            super().__call__, *inputs, use_reentrant=False, preserve_rng_state=False,
            context_fn=self.recompute_context,
        )  # fmt: skip


class ResnetBlock(Block):
    """Two convolutions around the time embedding, (b, c_in, h, w) -> (b, c, h, w)."""

    def __init__(self, c_in: int, c: int, time_width: int, groups: int, eps: float = 1e-5):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps)
        self.conv1 = nn.Conv2d(c_in, c, 3, padding=1)
        if time_width:
            self.time_emb_proj = nn.Linear(time_width, c)
        self.norm2 = nn.GroupNorm(groups, c, eps)
        self.conv2 = nn.Conv2d(c, c, 3, padding=1)
        if c_in != c:
            self.conv_shortcut = nn.Conv2d(c_in, c, 1)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        # temb is silu(time embedding) already, computed once for all blocks.
        h = self.conv1(F.silu(self.norm1(x)))
        if temb is not None:
            h = h + self.time_emb_proj(temb)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nn.Module):
    """Multi-head attention of x (b, n, c) to context (b, m, d), or to itself."""

    def __init__(self, c: int, context: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(c, c, bias=False)
        self.to_k = nn.Linear(context, c, bias=False)
        self.to_v = nn.Linear(context, c, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (rearrange(a, "b n (h d) -> b h n d", h=self.heads) for a in (q, k, v))
        h = F.scaled_dot_product_attention(q, k, v)  # (b, h, n, d)
        return self.to_out[0](rearrange(h, "b h n d -> b n (h d)"))


class GEGLU(nn.Module):
    def __init__(self, c: int, width: int):
        super().__init__()
        self.proj = nn.Linear(c, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        # The checkpoints hold both in one projection, the gate's rows last.
        h, gate = self.proj(x).chunk(2, -1)
        return h * F.gelu(gate)


class TransformerBlock(Block):
    """Self-attention, attention to the prompt, feed-forward, each added to x (b, n, c)."""

    def __init__(self, c: int, context: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(c)
        self.attn1 = Attention(c, c, heads)
        self.norm2 = nn.LayerNorm(c)
        self.attn2 = Attention(c, context, heads)
        self.norm3 = nn.LayerNorm(c)
        net = nn.Sequential(GEGLU(c, 4 * c), nn.Identity(), nn.Linear(4 * c, c))
        self.ff = nn.ModuleDict({"net": net})

    def forward(self, x: Tensor, prompt_embeds: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), prompt_embeds)
        return x + self.ff.net(self.norm3(x))


class Transformer(nn.Module):
    """`depth` transformer blocks over the pixels of x (b, c, h, w)."""

    def __init__(self, c: int, context: int, heads: int, depth: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.proj_in = nn.Linear(c, c)
        blocks = (TransformerBlock(c, context, heads) for _ in range(depth))
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = nn.Linear(c, c)

    def forward(self, x: Tensor, prompt_embeds: Tensor) -> Tensor:
        # In channels_last pixels are rows of channels in memory, so both rearranges are views.
        h = self.proj_in(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        for block in self.transformer_blocks:
            h = block(h, prompt_embeds)
        return x + rearrange(self.proj_out(h), "b (h w) c -> b c h w", h=x.shape[2])


class Level(nn.Module):
    """A level or the middle: residual blocks, each followed by a transformer if there is one."""

    def __init__(self, widths_in, c: int, depths, heads: int, config: UNetConfig):
        super().__init__()
        time_width, groups = 4 * config.channels[0], config.groups
        self.resnets = nn.ModuleList(ResnetBlock(c_in, c, time_width, groups) for c_in in widths_in)
        context = config.cross_attention_dim
        attentions = [Transformer(c, context, heads, d, groups) for d in depths if d]
        self.attentions = nn.ModuleList(attentions)

    def steps(self):
        """Pairs of a residual block and the transformer after it, the identity if there is none."""
        return zip_longest(self.resnets, self.attentions, fillvalue=lambda h, prompt_embeds: h)


def _resize(c: int, stride: int = 1) -> nn.ModuleList:
    """The convolution of a down- or upsampler, with its name in the checkpoints: 0.conv."""
    return nn.ModuleList([nn.ModuleDict({"conv": nn.Conv2d(c, c, 3, stride, padding=1)})])


# -------------------------------------------------------------------------------------- networks
#
# 320 channels at full size, 640 at half, 1280 at a quarter, and back up. Every block on the way
# down leaves its output, a skip connection, for its mirror image on the way up.


class Encoder(nn.Module):
    """The downward half and the middle, which the UNet and a ControlNet have in common."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths = config.channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = Embedding(widths[0], 4 * widths[0])
        self.add_embedding = Embedding(config.add_embedding_dim, 4 * widths[0])
        self.down_blocks = nn.ModuleList()
        # Channels of every skip connection, in the order of `encode`.
        self.skip_widths = [widths[0]]
        # A level's first block takes the width of the level above.
        for i, c in enumerate(widths):
            widths_in = [widths[max(i - 1, 0)]] + [c] * (config.layers_per_block - 1)
            depths = [config.transformer_depth[i]] * config.layers_per_block
            level = Level(widths_in, c, depths, config.heads[i], config)
            if i < len(widths) - 1:
                level.downsamplers = _resize(c, stride=2)
            self.down_blocks.append(level)
            self.skip_widths += [c] * (config.layers_per_block + (i < len(widths) - 1))
        self.mid_block = Level([c, c], c, [config.mid_transformer_depth], config.heads[-1], config)

    def embed(self, t: Tensor, cond: dict) -> Tensor:
        """Time, sizes, pooled prompt and the scalar, if any, as one vector an example, (b, 4 c)."""
        sizes = timestep_embedding(cond["time_ids"].flatten(), self.config.time_ids_width)
        # The pooled prompt, then six sizes of 256 sinusoids each.
        sizes = sizes.view(len(t), -1).to(cond["pooled"].dtype)
        pooled_and_sizes = torch.cat([cond["pooled"], sizes], 1)
        temb = self.time_embedding(timestep_embedding(t, self.config.channels[0]))
        temb = temb + self.add_embedding(pooled_and_sizes)
        if "scalar" in cond:
            temb = temb + cond["scalar"].to(temb.dtype)
        # Every residual block takes silu of it: computed here once.
        return F.silu(temb)

    def encode(self, h: Tensor, temb: Tensor, prompt_embeds: Tensor) -> list[Tensor]:
        """Every skip connection from the finest down, and last the middle's output."""
        skips = [h]
        for level in self.down_blocks:
            for resnet, attention in level.steps():
                h = attention(resnet(h, temb), prompt_embeds)
                skips.append(h)
            if hasattr(level, "downsamplers"):
                h = level.downsamplers[0].conv(h)
                skips.append(h)
        for resnet, attention in self.mid_block.steps():
            h = attention(resnet(h, temb), prompt_embeds)
        return [*skips, h]

    def checkpoint_blocks(self, on: bool = True) -> None:
        """Turn checkpointing on or off in every block."""
        for module in self.modules():
            if isinstance(module, Block):
                module.checkpointing = on


class UNet(Encoder):
    """eps(x_t, t, cond) for x_t (b, 4, h, w), any h and w; t (b,), cond as above."""

    # These stay in float32 when the rest is in half precision. In bfloat16 the last layers alone
    # add a larger error than all layers before, as large as the effect of guidance at t = 999.
    KEEP_IN_FP32 = "conv_norm_out", "conv_out"

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        widths, blocks, skips = config.channels, config.layers_per_block, [*self.skip_widths]
        self.up_blocks, below = nn.ModuleList(), widths[-1]
        # Each block takes the features from below and one skip connection, the latest first.
        for i, c in reversed(list(enumerate(widths))):
            widths_in = [(c if j else below) + skips.pop() for j in range(blocks + 1)]
            depths = [config.transformer_depth[i]] * (blocks + 1)
            level = Level(widths_in, c, depths, config.heads[i], config)
            if i > 0:
                level.upsamplers = _resize(c)
            self.up_blocks.append(level)
            below = c
        self.conv_norm_out = nn.GroupNorm(config.groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)
        if config.scalar:
            self.scalar_embedding = ScalarEmbedding(widths[0])

    def forward(self, x_t: Tensor, t: Tensor, cond: dict, control: list[Tensor] | None = None):
        """control: a ControlNet's residuals, one for each skip connection and the middle."""
        dtype = self.conv_in.weight.dtype
        prompt_embeds, temb = cond["prompt_embeds"].to(dtype), self.embed(t, cond)
        *skips, h = self.encode(self.conv_in(x_t.to(dtype)), temb, prompt_embeds)
        if control is not None:
            *skips, h = (a + b for a, b in zip([*skips, h], control, strict=True))
        for level in self.up_blocks:
            for resnet, attention in level.steps():
                h = attention(resnet(torch.cat([h, skips.pop()], 1), temb), prompt_embeds)
            if hasattr(level, "upsamplers"):
                # To the skip connection's size: odd sizes were rounded up on the way down.
                h = F.interpolate(h, size=skips[-1].shape[2:], mode="nearest")
                h = level.upsamplers[0].conv(h)
        return self.conv_out(F.silu(self.conv_norm_out(h.to(self.conv_out.weight.dtype))))
