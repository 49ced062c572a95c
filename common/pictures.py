"""Pictures in and out: image files to RGB, pixel tensors to pictures, pictures to a grid."""

import io
import math
import sys
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from common import files

# What pillow reads of raster formats that it knows by a signature. EPS, PDF and the like run other
# programs; TGA and PCX would take damaged files for pictures.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "JPEG2000", "TIFF", "BMP", "DIB", "GIF", "PPM", "QOI")

# ------------------------------------------------------------------------------------------ reading
#
# Pixels are what viewers show: upright, in sRGB, on white.


def open_image(path: Path) -> Image.Image:
    """A picture file in RGB, as `to_rgb` has it; ValueError if it cannot be read."""
    try:
        image, note = to_rgb(Image.open(path, formats=FORMATS))
    # A decoder may raise anything over a broken file.
    except Exception as problem:
        raise ValueError(f"{path} is no picture that can be read: {problem}") from None
    if note:
        print(f"{path}: {note}", file=sys.stderr)
    return image


def to_rgb(image: Image.Image) -> tuple[Image.Image, str]:
    """A picture in 8-bit sRGB, turned as its EXIF says, on white where it is transparent.

    16 bits give their upper byte, longer numbers are scaled (`_to_8_bits`). Returns a note too, ""
    unless the colour profile is broken and was ignored. ValueError for NaN and infinity.
    """
    profile = image.info.get("icc_profile")
    # Pillow scales every PGM of more than 8 bits to 16.
    is_16_bit = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM")
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        image = _to_8_bits(image, is_16_bit)
    if not image.has_transparency_data:
        return _to_srgb(image, profile)
    key = image.info.get("transparency")
    # Pillow reduces a PNG's colours to 8 bits, but not the one that stands for transparent.
    if isinstance(key, tuple) and max(key) > 255:
        image.info["transparency"] = tuple(value >> 8 for value in key)
    rgba = image.convert("RGBA")
    grey = image.mode in ("1", "L", "LA")
    opaque, note = _to_srgb(image.convert("L") if grey else rgba.convert("RGB"), profile)
    white = Image.new("RGB", image.size, "white")
    white.paste(opaque, mask=rgba.getchannel("A"))
    return white, note


def _to_8_bits(image: Image.Image, is_16_bit: bool) -> Image.Image:
    """Grey values of 16 or 32 bits in 8; with an alpha channel if one of them stands for clear.

    Floats from 0 to 1 and integers of 8 or 16 bits have a scale of their own; any others, such as a
    depth in metres, go from the smallest to the largest.
    """
    values = np.asarray(image)
    low, high = values.min().item(), values.max().item()
    if not math.isfinite(low + high):
        raise ValueError("its values are not all finite")
    if is_16_bit or (image.mode == "I" and low >= 0 and 255 < high < 65536):
        grey = values >> 8
    elif image.mode == "I" and low >= 0 and high < 256:
        grey = values
    else:
        if not (image.mode == "F" and low >= 0 and high <= 1):
            values = (values.astype(np.float64) - low) / ((high - low) or 1)
        grey = (values * 255).round()
    grey = Image.fromarray(grey.astype(np.uint8))
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey.putalpha(Image.fromarray(255 * (np.asarray(image) != key).astype(np.uint8)))
    return grey


def _to_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, str]:
    """An opaque picture in RGB by its ICC profile, and a note if that could not be used."""
    if image.mode == "1":
        image = image.convert("L")
    # Pillow converts LAB by itself, whatever the profile.
    if not profile or image.mode == "LAB":
        return image.convert("RGB"), ""
    try:
        mode, transform = _srgb_transform(profile)
        # A grey picture may have a profile for colours, and that is how it is read.
        if (mode != image.mode and "CMYK" in (mode, image.mode)) or mode == "L" != image.mode:
            raise ValueError(f"it is for {mode}, the picture is {image.mode}")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, KeyError) as problem:
        return image.convert("RGB"), f"its colour profile is ignored: {problem}"
    if transform is None:
        return image.convert("RGB"), ""
    return transform.apply(image if image.mode == mode else image.convert(mode)), ""


@lru_cache(64)
def _srgb_transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """The mode that an ICC profile is for, and its way to sRGB; None if that changes nothing."""
    source = ImageCms.getOpenProfile(io.BytesIO(profile))
    mode = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}[source.profile.xcolor_space.strip()]
    srgb = ImageCms.createProfile("sRGB")
    transform = ImageCms.buildTransform(source, srgb, mode, "RGB")
    # Most profiles are sRGB's under one name or another, and a photo takes a tenth of a second.
    if mode == "RGB":
        steps = np.linspace(0, 255, 17).round().astype(np.uint8)
        probe = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
        changed = np.asarray(transform.apply(Image.fromarray(probe)), int)
        if np.abs(changed - probe).max() <= 1:
            return mode, None
    return mode, transform


def control_pixels(path: Path, width: int, height: int) -> Tensor:
    """A control image of this size, (1, 3, H, W) in [0, 1]; a line says if its shape is another."""
    image = open_image(path)
    if abs(image.width * height / (image.height * width) - 1) > 0.02:
        sizes = f"{image.width} x {image.height} is stretched to {width} x {height}"
        print(f"--control-image {path}: {sizes}", file=sys.stderr)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    return rearrange(torch.from_numpy(np.array(image)), "h w c -> 1 c h w") / 255


# ------------------------------------------------------------------------------------------ writing

LARGEST_GRID = 100  # pictures: of 1024 pixels each it takes 300 MB


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pixels (b, 3, H, W) in [-1, 1] as pictures."""
    pixels = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte()
    return [Image.fromarray(x) for x in rearrange(pixels, "b c h w -> b h w c").cpu().numpy()]


def save_grid(images: list[Image.Image | Path], path: Path, columns: int = 0) -> None:
    """Pictures of one size row by row; without a number of columns as near a square as possible.

    images: pictures, or their files, of which one is open at a time.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    for i, image in enumerate(images):
        with Image.open(image) if isinstance(image, Path) else nullcontext(image) as picture:
            width, height = picture.size
            if i == 0:
                grid = Image.new("RGB", (columns * width, rows * height), "white")
            grid.paste(picture, (i % columns * width, i // columns * height))
    with files.atomic_write(path) as part:
        grid.save(part, "PNG")


def write_grid(paths: list[Path], path: Path) -> None:
    """The pictures of these files side by side, unless they are too many to be looked at."""
    if len(paths) <= LARGEST_GRID:
        save_grid(paths, path)
    else:
        print(f"no {path.name}: {len(paths)} pictures, and {LARGEST_GRID} fit", file=sys.stderr)
