"""Pictures in and out: image files to RGB, pixel tensors to pictures, pictures to a grid."""

import math
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image
from torch import Tensor

from common import files


def open_image(path: Path) -> Image.Image:
    """A picture in RGB, 16-bit depth maps reduced to 8 bits; ValueError if it cannot be read."""
    try:
        image = Image.open(path)
        # convert() would clip, and turn a depth map white.
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as problem:
        raise ValueError(f"{path} is no picture that can be read: {problem}") from None


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pixels (b, 3, H, W) in [-1, 1] as pictures."""
    pixels = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte()
    return [Image.fromarray(x) for x in rearrange(pixels, "b c h w -> b h w c").cpu().numpy()]


def save_grid(images: list[Image.Image], path: Path, columns: int = 0) -> None:
    """Pictures of one size row by row; without a number of columns as near a square as possible."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = images[0].size
    grid = Image.new("RGB", (columns * width, rows * height), "white")
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * width, i // columns * height))
    with files.atomic_write(path) as part:
        grid.save(part, "PNG")
