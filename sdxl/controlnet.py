"""SDXL's ControlNet: residuals for the UNet's skip connections from an image of edges, depth, ..

It is a copy of the UNet's first half that also sees the image; 1x1 convolutions lead from every
output of that half to the UNet. Names and shapes are those of the published checkpoints.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from unet import Encoder, UNetConfig, check_config, per_level


@dataclass(frozen=True)
class ControlNetConfig(UNetConfig):
    """The UNet's sizes, and the image embedding's channels at the image's full size, half, .."""

    embedding: tuple[int, ...] = (16, 32, 96, 256)

    @classmethod
    def from_json(cls, config: dict) -> "ControlNetConfig":
        """From a diffusers config.json; ValueError if it is broken or of another family."""
        required = {"controlnet_conditioning_channel_order": "rgb",
                    "addition_embed_type": "text_time"}  # fmt: skip
        default = {"global_pool_conditions": False, "conditioning_channels": 3}
        check_config(config, "an SDXL ControlNet", required, default)
        # The rest are the UNet's fields, except that a ControlNet has no out_channels.
        sizes = super().from_json({**config, "out_channels": config.get("in_channels")})
        # Three convolutions of stride 2 lead from an image to the latents' size.
        name, four = "conditioning_embedding_out_channels", range(4, 5)
        return replace(sizes, embedding=per_level(config, name, levels=four))

    def check_fits(self, unet: UNetConfig) -> None:
        """ValueError unless the residuals are those of the UNet's skip connections."""
        # Its transformers may be shallower than the UNet's.
        for name in ("in_channels", "channels", "layers_per_block", "cross_attention_dim",
                     "time_ids_width", "add_embedding_dim"):  # fmt: skip
            size, expected = getattr(self, name), getattr(unet, name)
            if size != expected:
                raise ValueError(f"its {name} is {size}, not {expected} as in the UNet")


# ---------------------------------------------------------------------------------------- network
#
# The image's features are added to x_t's after the first convolution; from there on the layers are
# those of the UNet, with other weights.


class ImageEmbedding(nn.Module):
    """An image (b, 3, 8h, 8w) as features of the latents' size, (b, c, h, w)."""

    def __init__(self, widths: tuple[int, ...], c: int):
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for width_in, width in pairwise(widths):
            self.blocks.append(nn.Conv2d(width_in, width_in, 3, padding=1))
            self.blocks.append(nn.Conv2d(width_in, width, 3, stride=2, padding=1))
        self.conv_out = nn.Conv2d(widths[-1], c, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        h = F.silu(self.conv_in(image))
        for block in self.blocks:
            h = F.silu(block(h))
        return self.conv_out(h)


class ControlNet(Encoder):
    """Residuals for UNet.forward's control from x_t (b, 4, h, w) and an image (b, 3, 8h, 8w)."""

    def __init__(self, config: ControlNetConfig):
        super().__init__(config)
        self.controlnet_cond_embedding = ImageEmbedding(config.embedding, config.channels[0])
        self.controlnet_down_blocks = nn.ModuleList(nn.Conv2d(c, c, 1) for c in self.skip_widths)
        self.controlnet_mid_block = nn.Conv2d(config.channels[-1], config.channels[-1], 1)

    def forward(self, x_t: Tensor, t: Tensor, cond: dict, image: Tensor, scale: float = 1.0):
        """image in [0, 1] -> scale times each skip connection's residual, and last the middle's."""
        dtype = self.conv_in.weight.dtype
        h = self.conv_in(x_t.to(dtype)) + self.controlnet_cond_embedding(image.to(dtype))
        features = self.encode(h, self.embed(t, cond), cond["prompt_embeds"].to(dtype))
        outputs = [*self.controlnet_down_blocks, self.controlnet_mid_block]
        # In the order of UNet.forward's skip connections, so that they add up one by one.
        return [scale * output(h) for output, h in zip(outputs, features, strict=True)]
