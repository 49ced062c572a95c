"""Images with captions, or prompts alone, as batches that a resumed run continues."""

import io
import json
import os
import random
import re
import sys
import tarfile
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain, count, groupby, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import default_collate
from tqdm import tqdm

from common.files import first_difference, read_lines

SHUFFLE_BUFFER = 10_000
IMAGES = (".jpg", ".jpeg", ".png", ".webp")
CAPTIONS = (".txt", ".json")
MAX_EMPTY_EPOCHS = 3
PREFETCHED_BATCHES = 2


# ----------------------------------------------------------------------------------------- examples
#
# A part of an example (its image, its caption) is located by (file, offset, size). Thousands of
# locations fit into a shuffle buffer, and a resumed run passes over them without reading anything.
# Nothing bad is repaired: a missing caption is an error of that example, not an empty caption.


def tar_members(file: Path, name: str, problems: dict) -> Iterator[tuple]:
    """(path up to the first dot, suffix, location) of a tar's images and captions.

    Only headers are read. A broken tar yields what precedes the damage and goes to problems[name].
    """
    try:
        with tarfile.open(file, "r:") as tar:
            for member in iter(tar.next, None):
                # TarFile would keep every header in memory.
                tar.members.clear()
                key, suffix = re.match("((?:.*/)?[^/.]*)(.*)", member.name, re.DOTALL).groups()
                if member.isreg() and suffix.lower() in IMAGES + CAPTIONS:
                    yield key, suffix.lower(), (file, member.offset_data, member.size)
            # tarfile takes a broken header for the end; the true end is a block of zeros.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ValueError("breaks off in the middle")
    except (tarfile.TarError, OSError, ValueError, OverflowError) as problem:
        problems[name] = f"no complete, uncompressed tar: {problem}"


def _first(keys, names) -> str | None:
    return next((key for key in keys if key in names), None)


def read_part(kind: str, location: tuple | None) -> bytes:
    """An image's or a caption's bytes; ValueError if they are missing or cut off."""
    if location is None:
        raise ValueError(f"no {kind}")
    file, offset, size = location
    with open(file, "rb") as stream:
        stream.seek(offset)
        content = stream.read(size)
    if len(content) < size:
        raise ValueError(f"its {kind} is cut off")
    return content


