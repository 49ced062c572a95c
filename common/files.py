"""Files that appear only when they are complete, and readers that fail in one clear line.

Nothing is ever unpickled: only safetensors, JSON and text are read.
"""

import contextlib
import hashlib
import json
import re
import sys
import uuid
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

# ---------------------------------------------------------------------------------------- reading


def read_lines(flag: str, path: Path) -> list[str]:
    """The lines of the file of a flag that are not blank; ValueError if there are none.

    Prompts are numbered without blank lines, so a line on stderr says how many shift the numbers.
    """
    try:
        # Read as text, all line ends are line feeds; splitlines() would cut at a dozen others too.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as problem:
        raise ValueError(f"{flag} {path} cannot be read: {problem}") from None
    numbers = [i for i, line in enumerate(lines, 1) if line.strip()]
    if not numbers:
        raise ValueError(f"{flag} {path} holds no prompt")
    if count := numbers[-1] - len(numbers):
        first = next(i for i, number in enumerate(numbers, 1) if i < number)
        _print_once(f"{path}: {count} blank lines passed over (first: line {first})")
    return [lines[i - 1] for i in numbers]


@cache
def _print_once(line: str) -> None:
    # Training reads a file of prompts when it checks the flags, and again for its data.
    print(line, file=sys.stderr)


def read_json(path: Path) -> dict:
    """A JSON file's object; ValueError in one line if it is missing or broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no names and values")
        return content
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: the folder is incomplete") from None
    # Nested a hundred thousand deep, a file is a RecursionError.
    except (OSError, ValueError, RecursionError) as problem:
        reason = (path.is_file() and _other_format(path)) or f"cannot be read: {problem}"
        raise ValueError(f"{path} {reason}") from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file's tensors, memory-mapped, and its metadata; ValueError if broken."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as problem:
        if not Path(path).is_file():
            reason = "is a folder: name a file" if Path(path).is_dir() else "is missing"
            raise ValueError(f"{path} {reason}") from None
        reason = _other_format(path) or f"is no whole safetensors file: {problem}"
        raise ValueError(f"{path} {reason}") from None


def check_finite(path: Path, tensors: dict[str, Tensor], reason="it is a broken file") -> None:
    """ValueError that names a file's first tensor with NaN or infinity in it, or of 4 bits."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
            # Both are NaN if any number is; a gigabyte takes a twentieth of a second. Eight bits
            # have no minimum in torch.
            try:
                low, high = (tensor if tensor.itemsize > 1 else tensor.half()).aminmax()
            except NotImplementedError:
                kind = f"is of {tensor.dtype}, which cannot be computed with"
                raise ValueError(f"{path}: its tensor {name} {kind}") from None
            if not (low.isfinite() and high.isfinite()):
                raise ValueError(f"{path}: its tensor {name} holds NaN or infinity: {reason}")


def _other_format(path: Path) -> str:
    """What a file is that is often met in the place of weights; "" for anything else."""
    with open(path, "rb") as file:
        start = file.read(512)
    # Where a safetensors file's header begins.
    if start[8:9] == b"{":
        return ""
    kinds = {
        b"version https://git-lfs": "is a git-LFS pointer, not the file: run git lfs pull",
        b"<": "is a web page, not the file: download it again, logged in if need be",
        b"PK": "is a pickle (.ckpt, .pt, .bin), which is never read: convert it to .safetensors",
        b"\x80": "is a pickle (.ckpt, .pt, .bin), which is never read: convert it to .safetensors",
        b"GGUF": "is a GGUF file: quantised models are not read",
    }
    return next((kind for mark, kind in kinds.items() if start.lstrip().startswith(mark)), "")


# --------------------------------------------------------------------------------------- contents
#
# What is used again is known by its content: a path may lead to something else tomorrow, and the
# same may lie elsewhere.

SMALL = 2**20  # bytes; a file up to here is read whole
LONGEST_HEADER = 100_000_000  # bytes, safetensors' own limit
BLOCKS = 256  # so many, of 4 KiB each, of a larger one


def fingerprint(*paths: Path) -> str:
    """The contents of files in 16 hexadecimal digits, whatever their names.

    Of a large file that is its size and evenly spaced blocks, and of a large safetensors file also
    its header and a few bytes of every tensor: gigabytes take milliseconds.
    """
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{size} ".encode())
        with open(path, "rb") as file:
            for start, length in _sampled_parts(path, size):
                file.seek(start)
                digest.update(file.read(length))
    return digest.hexdigest()[:16]


def _sampled_parts(path: Path, size: int) -> Iterator[tuple[int, int]]:
    """(start, length) of the parts of a file that stand for all of it."""
    if size <= SMALL:
        yield 0, size
        return
    for i in range(BLOCKS):
        yield (size - 4096) * i // (BLOCKS - 1), 4096
    if path.suffix == ".safetensors":
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            # A file of another kind under this name: what it begins with is no length.
            if length > min(LONGEST_HEADER, size - 8):
                return
            header = file.read(length)
        yield 0, 8 + length
        # A fine-tuned layer between two blocks would go unnoticed otherwise.
        for start, end in re.findall(rb'"data_offsets":\s*\[(\d+),\s*(\d+)\]', header):
            yield 8 + length + int(start), 64
            yield 8 + length + (int(start) + int(end)) // 2, 64


def first_difference(recorded: dict, requested: dict, may_change=()) -> str:
    """The first setting that differs, as "NAME RECORDED, not REQUESTED"; "" if none does."""
    for name in {**requested, **recorded}:
        if name not in may_change and recorded.get(name) != requested.get(name):
            # "batch_size" is a flag, "content of text_encoder" is not.
            flag = name if " " in name else name.replace("_", "-")
            return f"{flag} {recorded.get(name)}, not {requested.get(name)}"
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
        # Processes of several machines may have the same number.
        probe = folder / f".write-{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as problem:
        reason = problem.strerror
        raise ValueError(f"cannot write to {folder}: {reason}; name another folder") from problem
    return folder


def check_replaceable(flag: str, path: Path, names: set[str]) -> None:
    """ValueError unless the path is free, or holds tensors of these names, as an earlier run's."""
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a folder; name a file")
    with contextlib.suppress(ValueError):
        if not path.exists() or read_tensors(path)[0].keys() == names:
            return
    raise ValueError(f"{flag} {path} holds something else, which would be lost: name another")


@contextlib.contextmanager
def atomic_write(path: Path):
    """A temporary name to write to, renamed to `path` when the block ends without an error.

    ValueError that names the file if it cannot be written, on a full disk for instance.
    """
    part = Path(f"{path}.part")
    try:
        yield part
        part.replace(path)
    except (OSError, SafetensorError) as problem:
        with contextlib.suppress(OSError):
            part.unlink()
        raise ValueError(f"{path} cannot be written: {problem}") from problem


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
