"""Small data sets on disk, which the tests of the data share."""

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def noise(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def on_white(pixels, alpha) -> np.ndarray:
    """Alpha blending by its definition."""
    opacity = alpha / 255.0
    return pixels * opacity + 255 * (1 - opacity)


def encoded(image, kind="PNG", **options) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def write(folder: Path, files: dict) -> Path:
    """Files by name, as bytes or text; a dict of such is a tar."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, dict):
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
            continue
        with tarfile.open(folder / name, "w", format=tarfile.GNU_FORMAT) as tar:
            for member in content:
                tar.add(write(folder / f"{name}.in", {member: content[member]}) / member, member)
            shutil.rmtree(folder / f"{name}.in")
    return folder


def pairs(*numbers, where="") -> dict:
    """Small pictures, wider than high, each with a caption as long as its number, and one more."""
    files = [(f"{where}{i:03}", encoded(noise(6, 9, 3, seed=i)), "." * (i + 1)) for i in numbers]
    return dict(p for k, png, text in files for p in ((f"{k}.png", png), (f"{k}.txt", text)))


def names(batches) -> list[str]:
    return [name for batch in batches for name in batch["names"]]


def by_name(batches) -> dict:
    return {n: {k: v[i] for k, v in b.items()} for b in batches for i, n in enumerate(b["names"])}
