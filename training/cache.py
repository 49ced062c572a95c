"""A cache of latents and encoded prompts: training then needs neither VAE nor text encoders."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import files
from training.listing import NOT_FINITE, LeftOut
from training.streams import Entry, ListStream, Loader

ROWS_PER_SHARD = 256
TENSORS = ("latents", "prompt_embeds", "pooled", "time_ids")
DTYPES = {torch.float32, torch.float16, torch.bfloat16, torch.int64}
# Version 1 named a tensor otherwise, and its positions were those of several reading processes.
# Version 2 knew data and model by their paths, and left transparency and colour profiles away.
VERSION = {"version": 3}


# --------------------------------------------------------------------------------------- filling it
#
# Each rank writes its shards in order; a shard records the data position that follows it, where a
# stopped rank resumes. At its end a rank writes what it left out. index.json is written last, so a
# cache that has it is complete.


def read_shard(path: Path) -> tuple[dict, dict]:
    """A shard's tensors, memory-mapped, and its metadata: names, position and settings."""
    tensors, metadata = files.read_tensors(path)
    try:
        metadata = {key: json.loads(value) for key, value in metadata.items()}
        if {tensor.shape[:1] for tensor in tensors.values()} != {(len(metadata["names"]),)}:
            raise ValueError("its tensors and names differ in number")
        if odd := {tensor.dtype for tensor in tensors.values()} - DTYPES:
            raise ValueError(f"it holds {min(map(str, odd))}")
        if not all(isinstance(name, str) for name in metadata["names"]):
            raise ValueError("its names are no texts")
    except (ValueError, KeyError, TypeError, RecursionError) as problem:
        message = f"{path} is no shard of a cache: {problem}"
        raise ValueError(f"{message}; name another --cache") from None
    return tensors, metadata


def read_index(folder: Path) -> dict:
    """A complete cache's settings, rows by shard, a row's shapes, and how many were left out."""
    path = Path(folder) / "index.json"
    index = files.read_json(path)
    try:
        numbers = [*index["shards"].values(), *index["left_out"].values()]
        is_index = index["shards"] and all(type(n) is int and n > 0 for n in numbers)
    except (KeyError, AttributeError):
        is_index = False
    if not is_index or "shapes" not in index:
        raise ValueError(f"{path} is no index of a cache; name another --cache")
    return index


def is_full(folder: Path, settings: dict, may_change=()) -> bool:
    """Whether the cache is complete; ValueError if it, or what has been begun, does not fit.

    may_change: settings that are not compared.
    """
    # As JSON returns them, to which they are compared.
    settings = json.loads(json.dumps(VERSION | settings))
    index = Path(folder) / "index.json"
    complete = index.exists()
    # One shard of each rank is enough: a rank checks it before it adds another.
    begun = [] if complete else sorted(index.parent.glob("rank*-00000.safetensors"))
    contents = [files.read_json(index)] if complete else [read_shard(path)[1] for path in begun]
    for content in contents:
        recorded = content.get("settings")
        if not isinstance(recorded, dict):
            raise ValueError(f"{folder} is no cache of this program; name another --cache")
        # Version 1 was not recorded.
        if differ := files.first_difference({"version": 1, **recorded}, settings, may_change):
            raise ValueError(f"{folder} was made with {differ}; name another --cache")
    return complete


def fill(folder, loader: Loader, encode: Callable, settings: dict, rank, world, barrier) -> None:
    """Write what encode(batch) returns: CPU tensors with a leading axis b, by name.

    loader: of a single pass, not begun. barrier() waits for all ranks. ValueError as in is_full, if
    another run fills the folder too, if no example can be used, or if too many give tensors that
    are not finite, which are left out.
    """
    if is_full(folder, settings):
        return
    settings = VERSION | settings
    folder = files.output_folder(folder)
    done = sorted(folder.glob(f"rank{rank:05}-*.safetensors"))
    if done:
        position = read_shard(done[-1])[1].get("position", {})
        loader = Loader(loader.dataset, loader.workers, loader.max_bad, position, loader.tail)
    not_finite = LeftOut()
    shards = _encoded_shards(loader, encode, sum(map(_rows, done)), not_finite)
    for number, (tensors, names) in enumerate(shards, len(done)):
        position = {**loader.position, "left_out": loader.left_out + not_finite.counts}
        metadata = {"names": names, "position": position, "settings": settings}
        metadata = {key: json.dumps(value) for key, value in metadata.items()}
        path = folder / f"rank{rank:05}-{number:05}.safetensors"
        # It was not there when this run began. Behind it lie other examples than this run's next,
        # as a shard's length depends on the batch size.
        if path.exists():
            reason = "this one stops; start it again when the other has ended"
            raise ValueError(f"another run is filling {folder}: {reason}")
        files.write_tensors(path, tensors, **metadata)
    files.write_json(folder / f"rank{rank:05}.json", loader.left_out + not_finite.counts)
    barrier()
    paths = []
    for r in range(world):
        paths += sorted(folder.glob(f"rank{r:05}-*.safetensors"))
    # Rank 0 writes the index; every rank raises, as none would come to the second barrier.
    if rank == 0 or not paths:
        left_out = Counter()
        for r in range(world):
            left_out.update(files.read_json(folder / f"rank{r:05}.json"))
        if not paths:
            left_out = LeftOut(left_out)
            raise ValueError(f"no usable example in {loader.dataset.path}; left out: {left_out}")
        index = {"settings": settings, "shards": {path.name: _rows(path) for path in paths},
                 "shapes": _row_shapes(read_shard(paths[0])[0]), "left_out": left_out}  # fmt: skip
        files.write_json(folder / "index.json", index)
    barrier()


