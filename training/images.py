"""Images with captions, streamed from loose files and tar shards; a stopped run sees them go on."""

import io
import json
import os
import random
import re
import signal
import sys
import tarfile
import threading
import zlib
from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info
from tqdm import tqdm

from common import files

BUFFER = 10_000
IMAGES = (".jpg", ".jpeg", ".png", ".webp")
CAPTIONS = (".txt", ".json")


# ---------------------------------------------------------------------------------------- examples
#
# An entry says where an example lies: its name, and (file, offset, size) by kind of file. Thousands
# of them in a buffer cost nothing, and what a resumed run has seen is passed by unread. Nothing bad
# is mended: a caption that is missing is not an empty one.


def members(file: Path, name: str, problems: dict) -> Iterator[tuple]:
    """(path up to the first dot, kind, place) of a tar's images and captions, from its headers."""
    try:
        with tarfile.open(file, "r:") as tar:
            for member in iter(tar.next, None):
                # It would keep them all.
                tar.members.clear()
                key, kind = re.match("((?:.*/)?[^/.]*)(.*)", member.name, re.DOTALL).groups()
                if member.isreg() and kind.lower() in IMAGES + CAPTIONS:
                    yield key, kind.lower(), (file, member.offset_data, member.size)
            # tarfile takes a broken header for the end, which is a block of zeros.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ValueError("breaks off in the middle")
    except (tarfile.TarError, OSError, ValueError, OverflowError) as problem:
        problems[name] = f"no whole, plain tar: {problem}"


def _first(keys, there):
    return next((key for key in keys if key in there), None)


def read(what: str, place: tuple | None) -> bytes:
    if place is None:
        raise ValueError(f"no {what}")
    file, offset, size = place
    with open(file, "rb") as stream:
        stream.seek(offset)
        content = stream.read(size)
    if len(content) < size:
        raise ValueError(f"its {what} is cut off")
    return content


