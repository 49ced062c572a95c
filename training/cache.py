"""A cache of latents and encoded prompts: training then needs neither VAE nor text encoders."""

import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import files
from training.images import Entry, ListStream, Loader

ROWS_PER_SHARD = 256
TENSORS = ("latents", "prompt_embeds", "pooled", "time_ids")
# Version 1 named a tensor otherwise, and its positions were those of several reading processes.
VERSION = {"version": 2}


# --------------------------------------------------------------------------------------- filling it
#
# Each rank writes its shards in order; a shard records the data position that follows it, where a
# stopped rank resumes. index.json is written last, so a cache that has it is complete.


def read_shard(path: Path) -> tuple[dict, dict]:
    """A shard's tensors, memory-mapped, and its metadata: names, position and settings."""
    tensors, metadata = files.read_tensors(path)
    return tensors, {key: json.loads(value) for key, value in metadata.items()}


def is_full(folder: Path, settings: dict) -> bool:
    """Whether the cache is complete; ValueError if it, or what has been begun, does not fit."""
    # As JSON returns them, to which they are compared.
    settings = json.loads(json.dumps(VERSION | settings))
    index = Path(folder) / "index.json"
    full = index.exists()
    if full:
        contents = [files.read_json(index)]
    else:
        # One shard of each rank is enough: a rank checks it before it adds another.
        first_shards = sorted(index.parent.glob("rank*-00000.safetensors"))
        contents = [read_shard(path)[1] for path in first_shards]
    for content in contents:
        recorded = content.get("settings")
        if not isinstance(recorded, dict):
            raise ValueError(f"{folder} is no cache of this program; name another --cache")
        # Version 1 was not recorded.
        if differ := files.first_difference({"version": 1, **recorded}, settings):
            raise ValueError(f"{folder} was made with {differ}; name another --cache")
    return full


def fill(folder, loader: Loader, encode: Callable, settings: dict, rank, world, barrier) -> None:
    """Write what encode(batch) returns: CPU tensors with a leading axis b, by name.

    loader: of a single pass, not begun. barrier() waits for all ranks. ValueError as in is_full, or
    if no example can be used.
    """
    if is_full(folder, settings):
        return
    settings = VERSION | settings
    folder = files.output_folder(folder)
    done = sorted(folder.glob(f"rank{rank:05}-*.safetensors"))
    if done:
        position = read_shard(done[-1])[1]["position"]
        loader = Loader(loader.dataset, loader.workers, loader.max_bad, position)
    bar = tqdm(desc="encoding", unit="image", disable=rank > 0, dynamic_ncols=True)
    bar.update(sum(map(_rows, done)))
    for number, (tensors, names) in enumerate(_shards(loader, encode, bar), len(done)):
        metadata = {"names": names, "position": loader.position, "settings": settings}
        metadata = {key: json.dumps(value) for key, value in metadata.items()}
        files.write_tensors(folder / f"rank{rank:05}-{number:05}.safetensors", tensors, **metadata)
    bar.close()
    barrier()
    shards = []
    for r in range(world):
        shards += sorted(folder.glob(f"rank{r:05}-*.safetensors"))
    # Every rank raises: none of them would come to the second barrier.
    if not shards:
        raise ValueError(f"no usable example in {loader.dataset.path}: {loader.bad} are bad")
    if rank == 0:
        rows = {path.name: _rows(path) for path in shards}
        files.write_json(folder / "index.json", {"settings": settings, "shards": rows})
    barrier()


def _rows(path: Path) -> int:
    return len(read_shard(path)[1]["names"])


def _shards(loader: Loader, encode: Callable, bar: tqdm) -> Iterator[tuple[dict, list[str]]]:
    parts, names = [], []
    for batch in chain(loader, [None]):
        if batch is not None:
            parts.append(encode(batch))
            names += batch["names"]
            bar.update(len(batch["names"]))
        # A shard ends where a batch ends, as only there is a position to go on from.
        if names and (batch is None or len(names) >= ROWS_PER_SHARD):
            yield {key: torch.cat([part[key] for part in parts]) for key in parts[0]}, names
            parts, names = [], []


# --------------------------------------------------------------------------------------- reading it


class Cached(ListStream):
    """Examples: what encode returned, and names; ValueError if a shard is missing or incomplete."""

    def __init__(self, folder, batch_size: int, seed: int, rank: int = 0, world: int = 1):
        super().__init__(folder, batch_size, seed, rank, world)
        shards = files.read_json(self.path / "index.json")["shards"]
        self.shards = [self.path / name for name in shards]
        self.ends = np.cumsum(list(shards.values()))
        self.rows = int(self.ends[-1])
        # Mapped files stay open, and a process may have so many only.
        self.read_shard = lru_cache(1000)(read_shard)
        for path, rows in zip(self.shards, shards.values(), strict=True):
            if (present := len(files.read_tensors(path)[0]["latents"])) != rows:
                raise ValueError(f"{path} holds {present} rows, not {rows}")

    def order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.rows)

    def example(self, entry: Entry) -> dict:
        shard = np.searchsorted(self.ends, entry.source, side="right")
        row = entry.source - self.ends[shard]  # from the shard's end, below 0
        tensors, metadata = self.read_shard(self.shards[shard])
        example = {key: column[row] for key, column in tensors.items()}
        return {**example, "names": metadata["names"][row]}
