"""What the scripts share: errors in one clear line, checked flags, files that are never half."""

import contextlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def read_lines(flag: str, path: Path) -> list[str]:
    """A file's lines that are not blank; ValueError if there are none."""
    try:
        # Lines end with a line feed: splitlines() would cut captions at a dozen other characters.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as problem:
        raise ValueError(f"{flag} {path} cannot be read: {problem}") from None
    if not any(line.strip() for line in lines):
        raise ValueError(f"{flag} {path} holds no prompt")
    return [line.rstrip("\r") for line in lines if line.strip()]


def difference(there: dict, wanted: dict, free=()) -> str:
    """The first setting that differs, as "name there, not wanted"; "" if all are the same."""
    for key in {**wanted, **there}:
        if key not in free and there.get(key) != wanted.get(key):
            return f"{key.replace('_', '-')} {there.get(key)}, not {wanted.get(key)}"
    return ""


# Whatever is written appears under its name only when it is whole.


def output_folder(path: str) -> Path:
    """The folder, made if need be; a ValueError says at once if nothing can be written there."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Permissions do not tell the whole truth (read-only mounts, full disks): try it.
        probe = folder / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as problem:
        raise ValueError(
            f"cannot write to {folder}: {problem.strerror}; name another folder"
        ) from problem
    return folder


@contextlib.contextmanager
def whole(path: Path):
    """A temporary name to write to, renamed to `path` when the block ends without an error."""
    # Renaming is atomic: whoever reads the file finds the old one or the new one, whole.
    part = Path(f"{path}.part")
    yield part
    part.replace(path)


def write_json(path: Path, content) -> None:
    with whole(path) as part:
        words = json.dumps(content, indent=1, allow_nan=False)
        part.write_text(words + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> None:
    """A safetensors file, whole or not at all, with the metadata in its header."""
    # The format knows nothing of strides, channels_last included.
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with whole(path) as part:
        part.touch()
        mode = part.stat().st_mode
        save_file(tensors, part, metadata or None)
        # safetensors shuts out everyone but the owner, whatever the umask.
        part.chmod(mode)


# ------------------------------------------------------------------------------------------ files
#
# Nothing is ever unpickled: what is not safetensors or JSON is refused.


def read_json(path: Path) -> dict:
    """A JSON file's content; ValueError in one line if it is missing or broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no names and values")
        return content
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: the folder is not whole") from None
    except (OSError, ValueError) as problem:
        raise ValueError(f"{path} cannot be read: {problem}") from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file's tensors, memory-mapped, and its metadata; ValueError if broken."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as problem:
        reason = "missing" if not Path(path).exists() else f"no whole safetensors file: {problem}"
        raise ValueError(f"{path} is {reason}") from None
