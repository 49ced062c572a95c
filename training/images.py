"""Images with captions, from loose files and tars: found, read and decoded."""

import io
import json
import os
import random
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain, count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from common.pictures import FORMATS, to_rgb
from training import listing
from training.listing import CAPTIONS, IMAGES, is_litter, list_data, match, printable
from training.streams import BadExample, Entry, Stream

SHUFFLE_BUFFER = 10_000
MAX_BYTES = {"image": 2**29, "caption": 2**20}


# ------------------------------------------------------------------------------------------ sources
#
# A part of an example (its image, a caption) is located by (file, offset, size). Thousands of
# locations fit into a shuffle buffer, and a resumed run passes over them without reading anything.


class Source(NamedTuple):
    """Where an example's parts lie. captions: (suffix, location), the first with text counts."""

    name: str
    image: tuple | None
    captions: list[tuple[str, tuple]]


def tar_members(file: Path, name: str, problems: dict) -> Iterator[tuple[str, str, tuple]]:
    """(stem, suffix, location) of a tar's images and captions; only headers are read.

    A broken tar yields what precedes the damage and goes to problems[name].
    """
    try:
        with tarfile.open(file, "r:") as tar:
            for member in iter(tar.next, None):
                # TarFile would keep every header in memory, and follow a negative size for ever.
                tar.members.clear()
                if tar.offset <= member.offset:
                    raise ValueError(f"{printable(member.name)} has a negative size")
                stem, suffix = os.path.splitext(member.name)
                if suffix.lower() not in IMAGES + CAPTIONS or any(map(is_litter, stem.split("/"))):
                    continue
                if member.islnk() or member.issym() or member.issparse():
                    problems[f"{name}/{member.name}"] = listing.LINK, "it is a link or sparse"
                elif member.isreg():
                    yield stem, suffix, (file, member.offset_data, member.size)
            # tarfile takes a broken header for the end; the true end is a block of zeros.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ValueError("breaks off in the middle")
    # A damaged header may ask for any memory, and raise anything.
    except Exception as problem:
        problems[name] = listing.BROKEN_TAR, f"no complete, uncompressed tar: {problem}"


def tar_sources(file: Path, name: str, problems: dict) -> Iterator[Source]:
    """The examples of a tar, by the rule of loose files: an image and a caption of one stem.

    Passes over what has no counterpart but is, to webdataset, another column of an example: the
    x.seg.png beside x.jpg and x.txt. Second images go to problems.
    """
    stems = defaultdict(dict)
    for stem, suffix, location in tar_members(file, name, problems):
        stems[stem][suffix] = location
    if not stems and name not in problems:
        problems[name] = listing.BROKEN_TAR, "holds neither images nor captions"
    complete = {stem for stem, locations in stems.items() if all(match(tuple(locations))[:2])}
    for stem, locations in stems.items():
        if stem not in complete and complete.intersection(dotted_prefixes(stem)):
            continue
        image, captions, others = match(tuple(locations))
        example = f"{name}/{stem}"
        for suffix in others:
            problems[example + suffix] = listing.SECOND_IMAGE, f"{example}{image} is read"
        yield Source(example, locations.get(image), [(kind, locations[kind]) for kind in captions])


def dotted_prefixes(stem: str) -> list[str]:
    """What stands before each dot of the name behind the folders."""
    start = stem.rfind("/") + 1
    return [stem[:i] for i in range(start, len(stem)) if stem[i] == "."]


# ----------------------------------------------------------------------------------------- decoding
#
# Nothing bad is repaired: a missing caption is an error of that example, not an empty caption.


def read_part(kind: str, location: tuple) -> bytes:
    """An image's or a caption's bytes; ValueError if they are cut off, or too many."""
    file, offset, size = location
    with open(file, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size if size < 0 else size
        if size > MAX_BYTES[kind]:
            raise ValueError(f"its {kind} has {size} bytes, more than {MAX_BYTES[kind]}")
        stream.seek(offset)
        content = stream.read(size)
    if len(content) < size:
        raise ValueError(f"its {kind} is cut off")
    return content


def parse_caption(content: bytes, suffix: str) -> str:
    """A text, or a .json's caption, text or prompt; ValueError if there is no text."""
    texts = [content.decode("utf-8-sig")]
    if suffix.lower() == ".json":
        fields = json.loads(texts[0])
        fields = fields if isinstance(fields, dict) else {}
        texts = [fields.get(key) for key in ("caption", "text", "prompt")]
    for text in texts:
        if isinstance(text, str) and text.strip():
            # JSON can spell lone surrogates: encode() raises here, as a tokenizer would later.
            return text.strip().encode().decode()
    raise ValueError("its caption is empty or no text")


def read_caption(captions: list[tuple[str, tuple]]) -> str:
    """The first caption with text; if none has any, the ValueError of the first."""
    first_problem = None
    for suffix, location in captions:
        try:
            return parse_caption(read_part("caption", location), suffix)
        except (ValueError, OSError, RecursionError) as problem:
            first_problem = first_problem or problem
    raise first_problem


class TooSmall(ValueError):
    """An image's short side is below the smallest size."""


def parse_image(content: bytes, R: int, rng: random.Random, min_size: int = 1) -> tuple:
    """A random crop (3, R, R) in [-1, 1] of the image with short side R, and its time_ids (6,).

    Returns `to_rgb`'s note too. TooSmall if the short side is below min_size.
    """
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    # An MPO, as cameras write it, is a photo followed by its previews, not an animation.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise ValueError("it is animated, or has several pages")
    short = min(image.size)
    if short < min_size:
        raise TooSmall(f"{image.width} x {image.height} is smaller than --min-size {min_size}")
    image, note = to_rgb(image)
    width, height = (max(R, round(side * R / short)) for side in image.size)
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width} x {image.height} is too narrow")
    left, top = rng.randint(0, width - R), rng.randint(0, height - R)
    method = Image.Resampling.BOX if short > R else Image.Resampling.BICUBIC
    crop = image.resize((width, height), method).crop((left, top, left + R, top + R))
    pixels = np.moveaxis(np.asarray(crop, np.float32), 2, 0) / 127.5 - 1
    return pixels, np.array([image.height, image.width, top, left, R, R]), note


