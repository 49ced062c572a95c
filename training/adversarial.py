"""Adversarial TDD, "Ours (adv)" in Table 1: a discriminator on the teacher's own features.

The paper takes over PCM's process: the student's jump to tau~ is the fake, the target network's the
real, both noised further to one time, and what is compared is how the frozen teacher sees them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from sdxl.lora import using
from solvers import Schedule, renoise
from unet import UNet

# -------------------------------------------------------------------------------- discriminator
#
# The teacher's encoder knows pictures at any noise level as it is; only the heads are trained.


class Heads(nn.Module):
    """A small convolution head for each feature map (b, c, h, w), giving logits (b, h' w')."""

    def __init__(self, widths: list[int], hidden: int = 256):
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(c, hidden, 3, stride=2, padding=1), nn.GroupNorm(8, hidden), nn.SiLU(),
                nn.Conv2d(hidden, hidden, 3, padding=1), nn.GroupNorm(8, hidden), nn.SiLU(),
                nn.Conv2d(hidden, 1, 1),
            )
            for c in widths
        )  # fmt: skip

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        # In float32, beside a base in half precision: heads are small, and so are their gradients.
        dtype = next(self.parameters()).dtype
        return [head(h.to(dtype)).flatten(1) for head, h in zip(self.heads, features, strict=True)]


def teacher_features(unet: UNet, x_t: Tensor, t: Tensor, cond: dict) -> list[Tensor]:
    """What the plain teacher makes of x_t at the end of each level, and in the middle."""
    dtype = unet.conv_in.weight.dtype
    with using(unet):
        h = unet.conv_in(x_t.to(dtype))
        *skips, middle = unet.encode(h, unet.embed(t, cond), cond["tokens"].to(dtype))
    # A level leaves one skip connection a block, and one more that is already the next one's size.
    blocks, levels = unet.config.blocks, len(unet.config.channels)
    return [skips[(i + 1) * (blocks + 1) - 1] for i in range(levels)] + [middle]


# ---------------------------------------------------------------------------------------- losses
#
# Both networks' samples are at tau~; between there and a segment higher they get harder to tell
# apart, and the student's gradient smoother.


def noised_times(tau: Tensor, reach: int, T: int, u: Tensor) -> Tensor:
    """A time for each example, uniform in [tau~, tau~ + reach] by u in [0, 1), at most T - 1."""
    high = (tau + reach).clamp(max=T - 1)
    return tau + (u * (high - tau + 1)).floor().long()


def hinge(logits: list[Tensor], sign: float) -> Tensor:
    """max(0, 1 - sign * logit): every head counts the same, whatever the size of its map."""
    return torch.stack([F.relu(1 - sign * each).mean() for each in logits]).mean()


class Adversary:
    """The discriminator's side of a step, its times within `reach` = T/K_min above tau~.

    `call` stands for the heads, with DDP around them or not.
    """

    def __init__(self, unet: UNet, heads: Heads, reach: int):
        self.unet, self.heads, self.call, self.reach = unet, heads, heads, reach

    @classmethod
    def fresh(cls, unet: UNet, reach: int, seed: int) -> "Adversary":
        """With random heads, the same from the same seed on every process."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            heads = Heads([*unet.config.channels, unet.config.channels[-1]])
        return cls(unet, heads.to(unet.conv_in.weight.device), reach)

    def losses(self, pred, aim, c, tau, u, noise, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """(the student's, the discriminator's) loss for jumps to tau (b,), both (b, ..).

        u (b,) in [0, 1) and noise (2b, ..) are the draws of the time and of the noise added to it.
        The sum of both may go backward at once: neither has a gradient for the other's weights.
        """
        t = noised_times(tau, self.reach, schedule.T, u)
        z_fake, z_real = noise.chunk(2)
        fake = teacher_features(self.unet, renoise(pred, tau, t, z_fake, schedule), t, c)
        with torch.no_grad():
            real = teacher_features(self.unet, renoise(aim, tau, t, z_real, schedule), t, c)
        # One call with both, so that DDP sees one forward pass for the one backward pass.
        both = self.call([torch.cat([f.detach(), r]) for f, r in zip(fake, real, strict=True)])
        of_fake, of_real = zip(*(each.chunk(2) for each in both), strict=True)
        frozen = {name: p.detach() for name, p in self.heads.named_parameters()}
        logits = functional_call(self.heads, frozen, (fake,))
        student = -torch.stack([each.mean() for each in logits]).mean()
        return student, hinge(of_real, 1) + hinge(of_fake, -1)
