"""Adversarial TDD, "Ours (adv)" in Table 1: a discriminator on the teacher's features.

The paper takes over PCM's process, and this code PCM's heads, features and losses: the student's
jump to tau~ is the fake sample, the target network's the real one; both are noised further to one
time and compared by the features that the frozen teacher computes of them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from sdxl.lora import active_adapters
from solvers import Schedule, renoise
from unet import UNet

# -------------------------------------------------------------------------------- discriminator
#
# The teacher's encoder already handles pictures at any noise level; only the heads are trained.


class Head(nn.Module):
    """PCM's head on a feature map (b, c, h, w): 1x1 convolutions of its width, logits (b, hw)."""

    def __init__(self, c: int):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(c, c, 1), nn.GroupNorm(32, c), nn.LeakyReLU())
        self.conv2 = nn.Sequential(nn.Conv2d(c, c, 1), nn.GroupNorm(32, c), nn.LeakyReLU())
        self.conv_out = nn.Conv2d(c, 1, 1)

    def forward(self, h: Tensor) -> Tensor:
        h = self.conv1(h)
        return self.conv_out(h + self.conv2(h)).flatten(1)


class Heads(nn.Module):
    """A head for each of the teacher's features."""

    def __init__(self, widths: list[int]):
        super().__init__()
        self.heads = nn.ModuleList(Head(c) for c in widths)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        # In float32, beside a base in half precision: heads are small, and so are their gradients.
        dtype = next(self.parameters()).dtype
        return [head(h.to(dtype)) for head, h in zip(self.heads, features, strict=True)]


def teacher_features(unet: UNet, x_t: Tensor, t: Tensor, cond: dict) -> list[Tensor]:
    """The plain teacher's features of x_t: each level's output, and the middle's."""
    dtype = unet.conv_in.weight.dtype
    with active_adapters(unet):
        h = unet.conv_in(x_t.to(dtype))
        *skips, middle = unet.encode(h, unet.embed(t, cond), cond["prompt_embeds"].to(dtype))
    # A level's output is the skip connection behind its downsampler, which the last one lacks.
    stride, levels = unet.config.layers_per_block + 1, len(unet.config.channels)
    ends = [(i + 1) * stride for i in range(levels - 1)] + [len(skips) - 1]
    return [*(skips[end] for end in ends), middle]


# ---------------------------------------------------------------------------------------- losses
#
# Both networks' samples are at tau~. Noised to a time up to a segment higher they are harder to
# tell apart, and the student's gradient is smoother.


def noised_times(tau: Tensor, reach: int, T: int, u: Tensor) -> Tensor:
    """A time for each example, uniform in [tau~, tau~ + reach] by u in [0, 1), at most T - 1."""
    high = (tau + reach).clamp(max=T - 1)
    return tau + (u * (high - tau + 1)).floor().long()


def hinge(logits: list[Tensor], sign: float) -> Tensor:
    """max(0, 1 - sign * logit), each head with the same weight whatever the size of its map."""
    return torch.stack([F.relu(1 - sign * each).mean() for each in logits]).mean()


class Discriminator:
    """Heads on the teacher's features, at times within `reach` = T/K_min above tau~.

    heads_ddp: the heads, wrapped by DDP or not.
    """

    def __init__(self, unet: UNet, reach: int, seed: int):
        self.unet, self.reach = unet, reach
        # The same heads from the same seed on every process.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            heads = Heads([*unet.config.channels, unet.config.channels[-1]])
        self.heads = self.heads_ddp = heads.to(unet.conv_in.weight.device)

    def losses(
        self, prediction: Tensor, target: Tensor, cond, tau: Tensor, u: Tensor, noise: Tensor,
        schedule: Schedule,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """g_loss of the student and d_loss of the heads, for jumps (b, ..) to tau (b,).

        u (b,) in [0, 1) decides the time, noise (2b, ..) is added to reach it. The sum of both
        losses may go backward at once: neither has a gradient for the other's weights.
        """
        t = noised_times(tau, self.reach, schedule.T, u)
        z_fake, z_real = noise.chunk(2)
        x_fake = renoise(prediction, tau, t, z_fake, schedule)
        fake = teacher_features(self.unet, x_fake, t, cond)
        with torch.no_grad():
            x_real = renoise(target, tau, t, z_real, schedule)
            real = teacher_features(self.unet, x_real, t, cond)
        # One call with both, so that DDP sees one forward pass for the one backward pass.
        both = [torch.cat([f.detach(), r]) for f, r in zip(fake, real, strict=True)]
        logits = [each.chunk(2) for each in self.heads_ddp(both)]
        d_loss = hinge([real for _, real in logits], 1) + hinge([fake for fake, _ in logits], -1)
        # The student's gradient goes through frozen heads.
        frozen = {name: p.detach() for name, p in self.heads.named_parameters()}
        logits = functional_call(self.heads, frozen, (fake,))
        return hinge(logits, 1), d_loss