def parse_caption(content: bytes, suffix: str) -> str:
    """A .txt's text, or a .json's caption, text or prompt; ValueError if there is no text."""
    text = content.decode("utf-8-sig")
    if suffix == ".json":
        fields = json.loads(text)
        keys = ("caption", "text", "prompt")
        text = fields.get(_first(keys, fields)) if isinstance(fields, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError("its caption is empty or no text")
    # JSON can spell lone surrogates: encode() raises here, as a tokenizer would later.
    return text.strip().encode().decode()


def parse_image(content: bytes, R: int, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """A random crop (3, R, R) in [-1, 1] of the image with short side R, and its time_ids (6,)."""
    image = Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP"))
    # An MPO, as cameras write it, is a photo followed by its previews, not an animation.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise ValueError("it is animated")
    image = ImageOps.exif_transpose(image)
    # Pillow would clip 16 bits to 8 instead of scaling them.
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image = image.convert("RGB")
    short = min(image.size)
    width, height = (max(R, round(side * R / short)) for side in image.size)
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width} x {image.height} is too narrow")
    left, top = rng.randint(0, width - R), rng.randint(0, height - R)
    method = Image.Resampling.BOX if short > R else Image.Resampling.BICUBIC
    crop = image.resize((width, height), method).crop((left, top, left + R, top + R))
    pixels = np.moveaxis(np.asarray(crop, np.float32), 2, 0) / 127.5 - 1
    return pixels, np.array([image.height, image.width, top, left, R, R])


# ------------------------------------------------------------------------------------------ streams
#
# A stream deals its examples out to the ranks. Its place is an epoch and a number of entries into
# that epoch's order; the order follows from the seed, so the place is all a resumed run needs.


@dataclass(frozen=True)
class Entry:
    """One entry of a stream's order, and the place behind it.

    source: whatever the stream's example() needs; None marks the end of an epoch. problems: shards
    found broken on the way to this entry, with reasons.
    """

    epoch: int
    drawn: int
    source: object = None
    problems: dict[str, str] = field(default_factory=dict)


class BadExample(Exception):
    """(name, reason) of an example that cannot be used: the run leaves it out and goes on."""


class Stream:
    """The share of one rank in a data set; a Loader makes batches of it.

    walk(epoch, drawn) yields one Entry after another from that place on. example(entry) reads one,
    in many threads at once; BadExample skips it, any other error ends the run. identity: all that
    its order depends on, which a resumed run compares.
    """

    def __init__(self, path, batch_size: int, seed: int, rank: int, world: int):
        self.path, self.batch_size = Path(path).resolve(), batch_size
        self.seed, self.rank, self.world = seed, rank, world
        self.identity = {"path": str(self.path), "seed": seed, "rank": rank, "world": world}


class Images(Stream):
    """Examples: images (3, R, R) in [-1, 1], captions, time_ids (6,) and names.

    path: a folder, or one tar. once: a single pass in sorted order, its last batch may be smaller;
    otherwise shuffled epochs without end. ValueError if path holds neither images nor tars.
    """

    def __init__(self, path, resolution, batch_size, seed, rank=0, world=1, once=False):
        super().__init__(path, batch_size, seed, rank, world)
        path, self.resolution, self.once = self.path, resolution, once
        self.root, paths = (path.parent, [path]) if path.is_file() else (path, path.rglob("*"))
        self.names = {str(file.relative_to(self.root)) for file in paths}
        self.files = sorted(n for n in self.names if n.lower().endswith((*IMAGES, ".tar")))
        if not self.files:
            missing = "holds neither images nor .tar files" if path.exists() else "does not exist"
            raise ValueError(f"{path} {missing}")

    def walk(self, epoch: int, drawn: int) -> Iterator[Entry]:
        for each in count(epoch):
            problems = {}
            for source in islice(self.sources(each, problems), drawn, None):
                drawn += 1
                yield Entry(each, drawn, source, dict(problems))
                problems.clear()
            yield Entry(each, drawn, None, problems)
            if self.once:
                return
            drawn = 0

    def sources(self, epoch: int, problems: dict) -> Iterator[tuple[str, dict]]:
        """(name, location by suffix) of this rank's share of an epoch; bad shards go to problems.

        Shuffled by files, then through a buffer, as a shard's examples lie side by side.
        """
        files, offset, stride = self.files, self.rank, self.world
        rng = random.Random(f"{self.seed}/{epoch}/{self.rank}")
        if not self.once:
            files = random.Random(f"{self.seed}/{epoch}").sample(files, len(files))
        # With enough files each rank takes whole ones, so that none reads another's headers.
        if len(files) >= stride:
            files, offset, stride = files[offset::stride], 0, 1
        all_sources = chain.from_iterable(self.open_file(file, problems) for file in files)
        share = islice(all_sources, offset, None, stride)
        buffer = list(islice(share, 1 if self.once else SHUFFLE_BUFFER))
        while buffer:
            i = rng.randrange(len(buffer))
            yield buffer[i]
            buffer[i : i + 1] = islice(share, 1)

    def open_file(self, name: str, problems: dict) -> Iterator[tuple[str, dict]]:
        """The sources in a tar, or the one of a loose image with the caption beside it."""
        stem, suffix = os.path.splitext(name)
        if suffix.lower() == ".tar":
            members = tar_members(self.root / name, name, problems)
            for key, group in groupby(members, lambda member: member[0]):
                yield f"{name}/{key}", {kind: location for _, kind, location in group}
            return
        locations = {}
        for kind in (suffix, *CAPTIONS, *map(str.upper, CAPTIONS)):
            if stem + kind in self.names:
                locations[kind.lower()] = (self.root / (stem + kind), 0, -1)
        yield name, locations

    def example(self, entry: Entry) -> dict:
        name, locations = entry.source
        try:
            image, caption = _first(IMAGES, locations), _first(CAPTIONS, locations)
            text = parse_caption(read_part("caption", locations.get(caption)), caption)
            # Seeded by its name: a crop is the same however the examples are split over ranks.
            rng = random.Random(f"{self.seed}/{entry.epoch}/{name}")
            content = read_part("image", locations.get(image))
            pixels, time_ids = parse_image(content, self.resolution, rng)
            return {"images": pixels, "captions": text, "time_ids": time_ids, "names": name}
        # A decoder may raise anything over a broken file.
        except Exception as problem:
            # Without the address of a file object in memory.
            raise BadExample(name, (str(problem) or repr(problem)).split(" <_io")[0]) from None


class ListStream(Stream):
    """A list's rows 0 .. self.rows - 1, in shuffled epochs without end; order(epoch) shuffles."""

    def walk(self, epoch: int, drawn: int) -> Iterator[Entry]:
        # The ranks share out one endless list of epochs, so each has examples even where there
        # are more ranks than rows. `drawn` counts through all of it, as if it were one epoch.
        order = lru_cache(1)(self.order)
        for i in count(drawn):
            list_epoch, place = divmod(self.rank + i * self.world, self.rows)
            yield Entry(epoch, i + 1, order(list_epoch)[place])


class Prompts(ListStream):
    """Examples: captions and names, of a file with a prompt a line; ValueError if it has none."""

    def __init__(self, path, batch_size: int, seed: int, rank: int = 0, world: int = 1):
        super().__init__(path, batch_size, seed, rank, world)
        self.prompts = read_lines("--data", self.path)
        self.rows = len(self.prompts)
        # The file may have changed under its name.
        self.identity["crc"] = zlib.crc32("\n".join(self.prompts).encode())

    def order(self, epoch: int) -> list[int]:
        return random.Random(f"{self.seed}/{epoch}").sample(range(self.rows), self.rows)

    def example(self, entry: Entry) -> dict:
        return {"captions": self.prompts[entry.source], "names": f"prompt {entry.source + 1}"}


# ------------------------------------------------------------------------------------------ loaders
#
# Threads decode: pillow and numpy release the interpreter's lock, so two threads decode as fast as
# two processes do. Another thread walks the stream, collates and pins batches ahead of training.


class Loader(Iterator):
    """A stream's batches in the stream's order, whatever the number of decoding threads.

    position: JSON-able, from where another Loader goes on behind the last batch. bad: distinct
    examples and shards left out so far. ValueError if position is of another stream, or where more
    than max_bad are left out.
    """

    def __init__(self, dataset: Stream, workers: int, max_bad=1000, position: dict | None = None):
        self.position = position or {**dataset.identity, "epoch": 0, "drawn": 0}
        place = ("epoch", "drawn")
        if differ := first_difference(self.position, dataset.identity, may_change=place):
            advice = "go on with the same, or begin with another --output and --cache"
            raise ValueError(f"the run so far read its data with {differ}: {advice}")
        self.dataset, self.workers, self.max_bad = dataset, workers, max_bad
        self.bad, self.problems = 0, {}
        self.batches = self._batches(dataset.walk(self.position["epoch"], self.position["drawn"]))
        self.prefetched = deque()
        use_gpu = None
        if torch.cuda.is_available():
            # A new thread begins on GPU 0, where pinning would open a second context.
            use_gpu = partial(torch.cuda.set_device, torch.cuda.current_device())
        # One thread, because a generator can be advanced by one at a time only.
        self.collator = ThreadPoolExecutor(1, initializer=use_gpu)
        self.decoders = ThreadPoolExecutor(workers)

    def __next__(self) -> dict:
        batch = {}
        # A single pass may end with bad examples alone.
        while "names" not in batch:
            while len(self.prefetched) <= PREFETCHED_BATCHES:
                self.prefetched.append(self.collator.submit(next, self.batches))
            batch = self.prefetched.popleft().result()
            self.bad = batch.pop("bad")
            self.position = {**self.position, **batch.pop("place")}
        return batch

    def _batches(self, entries: Iterator[Entry]) -> Iterator[dict]:
        """Collated examples, with "bad" and "place" as they are behind the last of them."""
        examples, empty_epochs = [], 0
        for entry, example in self._decoded(entries):
            for name, reason in entry.problems.items():
                self._leave_out(name, reason)
            try:
                if example is None:
                    empty_epochs += 1
                else:
                    examples.append(example.result())
                    empty_epochs = -1  # 0 at the end of this epoch
            except BadExample as problem:
                self._leave_out(*problem.args)
            if empty_epochs == MAX_EMPTY_EPOCHS:
                first = self._first_problem() or f"fewer than {self.dataset.world} examples"
                path = self.dataset.path
                raise ValueError(f"no usable example in {path}; the first problem: {first}")
            if len(examples) == self.dataset.batch_size:
                yield self._collate(examples, entry)
                examples = []
        yield self._collate(examples, entry)

    def _decoded(self, entries: Iterator[Entry]) -> Iterator[tuple[Entry, Future | None]]:
        """Each entry with its example to come, or with None at the end of an epoch."""
        pending = deque()
        while True:
            for entry in islice(entries, 2 * self.workers - len(pending)):
                is_end = entry.source is None
                example = None if is_end else self.decoders.submit(self.dataset.example, entry)
                pending.append((entry, example))
            if not pending:
                return
            yield pending.popleft()

    def _collate(self, examples: list[dict], entry: Entry) -> dict:
        batch = default_collate(examples) if examples else {}
        # Copies to a GPU overlap with its work only from pinned memory.
        if torch.cuda.is_available():
            for key, value in batch.items():
                batch[key] = value.pin_memory() if isinstance(value, Tensor) else value
        place = {"epoch": entry.epoch, "drawn": entry.drawn}
        return {**batch, "bad": len(self.problems), "place": place}

    def _leave_out(self, name: str, reason: str) -> None:
        if name not in self.problems and len(self.problems) < 5:
            tqdm.write(f"skipped {name}: {reason}", file=sys.stderr)
        self.problems[name] = reason
        if len(self.problems) > self.max_bad:
            bad = f"{len(self.problems)} bad examples or shards in {self.dataset.path}"
            first = self._first_problem()
            raise ValueError(f"{bad}, more than --max-bad allows; the first: {first}")

    def _first_problem(self) -> str:
        return next((f"{name}: {reason}" for name, reason in self.problems.items()), "")
