"""Files that appear only when they are complete, and readers that fail in one clear line.

Nothing is ever unpickled: only safetensors, JSON and text are read.
"""

import contextlib
import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

# ---------------------------------------------------------------------------------------- reading


def read_lines(flag: str, path: Path) -> list[str]:
    """The lines of the file of a flag that are not blank; ValueError if there are none."""
    try:
        # Lines end with a line feed: splitlines() would cut captions at a dozen other characters.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as problem:
        raise ValueError(f"{flag} {path} cannot be read: {problem}") from None
    lines = [line.rstrip("\r") for line in lines if line.strip()]
    if not lines:
        raise ValueError(f"{flag} {path} holds no prompt")
    return lines


def read_json(path: Path) -> dict:
    """A JSON file's object; ValueError in one line if it is missing or broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no names and values")
        return content
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: the folder is incomplete") from None
    except (OSError, ValueError) as problem:
        raise ValueError(f"{path} cannot be read: {problem}") from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file's tensors, memory-mapped, and its metadata; ValueError if broken."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as problem:
        if not Path(path).exists():
            raise ValueError(f"{path} is missing") from None
        raise ValueError(f"{path} is no whole safetensors file: {problem}") from None


def first_difference(recorded: dict, requested: dict, may_change=()) -> str:
    """The first setting that differs, as "NAME RECORDED, not REQUESTED"; "" if none does."""
    for name in {**requested, **recorded}:
        if name not in may_change and recorded.get(name) != requested.get(name):
            return f"{name.replace('_', '-')} {recorded.get(name)}, not {requested.get(name)}"
    return ""


# ---------------------------------------------------------------------------------------- writing
#
# A file is written under another name and renamed, which is atomic: whoever reads it finds the old
# content or the new, never a part.


def output_folder(folder: Path) -> Path:
    """The folder, created if need be; ValueError at once if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Permissions do not show everything (read-only mounts, full disks): try it.
        probe = folder / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as problem:
        reason = problem.strerror
        raise ValueError(f"cannot write to {folder}: {reason}; name another folder") from problem
    return folder


@contextlib.contextmanager
def atomic_write(path: Path):
    """A temporary name to write to, renamed to `path` when the block ends without an error."""
    part = Path(f"{path}.part")
    yield part
    part.replace(path)


def write_json(path: Path, content) -> None:
    """Content as indented JSON; ValueError for NaN and infinity, which JSON does not have."""
    with atomic_write(path) as part:
        part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    """A safetensors file; metadata: the entries of its header."""
    # The format knows no strides, so channels_last tensors are copied.
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as part:
        part.touch()
        mode = part.stat().st_mode
        save_file(tensors, part, metadata or None)
        # safetensors makes the file readable by its owner alone, whatever the umask.
        part.chmod(mode)
