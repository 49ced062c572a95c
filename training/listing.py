"""What lies below --data: images with captions, tars, and what is left out, by reason."""

import hashlib
import os
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from common.files import fingerprint

# Of pictures.FORMATS; of two images of one name the one whose suffix is earlier here is read.
IMAGES = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".avif", ".avifs",
          ".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c", ".tif", ".tiff", ".bmp", ".dib", ".gif",
          ".pbm", ".pgm", ".ppm", ".pnm", ".pfm", ".qoi")  # fmt: skip
CAPTIONS = (".txt", ".caption", ".json")
ARCHIVES = (".tgz", ".tbz", ".tbz2", ".txz", ".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".7z",
            ".rar", ".parquet", ".arrow")  # fmt: skip
# Hidden files are ignored too: a Mac's ._x.jpg, .DS_Store, .ipynb_checkpoints/.
LITTER = {"__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini"}

# Reasons that are counted and logged.
NO_CAPTION = "images without a caption"
NO_IMAGE = "captions without an image"
TEXT = "loose texts without an image"
SECOND_IMAGE = "second images of one name"
ARCHIVE = "archives, which are not read: unpack them"
BROKEN_IMAGE = "images that cannot be read"
BROKEN_CAPTION = "captions that cannot be read"
BROKEN_TAR = ".tar files that are broken or hold no image"
LINK = "links within .tar files"
TOO_SMALL = "images smaller than --min-size"
PROFILE = "images whose colour profile was ignored"
CUT = "captions cut after 75 tokens"
NOT_FINITE = "images whose latents are not finite"
# What --max-bad limits; the others may be as they should be.
BAD = (NO_CAPTION, NO_IMAGE, BROKEN_IMAGE, BROKEN_CAPTION, BROKEN_TAR, LINK, NOT_FINITE)

MAX_REASONS = 20  # from here on other suffixes are counted together
FIRST = 5  # names of a reason that are printed
# At most so many, evenly spaced, are looked at to know the data again.
SIZES, CAPTION_FILES, TARS = 1_000_000, 20_000, 64

# ----------------------------------------------------------------------------------------- left out


class LeftOut:
    """How many were left out by reason, and the names of the first."""

    def __init__(self, counts: dict[str, int] | None = None):
        self.counts, self.names = Counter(counts), defaultdict(list)

    def add(self, reason: str, name: str) -> bool:
        """Count one; returns whether it is one of the first, which are named."""
        self.counts[reason] += 1
        if is_named := len(self.names[reason]) < FIRST:
            self.names[reason].append(printable(name))
        return is_named

    def __str__(self):
        parts = []
        for reason, number in self.counts.items():
            names = self.names[reason] + [".."] * (0 < len(self.names[reason]) < number)
            parts.append(f"{number} {reason}" + f" ({', '.join(names)})" * bool(names))
        return "; ".join(parts)