# ------------------------------------------------------------------------------------------- stream


class Images(Stream):
    """Examples: images (3, R, R) in [-1, 1], captions, time_ids (6,) and names.

    path: a folder, or one tar. once: a single pass in sorted order, its last batch may be smaller;
    otherwise shuffled epochs without end. min_size: of the short side, in pixels. ValueError if
    path holds neither images with captions nor tars.
    """

    def __init__(
        self, path, resolution, batch_size, seed, rank=0, world=1, once=False, min_size=1
    ):  # fmt: skip
        super().__init__(path, batch_size, seed, rank, world)
        self.resolution, self.once, self.min_size = resolution, once, min_size
        data = list_data(self.path)
        self.root, self.files, self.contents = data.root, data.files, data.contents
        self.lines, self.left_out = data.lines(), dict(data.left_out.counts)
        self.missing = self.left_out.get(listing.NO_CAPTION, 0)
        self.identity |= data.contents

    def walk(self, epoch: int, drawn: int) -> Iterator[Entry]:
        for each in count(epoch):
            problems = {}
            sources = self.sources(each, problems)
            for _ in islice(sources, drawn):
                pass
            # These are counted in the place that the run goes on from.
            if drawn:
                problems.clear()
            for source in sources:
                drawn += 1
                yield Entry(each, drawn, source, dict(problems), each == 0)
                problems.clear()
            # A place of its own: whoever goes on from here has counted these problems.
            yield Entry(each, drawn + 1, None, problems, each == 0)
            if self.once:
                return
            drawn = 0

    def sources(self, epoch: int, problems: dict) -> Iterator[Source]:
        """This rank's share of an epoch; bad shards and the like go to problems, with reasons.

        Shuffled by files, then through a buffer, as a shard's examples lie side by side.
        """
        if self.once:
            files, offset = self.files, self.rank
        else:
            # All epochs of a block share one order, in which the ranks change places: each meets
            # every example once a block, even if there are fewer than ranks.
            block_rng = random.Random(f"{self.seed}/{epoch // self.world}")
            files = block_rng.sample(self.files, len(self.files))
            offset = (self.rank + epoch) % self.world
        rng, stride = random.Random(f"{self.seed}/{epoch}/{self.rank}"), self.world
        # With enough files each rank takes whole ones, so that none reads another's headers.
        if len(files) >= stride:
            files, offset, stride = files[offset::stride], 0, 1
            if not self.once:
                rng.shuffle(files)
        # Otherwise one rank at a time tells what is broken.
        problems = problems if offset == 0 else {}
        all_sources = chain.from_iterable(self.open_file(*file, problems) for file in files)
        share = islice(all_sources, offset, None, stride)
        buffer = list(islice(share, 1 if self.once else SHUFFLE_BUFFER))
        while buffer:
            i = rng.randrange(len(buffer))
            yield buffer[i]
            buffer[i : i + 1] = islice(share, 1)

    def open_file(self, name: str, captions: tuple[str, ...], problems: dict) -> Iterator[Source]:
        """The sources in a tar, or the one of a loose image with the captions beside it."""
        if not captions:
            yield from tar_sources(self.root / name, name, problems)
            return
        stem = os.path.splitext(self.root / name)[0]
        yield Source(name, (self.root / name, 0, -1), [(k, (stem + k, 0, -1)) for k in captions])

    def example(self, entry: Entry) -> dict:
        name, image, captions = entry.source
        if image is None:
            raise BadExample(name, listing.NO_IMAGE, "no image")
        if not captions:
            raise BadExample(name, listing.NO_CAPTION, "no caption")
        # Seeded by its name: a crop is the same however the examples are split over ranks.
        seed = f"{self.seed}/{entry.epoch}/{name}".encode("utf-8", "surrogateescape")
        reason = listing.BROKEN_CAPTION
        try:
            text = read_caption(captions)
            reason = listing.BROKEN_IMAGE
            content = read_part("image", image)
            rng = random.Random(seed)
            pixels, time_ids, note = parse_image(content, self.resolution, rng, self.min_size)
        except TooSmall as problem:
            raise BadExample(name, listing.TOO_SMALL, str(problem)) from None
        # A decoder may raise anything over a broken file.
        except Exception as problem:
            # Without the address of a file object in memory.
            message = (str(problem) or repr(problem)).split(" <_io")[0]
            raise BadExample(name, reason, message) from None
        example = {"images": pixels, "captions": text, "time_ids": time_ids, "names": name}
        return example | {"notes": [(listing.PROFILE, note)] if note else []}
