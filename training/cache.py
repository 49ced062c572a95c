"""A cache of latents and encoded prompts: training then needs neither VAE nor text encoders."""

import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import chain, count
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import files
from common.files import read_json, read_tensors
from training.images import Entry, Loader, Stream

ROWS_PER_SHARD = 256
TENSORS = ("latents", "prompt_embeds", "pooled", "time_ids")
# Version 1 named a tensor otherwise, and its positions were those of several reading processes.
VERSION = 2


# --------------------------------------------------------------------------------------- filling it
#
# Each rank writes its shards in order, each complete and with the position in the data behind it;
# a rank that was stopped goes on behind its last shard. index.json is written last, so a cache
# that has it is complete.


def read_shard(path: Path) -> tuple[dict, dict]:
    """A shard's tensors, memory-mapped, and its metadata: names, position and settings."""
    tensors, metadata = read_tensors(path)
    return tensors, {key: json.loads(value) for key, value in metadata.items()}


def is_full(folder: Path, settings: dict) -> bool:
    """Whether the cache is complete; ValueError if it, or what has been begun, does not fit."""
    index = Path(folder) / "index.json"
    full = index.exists()
    if full:
        contents = [read_json(index)]
    else:
        # One shard of each rank is enough: a rank checks it before it adds another.
        begun = sorted(index.parent.glob("rank*-00000.safetensors"))
        contents = [read_shard(path)[1] for path in begun]
    for content in contents:
        recorded = content.get("settings")
        if not isinstance(recorded, dict):
            raise ValueError(f"{folder} is no cache of this program; name another --cache")
        if recorded.get("version") != VERSION:
            raise ValueError(
                f"{folder} is a cache of version {recorded.get('version', 1)}, not {VERSION}; "
                "name another --cache to encode the data anew"
            )
        if differ := files.first_difference(recorded, _with_version(settings)):
            raise ValueError(f"{folder} was made with {differ}; name another --cache")
    return full


def _with_version(settings: dict) -> dict:
    # As JSON returns them, to which they are compared.
    return json.loads(json.dumps({"version": VERSION, **settings}))


def fill(folder, loader: Loader, encode: Callable, settings: dict, rank, world, barrier) -> None:
    """Write what encode(batch) returns: CPU tensors with a leading axis b, by name.

    loader: of a single pass, not begun. barrier() waits for all ranks. ValueError as in is_full, or
    if no example can be used.
    """
    if is_full(folder, settings):
        return
    settings = _with_version(settings)
    folder = files.output_folder(folder)
    done = sorted(folder.glob(f"rank{rank:05}-*.safetensors"))
    if done:
        position = read_shard(done[-1])[1]["position"]
        loader = Loader(loader.dataset, loader.workers, loader.max_bad, position)
    bar = tqdm(desc="encoding", unit="image", disable=rank > 0, dynamic_ncols=True)
    bar.update(sum(map(_rows, done)))
    for number, (tensors, names) in enumerate(_shards(loader, encode, bar), len(done)):
        metadata = {"names": names, "position": loader.position, "settings": settings}
        for key, value in metadata.items():
            metadata[key] = json.dumps(value)
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


class Cached(Stream):
    """Examples: what encode returned, and names, in shuffled epochs without end.

    ValueError if a shard is missing or incomplete.
    """

    def __init__(self, folder, batch_size: int, seed: int, rank: int = 0, world: int = 1):
        super().__init__(folder, batch_size, seed, rank, world)
        shards = read_json(self.path / "index.json")["shards"]
        self.shards = [self.path / name for name in shards]
        self.ends = np.cumsum(list(shards.values()))
        # Mapped files stay open, and a process may have so many only.
        self.read_shard = lru_cache(1000)(read_shard)
        for path, rows in zip(self.shards, shards.values(), strict=True):
            if (present := len(read_tensors(path)[0]["latents"])) != rows:
                raise ValueError(f"{path} holds {present} rows, not {rows}")

    def walk(self, epoch: int, drawn: int) -> Iterator[Entry]:
        # The ranks share out one endless list of epochs, so each has examples even where there
        # are more ranks than rows. `drawn` counts through all of it, as if it were one epoch.
        shuffled = -1
        for i in count(drawn):
            list_epoch, place = divmod(self.rank + i * self.world, int(self.ends[-1]))
            if list_epoch != shuffled:
                shuffled = list_epoch
                rng = np.random.default_rng((self.seed, list_epoch))
                order = rng.permutation(self.ends[-1])
            yield Entry(epoch, i + 1, order[place])

    def example(self, entry: Entry) -> dict:
        shard = np.searchsorted(self.ends, entry.source, side="right")
        row = entry.source - self.ends[shard]  # from the shard's end, below 0
        tensors, metadata = self.read_shard(self.shards[shard])
        example = {key: column[row] for key, column in tensors.items()}
        return {**example, "names": metadata["names"][row]}