def _row_shapes(tensors: dict) -> dict[str, list[int]]:
    return {name: list(tensor.shape[1:]) for name, tensor in tensors.items()}


def _rows(path: Path) -> int:
    return len(read_shard(path)[1]["names"])


def _encoded_shards(
    loader: Loader, encode: Callable, done: int, not_finite: LeftOut
) -> Iterator[tuple[dict, list[str]]]:
    """(tensors, names) of the shards that are still to be written, after `done` rows."""
    parts, names = [], []
    bar = tqdm(desc="encoding", unit="image", initial=done, disable=loader.dataset.rank > 0)
    with bar:
        for batch in chain(loader, [None]):
            if batch is not None:
                tensors, usable = _finite(encode(batch), batch["names"], loader, not_finite)
                parts.append(tensors)
                names += usable
                bar.update(len(batch["names"]))
            # A shard ends where a batch ends, as only there is a position to go on from.
            if names and (batch is None or len(names) >= ROWS_PER_SHARD):
                yield {key: torch.cat([part[key] for part in parts]) for key in parts[0]}, names
                parts, names = [], []


def _finite(
    tensors: dict, names: list[str], loader: Loader, not_finite: LeftOut
) -> tuple[dict, list[str]]:
    """The rows without NaN and infinity, and their names; the others are counted."""
    finite = torch.ones(len(names), dtype=torch.bool)
    for tensor in tensors.values():
        finite &= tensor.flatten(1).isfinite().all(1)
    usable = []
    for name, is_finite in zip(names, finite, strict=True):
        if is_finite:
            usable.append(name)
        elif not_finite.add(NOT_FINITE, name):
            tqdm.write(f"skipped {name}: its latents are not finite", file=sys.stderr)
    if loader.bad + not_finite.counts[NOT_FINITE] > loader.max_bad:
        raise ValueError(f"{not_finite}, with other broken examples more than --max-bad allows")
    return {key: tensor[finite] for key, tensor in tensors.items()}, usable


# --------------------------------------------------------------------------------------- reading it


class Cached(ListStream):
    """Examples: what encode returned, and names.

    ValueError if a shard is missing or incomplete, or holds a number that is not finite.
    """

    def __init__(self, folder, batch_size: int, seed: int, rank: int = 0, world: int = 1):
        super().__init__(folder, batch_size, seed, rank, world)
        index = read_index(self.path)
        shards, self.left_out = index["shards"], index["left_out"]
        self.identity["cache"] = files.fingerprint(self.path / "index.json")
        self.shards = [self.path / name for name in shards]
        self.ends = np.cumsum(list(shards.values()))
        self.rows = int(self.ends[-1])
        # Mapped files stay open, and a process may have so many only.
        self.read_shard = lru_cache(1000)(read_shard)
        for path, rows in zip(self.shards, shards.values(), strict=True):
            tensors, _ = files.read_tensors(path)
            if (shapes := _row_shapes(tensors)) != index["shapes"] or not {*TENSORS} <= {*shapes}:
                raise ValueError(f"{path} is no shard of this cache: its rows are {shapes}")
            if (present := len(tensors["latents"])) != rows:
                raise ValueError(f"{path} holds {present} rows, not {rows}")
        without = f"; left out: {LeftOut(self.left_out)}" if self.left_out else ""
        self.lines = [f"{self.path}: {self.rows} encoded images{without}"]

    def order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.rows)

    def example(self, entry: Entry) -> dict:
        shard = np.searchsorted(self.ends, entry.source, side="right")
        row = entry.source - self.ends[shard]  # from the shard's end, below 0
        tensors, metadata = self.read_shard(self.shards[shard])
        example = {key: column[row] for key, column in tensors.items()}
        name = metadata["names"][row]
        for key, tensor in example.items():
            if not tensor.isfinite().all():
                damage = f"is damaged: {key} of {name} is not finite"
                raise ValueError(f"{self.shards[shard]} {damage}; fill another --cache")
        return {**example, "names": name}