def parse_caption(content: bytes, kind: str) -> str:
    """A .txt's text, or a .json's caption, text or prompt; ValueError if there is no text."""
    text = content.decode("utf-8-sig")
    if kind == ".json":
        fields = json.loads(text)
        keys = ("caption", "text", "prompt")
        text = fields.get(_first(keys, fields)) if isinstance(fields, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError("its caption is empty or no text")
    # JSON can spell halves of characters: encode raises, as a tokenizer would.
    return text.strip().encode().decode()


def parse_image(content: bytes, R: int, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """A random crop (3, R, R) in [-1, 1] of the image with short side R, and its time_ids (6,)."""
    image = Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP"))
    # A camera's MPO is a photo followed by its previews.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise ValueError("it is animated")
    image = ImageOps.exif_transpose(image)
    # Pillow would clip 16 bits to 8, not scale them.
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image, short = image.convert("RGB"), min(image.size)
    width, height = (max(R, round(side * R / short)) for side in image.size)
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width} x {image.height} is too narrow")
    left, top = rng.randint(0, width - R), rng.randint(0, height - R)
    method = Image.Resampling.BOX if short > R else Image.Resampling.BICUBIC
    crop = image.resize((width, height), method).crop((left, top, left + R, top + R))
    pixels = np.moveaxis(np.asarray(crop, np.float32), 2, 0) / 127.5 - 1
    return pixels, np.array([image.height, image.width, top, left, R, R])


# ---------------------------------------------------------------------------------------- streams
#
# Examples are dealt out over slots, as many to a rank as it has workers. A slot's state is its
# epoch and how far it is in the epoch's order, which follows from the seed.


class Stream(IterableDataset):
    """What a Loader runs: batches(slot, slots, epoch, drawn) yields (examples, problems, state)."""

    def __init__(self, path, batch_size: int, seed: int, rank: int, world: int):
        self.path, self.batch_size, self.seed = Path(path).resolve(), batch_size, seed
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[dict]:
        info, workers = get_worker_info(), self.start["workers"]
        # Ctrl-C and the like reach every process; when to stop is for the main one to decide.
        if info:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
            threading.Thread(target=_end_with_parent, daemon=True).start()
        # The DataLoader begins with worker 0, which takes the turn that is next.
        turn = (self.start["turn"] + (info.id if info else 0)) % workers
        slot, slots = self.rank * workers + turn, self.world * workers
        try:
            for examples, problems, state in self.batches(slot, slots, *self.start["states"][turn]):
                batch = default_collate(examples) if examples else {}
                yield {**batch, "problems": problems, "turn": turn, "state": state}
        # Raised in a worker, it would arrive as a page of traceback.
        except (ValueError, OSError) as problem:
            yield {"fatal": " ".join(str(problem).split())}


def _end_with_parent() -> None:
    # By SIGTERM, Python ends what workers are left when it exits, and waits for them.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class Images(Stream):
    """Endless batches: images (b, 3, R, R) in [-1, 1], captions, time_ids (b, 6) and names.

    path: a folder, or one tar. once: a single pass in sorted order; its last batch may be smaller.
    """

    def __init__(self, path, resolution, batch_size, seed, rank=0, world=1, once=False):
        super().__init__(path, batch_size, seed, rank, world)
        self.resolution, self.once, path = resolution, once, self.path
        self.root, files = (path.parent, [path]) if path.is_file() else (path, path.rglob("*"))
        self.names = {str(file.relative_to(self.root)) for file in files}
        self.units = sorted(n for n in self.names if n.lower().endswith((*IMAGES, ".tar")))
        if not self.units:
            missing = "holds neither images nor .tar files" if path.exists() else "does not exist"
            raise ValueError(f"{path} {missing}")

    def entries(self, slot: int, slots: int, epoch: int, problems: dict) -> Iterator[tuple]:
        """The slot's share of an epoch, in its order; bad shards go to problems."""
        units, rng = self.units, random.Random(f"{self.seed}/{epoch}/{slot}")
        if not self.once:
            units = random.Random(f"{self.seed}/{epoch}").sample(units, len(units))
        # Whole shards if there are enough: then nobody walks another's.
        if len(units) >= slots:
            units, slot, slots = units[slot::slots], 0, 1
        found = (entry for unit in units for entry in self.open_unit(unit, problems))
        share = islice(found, slot, None, slots)
        buffer = list(islice(share, 1 if self.once else BUFFER))
        while buffer:
            i = rng.randrange(len(buffer))
            yield buffer[i]
            buffer[i : i + 1] = islice(share, 1)

    def open_unit(self, name: str, problems: dict) -> Iterator[tuple]:
        stem, kind = os.path.splitext(name)
        if kind.lower() != ".tar":
            kinds = (kind, *CAPTIONS, *map(str.upper, CAPTIONS))
            kinds = [k for k in kinds if stem + k in self.names]
            yield name, {k.lower(): (self.root / (stem + k), 0, -1) for k in kinds}
            return
        found = members(self.root / name, name, problems)
        for key, group in groupby(found, lambda member: member[0]):
            yield f"{name}/{key}", {kind: place for _, kind, place in group}

    def example(self, epoch: int, name: str, places: dict) -> dict:
        image, caption = _first(IMAGES, places), _first(CAPTIONS, places)
        text = parse_caption(read("caption", places.get(caption)), caption)
        # Seeded by its name, a crop is the same however the work is split.
        rng = random.Random(f"{self.seed}/{epoch}/{name}")
        pixels, sizes = parse_image(read("image", places.get(image)), self.resolution, rng)
        return {"images": pixels, "captions": text, "time_ids": sizes, "names": name}

    def batches(self, slot: int, slots: int, epoch: int, drawn: int) -> Iterator[tuple]:
        examples, problems, barren = [], {}, 0
        while barren < 3:
            for entry in islice(self.entries(slot, slots, epoch, problems), drawn, None):
                drawn += 1
                try:
                    examples.append(self.example(epoch, *entry))
                    barren = -1
                # A decoder may raise anything over a broken file.
                except Exception as problem:
                    problems[entry[0]] = (str(problem) or repr(problem)).split(" <_io")[0]
                # More problems than are allowed end the run: why wait for a full batch?
                if len(examples) == self.batch_size or len(problems) > self.max_bad:
                    yield examples, dict(problems), [epoch, drawn]
                    examples, _ = [], problems.clear()
            if self.once:
                yield examples, problems, [epoch, drawn]
                return
            epoch, drawn, barren = epoch + 1, 0, barren + 1
        first = next((f"{k}: {v}" for k, v in problems.items()), f"fewer than {slots} examples")
        raise ValueError(f"no usable example in {self.path}; the first problem: {first}")


class Loader(Iterator):
    """A stream's batches. position: JSON-able, where they stand, for another Loader to go on from.

    ValueError if it is another stream's, or if more than max_bad examples and shards are left out.
    """

    def __init__(self, dataset: Stream, workers: int, max_bad=1000, position: dict | None = None):
        turns, of = max(1, workers), {"path": str(dataset.path), "seed": dataset.seed}
        of |= {"rank": dataset.rank, "world": dataset.world, "workers": turns}
        self.position = position or {**of, "turn": 0, "states": [[0, 0]] * turns}
        if differ := files.difference(self.position, of, free=("turn", "states")):
            raise ValueError(
                f"what was read of the data was read with {differ}: go on with the same, or begin "
                "with another --output and --cache"
            )
        self.dataset, self.workers, self.max_bad = dataset, workers, max_bad
        self.batches, self.problems, self.bad = None, {}, 0

    def __next__(self) -> dict:
        if self.batches is None:
            self.dataset.start, self.dataset.max_bad = self.position, self.max_bad
            # A generator of its own: by default it would draw from training's.
            flags = dict(generator=torch.Generator(), pin_memory=torch.cuda.is_available())
            self.batches = iter(DataLoader(self.dataset, None, num_workers=self.workers, **flags))
        batch = {}
        # The last word of a single pass may be of problems only.
        while "names" not in batch:
            batch = next(self.batches)
            if "fatal" in batch:
                raise ValueError(batch["fatal"])
            self._note(batch.pop("problems"))
        turn, states = batch.pop("turn"), [*self.position["states"]]
        states[turn] = batch.pop("state")
        self.position = {**self.position, "turn": (turn + 1) % len(states), "states": states}
        return batch

    def _note(self, problems: dict[str, str]) -> None:
        for name, reason in problems.items():
            if name not in self.problems and len(self.problems) < 5:
                tqdm.write(f"skipped {name}: {reason}", file=sys.stderr)
            self.problems[name] = reason
        self.bad = len(self.problems)
        if self.bad > self.max_bad:
            said = f"{self.bad} bad examples or shards in {self.dataset.path}, more than --max-bad"
            first = ": ".join(next(iter(self.problems.items())))
            raise ValueError(f"{said} allows; the first: {first}")


class Prompts(Iterator):
    """Batches of prompts alone, without end, each prompt once an epoch, as a Loader gives them."""

    bad = 0

    def __init__(self, prompts: list[str], batch_size, seed, rank, world, position=None):
        of = {"prompts": len(prompts), "crc": zlib.crc32("\n".join(prompts).encode())}
        of |= {"seed": seed, "world": world}
        self.position = position or {**of, "drawn": 0}
        if differ := files.difference(self.position, of, free=("drawn",)):
            raise ValueError(
                f"the run read a file of {differ}: go on with the same, or name another --output"
            )
        self.prompts, self.batch_size, self.seed = prompts, batch_size, seed
        self.rank, self.world = rank, world

    def __next__(self) -> dict:
        drawn, rows = self.position["drawn"], []
        for i in range(drawn, drawn + self.batch_size):
            # One endless list for all processes, of which each takes every world-th.
            epoch, place = divmod(i * self.world + self.rank, len(self.prompts))
            rows.append(_order(len(self.prompts), f"{self.seed}/{epoch}")[place])
        self.position = {**self.position, "drawn": drawn + self.batch_size}
        names = [f"prompt {row + 1}" for row in rows]
        return {"captions": [self.prompts[row] for row in rows], "names": names}


@lru_cache(1)
def _order(n: int, seed: str) -> list[int]:
    return random.Random(seed).sample(range(n), n)
