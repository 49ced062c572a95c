"""Latents and encoded prompts kept on disk: training then needs neither VAE nor text encoders."""

import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import files
from common.files import read_json, read_tensors
from training.images import Loader, Stream

SHARD = 256
TENSORS = ("latents", "tokens", "pooled", "time_ids")


# ------------------------------------------------------------------------------------------ cache
#
# A rank's shards appear in order, each whole and with the position in the data behind it: a rank
# that was stopped goes on behind its last one. What makes a cache full is index.json, written last.


def read_shard(path: Path) -> tuple[dict, dict]:
    """A shard's tensors, memory-mapped, and its names, position and settings."""
    tensors, about = read_tensors(path)
    return tensors, {key: json.loads(value) for key, value in about.items()}


def is_full(folder: Path, settings: dict) -> bool:
    """Whether all is there; ValueError if it, or what has been begun, has other settings."""
    index, wanted = Path(folder) / "index.json", json.loads(json.dumps(settings))
    full, begun = index.exists(), sorted(index.parent.glob("rank*-00000.safetensors"))
    # One shard of each rank is enough: whoever went on behind it came by here.
    for about in [read_json(index)] if full else [read_shard(path)[1] for path in begun]:
        if not isinstance(there := about.get("settings"), dict):
            raise ValueError(f"{folder} is no cache of this program; name another --cache")
        if differ := files.difference(there, wanted):
            raise ValueError(f"{folder} was made with {differ}; name another --cache")
    return full


def fill(folder, loader: Loader, encode: Callable, settings: dict, rank, world, barrier) -> None:
    """Write what encode(batch) returns: CPU tensors with a leading axis b, by name.

    loader: of a single pass, not begun. barrier() waits for all ranks. ValueError as in is_full, or
    if no example can be used.
    """
    if is_full(folder, settings):
        return
    folder = files.output_folder(folder)
    done = sorted(folder.glob(f"rank{rank:05}-*.safetensors"))
    if done:
        position = read_shard(done[-1])[1]["position"]
        loader = Loader(loader.dataset, loader.workers, loader.max_bad, position)
    bar = tqdm(desc="encoding", unit="image", disable=rank > 0, dynamic_ncols=True)
    bar.update(sum(len(read_shard(path)[1]["names"]) for path in done))
    for number, (tensors, names) in enumerate(_shards(loader, encode, bar), len(done)):
        about = {"names": names, "position": loader.position, "settings": settings}
        about = {key: json.dumps(value) for key, value in about.items()}
        files.write_tensors(folder / f"rank{rank:05}-{number:05}.safetensors", tensors, **about)
    bar.close()
    barrier()
    shards = sorted(p for r in range(world) for p in folder.glob(f"rank{r:05}-*.safetensors"))
    # Said by all ranks: none would come to the second barrier.
    if not shards:
        raise ValueError(f"no usable example in {loader.dataset.path}: {loader.bad} are bad")
    if rank == 0:
        counts = {path.name: len(read_shard(path)[1]["names"]) for path in shards}
        files.write_json(folder / "index.json", {"settings": settings, "shards": counts})
    barrier()


def _shards(loader: Loader, encode: Callable, bar: tqdm) -> Iterator[tuple[dict, list[str]]]:
    parts, names = [], []
    for batch in chain(loader, [None]):
        if batch is not None:
            parts.append(encode(batch))
            names += batch["names"]
            bar.update(len(batch["names"]))
        # Only between batches is there a position to go on from.
        if names and (batch is None or len(names) >= SHARD):
            yield {key: torch.cat([part[key] for part in parts]) for key in parts[0]}, names
            parts, names = [], []


class Cached(Stream):
    """Endless batches of what encode returned, and names; ValueError if a shard is not whole."""

    def __init__(self, folder, batch_size: int, seed: int, rank: int = 0, world: int = 1):
        super().__init__(folder, batch_size, seed, rank, world)
        self.shards = read_json(self.path / "index.json")["shards"]
        for name, rows in self.shards.items():
            if (there := len(read_tensors(self.path / name)[0]["latents"])) != rows:
                raise ValueError(f"{self.path / name} holds {there} rows, not {rows}")

    def batches(self, slot: int, slots: int, epoch: int, drawn: int) -> Iterator[tuple]:
        # Mapped files stay open; a process may have so many only.
        read, where = lru_cache(1000)(read_shard), [self.path / name for name in self.shards]
        ends, epoch, examples = np.cumsum([*self.shards.values()]), -1, []
        while True:
            # The slots share out one endless order, epoch after epoch: none is ever without.
            now, at = divmod(slot + drawn * slots, int(ends[-1]))
            if now != epoch:
                epoch, order = now, np.random.default_rng((self.seed, now)).permutation(ends[-1])
            shard = np.searchsorted(ends, order[at], side="right")
            row = order[at] - ends[shard]  # from the shard's end, below 0
            tensors, about = read(where[shard])
            columns = {**tensors, "names": about["names"]}
            examples.append({key: column[row] for key, column in columns.items()})
            drawn += 1
            if len(examples) == self.batch_size:
                yield examples, {}, [0, drawn]
                examples = []