def printable(name: str) -> str:
    """A file's name, with escapes for bytes that are no UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def is_litter(name: str) -> bool:
    """Whether a Mac, a notebook, Windows or a disk station left a file or folder of this name."""
    return name in LITTER or (name.startswith(".") and name not in (".", ".."))


# ------------------------------------------------------------------------------------------ listing


@dataclass
class Listing:
    """What is read of a folder, or of one tar.

    files: sorted names below root, of images with the suffixes of their captions, and of tars with
    (). contents: what it is known by later, whatever the path.
    """

    root: Path
    files: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)
    contents: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """What a user is told at the start."""
        tars = sum(not captions for _, captions in self.files)
        images = len(self.files) - tars
        lines = [f"{self.root}: {images} images with captions, {tars} .tar files"]
        return lines + [f"left out: {self.left_out}"] * bool(self.left_out.counts)


def list_data(path: Path) -> Listing:
    """All below a folder, links to folders followed once; ValueError if nothing can be read."""
    path = Path(path).resolve()
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    listing = Listing(path if path.is_dir() else path.parent)
    folders = walk(path, listing.left_out) if path.is_dir() else [("", [path.name])]
    for folder, names in folders:
        _add_folder(listing, folder, names)
    listing.files.sort()
    if not listing.files:
        others = f"; left out: {listing.left_out}" if listing.left_out.counts else ""
        raise ValueError(f"{path} holds neither images with captions nor .tar files{others}")
    listing.contents = describe_contents(listing.root, listing.files)
    return listing


def walk(root: Path, left_out: LeftOut) -> Iterator[tuple[str, list[str]]]:
    """(folder below root, sorted names of its files) of every folder once, those of links last."""
    # By device and number, which a folder has whatever leads to it.
    above = {_folder_id(folder) for folder in root.parents}
    visited = set()
    folders, links = [""], deque()
    while folders or links:
        folder = folders.pop() if folders else links.popleft()
        try:
            if (number := _folder_id(root / folder)) in visited:
                continue
            if number in above:
                left_out.add("links to a folder above this one", folder)
                continue
            visited.add(number)
            entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
        except OSError:
            left_out.add("folders that cannot be opened", folder or ".")
            continue
        names = []
        for entry in entries:
            if is_litter(entry.name):
                continue
            name, is_link = folder + entry.name, entry.is_symlink()
            if os.path.isdir(entry.path) if is_link else entry.is_dir():
                (links if is_link else folders).append(f"{name}/")
            elif is_link and not os.path.exists(entry.path):
                left_out.add("broken links", name)
            elif entry.is_file():
                names.append(entry.name)
            else:
                left_out.add("special files", name)
        yield folder, names


def _folder_id(path: Path) -> tuple[int, int]:
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino


def _add_folder(listing: Listing, folder: str, names: list[str]) -> None:
    """Sort the files of one folder into examples, tars and what is left out."""
    stems = defaultdict(list)
    for name in names:
        stem, suffix = os.path.splitext(name)
        kind = suffix.lower()
        if kind in IMAGES or kind in CAPTIONS:
            stems[stem].append(suffix)
        elif kind == ".tar":
            listing.files.append((folder + name, ()))
        elif kind in ARCHIVES:
            listing.left_out.add(ARCHIVE, folder + name)
        else:
            counts, reason = listing.left_out.counts, f"{printable(kind)} files"
            if not kind or (reason not in counts and len(counts) >= MAX_REASONS):
                reason = "other files"
            listing.left_out.add(reason, folder + name)
    for stem, suffixes in stems.items():
        image, captions, others = match(tuple(suffixes))
        name = folder + stem
        if image and captions:
            listing.files.append((name + image, captions))
        elif image:
            listing.left_out.add(NO_CAPTION, name + image)
        else:
            listing.left_out.add(TEXT, name + captions[0])
        for suffix in others:
            listing.left_out.add(SECOND_IMAGE, name + suffix)


# Cached because thousands of names have the same suffixes, and may then share one tuple in memory.
@lru_cache(1000)
def match(suffixes: tuple[str, ...]) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """The suffixes of one name: its image's or "", its captions', and those of further images."""
    images, captions = [], []
    for suffix in sorted(suffixes):
        (images if suffix.lower() in IMAGES else captions).append(suffix)
    images.sort(key=lambda suffix: IMAGES.index(suffix.lower()))
    captions.sort(key=lambda suffix: CAPTIONS.index(suffix.lower()))
    # Of x.jpg and x.png beside one x.txt, one is a copy or a mask of the other.
    return (images[0] if images else ""), tuple(captions), tuple(images[1:])


# ----------------------------------------------------------------------------------------- contents


def describe_contents(root: Path, files: list) -> dict[str, str]:
    """What a data set is known by: names, sizes, captions and bytes, but not where it lies.

    Of many files an evenly spaced sample stands for all, so 12 million take minutes. No image is
    opened.
    """
    loose = [file for file in files if file[1]]
    tars = [root / name for name, captions in files if not captions]
    captions = []
    for name, suffixes in evenly(loose, CAPTION_FILES):
        stem = os.path.splitext(name)[0]
        captions += [root / (stem + suffix) for suffix in suffixes]
    sizes = [_size(root / name) for name, _ in evenly(loose, SIZES)]
    return {
        "file names": f"{len(files)} ({digest(files)})",
        "image sizes": f"{sum(sizes)} bytes ({digest(sizes)})",
        "captions": digest(map(_fingerprint, captions)),
        "tars": digest([*map(_size, tars), *map(_fingerprint, evenly(tars, TARS))]),
    }


CONTENTS = ("file names", "image sizes", "captions", "tars")


def evenly(rows: list, limit: int) -> list:
    """At most so many of the rows, evenly spaced."""
    return rows[:: -(-len(rows) // limit) or 1]


def digest(values: Iterable) -> str:
    """Values, in 16 hexadecimal digits."""
    sha256 = hashlib.sha256()
    for value in values:
        sha256.update(str(value).encode() + b"\0")
    return sha256.hexdigest()[:16]


# A file that cannot be read is an error of its example, later.


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _fingerprint(path: Path) -> str:
    try:
        return fingerprint(path)
    except OSError:
        return ""
