"""Pictures as PNG files that carry their settings and a command line that makes them again."""

import json
import os
import shlex
from pathlib import Path

from PIL import Image, PngImagePlugin

from common import files

# Of pictures' settings. In version 1 --tune-guidance was the paper's w', 2 had no contents.
SETTINGS_VERSION = 3

# The same content under another path gives the same picture, so paths are not compared.
PATHS = ("model", "tokenizer", "unet", "vae", "lora", "controlnet", "control_image")


def names_png(output: str, several: bool) -> bool:
    """Whether --output is a PNG file, and not a folder; ValueError if it is neither."""
    suffix = "" if output.endswith(("/", os.sep)) or Path(output).is_dir() else Path(output).suffix
    if suffix.lower() in Image.registered_extensions():
        if suffix.lower() != ".png":
            raise ValueError(f"--output {output}: pictures are PNG files: name it .png")
        if several:
            raise ValueError(f"--output {output}: several pictures need a folder")
        return True
    return False


def picture_settings(flags: dict, contents: dict, prompt: str, seed: int) -> dict:
    """All that decides one picture, as it is kept in its file; contents: of the files in PATHS."""
    settings = {**flags, "prompt": [prompt], "seed": seed, "num_images": 1}
    # Its place and the number of pictures sampled with it change nothing about a picture.
    for name in ("prompts", "output", "save_latents", "batch_size", "compile", "low_memory"):
        del settings[name]
    settings = {name: value for name, value in settings.items() if value not in (None, [])}
    return {"version": SETTINGS_VERSION, "contents": contents, **settings}


def save_png(image: Image.Image, path: Path, settings: dict) -> None:
    """A PNG with its settings and the command that makes it again."""
    words = ["python", "sample.py"]
    for name, value in settings.items():
        # Both are K's range, which the LoRA's header holds.
        if name not in ("version", "contents", "kmin", "kmax"):
            for each in value if isinstance(value, list) else [value]:
                words.append(f"--{name.replace('_', '-')}={each}")
    info = PngImagePlugin.PngInfo()
    info.add_itxt("settings", json.dumps(settings, default=str))
    # A command line may hold bytes that are no UTF-8.
    command = shlex.join([*words, f"--output={path.name}"]).encode("utf-8", "replace").decode()
    info.add_itxt("command", command)
    with files.atomic_write(path) as part:
        image.save(part, "PNG", pnginfo=info)


def is_finished(path: Path, settings: dict) -> bool:
    """Whether a whole picture of these settings exists; ValueError if it has other settings."""
    if not path.exists():
        return False
    try:
        with Image.open(path) as image:
            image.load()
            saved = json.loads(getattr(image, "text", {}).get("settings", "{}"))
    except (OSError, ValueError, SyntaxError, RecursionError, Image.DecompressionBombError):
        return False
    if not isinstance(saved, dict) or not saved:
        raise ValueError(f"{path} is not sample.py's: name another --output")
    settings = json.loads(json.dumps(settings, default=str))
    new, old = _compared(settings), _compared(saved)
    changed = ", ".join(sorted(k for k in {**new, **old} if new.get(k) != old.get(k)))
    if changed:
        raise ValueError(f"{path} was made with another {changed}: name another --output")
    return True


def _compared(settings: dict) -> dict:
    """What must be the same for a picture to count as made: flags, contents instead of paths."""
    flags = {k: v for k, v in settings.items() if k not in ("device", "contents", *PATHS)}
    contents = settings.get("contents")
    return flags | (contents if isinstance(contents, dict) else {})
