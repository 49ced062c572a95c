"""Pictures from SDXL in 4 to 8 steps, with a TDD LoRA: prompts in, PNG files out.

    python sample.py --model sdxl/ --lora tdd.safetensors --prompt "a red fox in the snow"
    torchrun --nproc-per-node 8 sample.py --model sdxl/ --lora tdd.safetensors \
        --prompts coco30k.txt --output coco/
"""

from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image
from torch import Tensor

from common import files


def open_image(path: Path) -> Image.Image:
    """A picture in RGB; depth maps in 16 bit come down to 8."""
    try:
        image = Image.open(path)
        # convert() would clip, and leave a depth map white.
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as problem:
        raise ValueError(f"{path} is no picture that can be read: {problem}") from None


# ----------------------------------------------------------------------------------------- pictures
#
# An image file carries its settings, and a command line that makes the same image again.


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pixels (b, 3, H, W) in [-1, 1] as pictures."""
    bytes_ = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte()
    return [Image.fromarray(x) for x in rearrange(bytes_, "b c h w -> b h w c").cpu().numpy()]


def save_grid(images: list[Image.Image], path: Path, columns: int = 0) -> None:
    # As near to a square as whole rows allow, unless told otherwise.
    columns = columns or round(len(images) ** 0.5 + 0.49)
    width, height = images[0].size
    grid = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * width, i // columns * height))
    with files.whole(path) as part:
        grid.save(part, "PNG")
