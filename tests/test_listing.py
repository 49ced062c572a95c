"""training/listing.py and tars: everything below --data is read, or counted by its reason."""

import io
import json
import os
import re
import shutil
import tarfile
from itertools import groupby

import numpy as np
import pytest
from PIL import Image

from common.pictures import FORMATS
from tests.datasets import encoded, noise, pairs, write
from training import listing
from training.images import Images
from training.listing import list_data
from training.streams import Loader

PNG = encoded(noise(4, 4, 3))


def one_pass(path, R=4, **options) -> tuple[dict, Loader]:
    """Captions and pixels by name, and the loader that read them."""
    loader, rows = Loader(Images(path, R, 3, 0, once=True, **options), 2), {}
    for batch in loader:
        for name, caption, image in zip(batch["names"], batch["captions"], batch["images"]):
            rows[name] = caption, ((image.numpy() + 1) * 127.5).round().transpose(1, 2, 0)
    return rows, loader


# -------------------------------------------------------------------------------------- loose files


def test_everything_below_data_is_read_or_counted_or_litter(tmp_path):
    read = {
        "a.png": "", "sub.d/b.v2.png": "", "sub.d/b.v3.png": "", "cap.png": "", "json.png": "",
        "x.jpg": "", "UP.PNG": "",
    }  # fmt: skip
    captions = ("a.txt", "sub.d/b.v2.txt", "sub.d/b.v3.txt", "cap.caption", "json.json", "x.txt",
                "UP.TXT", "json.txt")  # fmt: skip
    counted = {
        "images without a caption": ["mute.png", "sub.d/b.v4.jpg"],
        "loose texts without an image": ["lonely.txt", "info.json"],
        "second images of one name": ["x.png", "x.webp"],
        "archives, which are not read: unpack them": ["b.tgz", "c.tar.gz", "d.tar.zst", "e.zip",
                                                      "f.parquet", "G.TGZ"],
        ".md files": ["README.md"], ".csv files": ["1.csv", "2.csv"], "other files": ["LICENSE"],
        ".heic files": ["photo.heic"], "broken links": ["gone.png"],
    }  # fmt: skip
    litter = ("._a.png", "._a.txt", ".DS_Store", "Thumbs.db", "desktop.ini", "__MACOSX/._x.jpg",
              "__MACOSX/x.jpg", ".ipynb_checkpoints/a-checkpoint.png", ".git/HEAD", ".hidden.png",
              "@eaDir/a.png/thumb.jpg")  # fmt: skip
    write(tmp_path, {"shard.tar": pairs(1)} | dict.fromkeys((*read, *litter), PNG))
    write(tmp_path, dict.fromkeys(captions, "words"))
    write(
        tmp_path, {"json.json": json.dumps({"caption": "words"}), "json.txt": "", "info.json": "{}"}
    )
    for names in counted.values():
        write(tmp_path, dict.fromkeys(set(names) - {"gone.png"}, PNG))
    (tmp_path / "gone.png").symlink_to("nowhere")
    rows, loader = one_pass(tmp_path)
    assert set(rows) == {*read, "shard.tar/001"} and not loader.problems
    assert all(caption in ("words", "..") for caption, _ in rows.values())
    assert loader.left_out == {reason: len(names) for reason, names in counted.items()}
    # Whatever was written is in one of the lists.
    total = sum(len(names) for _, _, names in os.walk(tmp_path))
    assert total == len(read) + len(captions) + sum(loader.left_out.values()) + len(litter) + 1
    lines = loader.dataset.lines
    assert lines[0] == f"{tmp_path}: 7 images with captions, 1 .tar files"
    assert "2 images without a caption (mute.png, sub.d/b.v4.jpg)" in lines[1]
    assert re.search(r"6 archives, which are not read: unpack them \((\S+, ){5}\.\.\)", lines[1])


@pytest.mark.parametrize("suffix", listing.IMAGES)
def test_what_pillow_reads_is_read(tmp_path, suffix):
    kind = Image.registered_extensions()[suffix]
    assert kind in FORMATS or suffix == ".mpo"
    grey = suffix in (".pbm", ".pgm", ".pfm", ".gif")
    image = Image.fromarray(noise(8, 8) if grey else noise(8, 8, 3))
    if suffix == ".pfm":
        image = image.convert("F")
    content = encoded(image, kind, **({"quality": 100} if kind in ("JPEG", "MPO", "WEBP") else {}))
    path = write(tmp_path, {f"a{suffix.upper()}": content, "a.txt": "x"})
    ((name, (_, pixels)),) = one_pass(path, R=8)[0].items()
    with Image.open(io.BytesIO(content)) as stored:
        expected = np.asarray(stored.convert("RGB")).astype(float)
    if suffix == ".pfm":
        expected = 255 * (expected - expected.min()) / np.ptp(expected)
    assert name == f"a{suffix.upper()}" and np.abs(pixels - expected).max() <= 1


def test_every_spelling_of_common_formats_is_there():
    expected = ".jpg .jpeg .jpe .jfif .png .webp .avif .jp2 .j2k .bmp .tif .tiff .gif .ppm .pgm"
    assert set(expected.split()) < set(listing.IMAGES) and listing.IMAGES[0].startswith(".j")
    # Formats that run other programs or hold no picture.
    assert not {".eps", ".ps", ".pdf", ".wmf", ".mpg", ".h5", ".grib"} & set(listing.IMAGES)


def test_links_to_folders_are_followed_once(tmp_path):
    for name in ("far", "farther"):
        write(tmp_path / name, {f"{name}.png": PNG, f"{name}.txt": "x"})
    data = write(tmp_path / "data", {"inner/a.png": PNG, "inner/a.txt": "x"})
    links = {
        "1": "../far", "2": "../far", "another": "inner", "loop": ".", "up": "..", "inner/up": "..",
        "../far/next": "../farther", "../farther/back": "../far", "self": "self",
    }  # fmt: skip
    for name, target in links.items():
        (data / name).symlink_to(target)
    (data / "b.png").symlink_to(tmp_path / "far" / "far.png")
    write(data, {"b.txt": "x"})
    rows, loader = one_pass(data)
    assert set(rows) == {"inner/a.png", "1/far.png", "1/next/farther.png", "b.png"}
    assert loader.left_out == {"links to a folder above this one": 1, "broken links": 1}
    # Two links alone.
    only = tmp_path / "only"
    only.mkdir()
    for name in ("far", "farther"):
        (only / name).symlink_to(tmp_path / name)
    assert set(one_pass(only)[0]) == {"far/far.png", "farther/farther.png"}


def test_a_folder_that_cannot_be_opened_is_counted(tmp_path, monkeypatch):
    write(tmp_path, {"a.png": PNG, "a.txt": "x", "shut/b.png": PNG, "shut/b.txt": "x"})
    scandir = os.scandir

    def refuse(path):
        if str(path).rstrip("/").endswith("shut"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    data = list_data(tmp_path)
    assert data.left_out.counts == {"folders that cannot be opened": 1} and len(data.files) == 1


@pytest.mark.parametrize("name", ["a.tgz", "a.tar.gz", "a.zip", "a.parquet", "a.jpg", "a.txt"])
def test_data_that_holds_nothing_to_read_says_what_it_holds(tmp_path, name):
    kind = {"jpg": "images without a caption", "txt": "loose texts without an image"}
    reason = kind.get(name[-3:], "archives, which are not read: unpack them")
    write(tmp_path, {name: "?"})
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=f"left out: 1 {reason} \\({name}\\)$"):
            list_data(path)


def test_names_need_not_be_utf8(tmp_path):
    for suffix, content in ((b"png", PNG), (b"txt", b"x")):
        with open(os.fsencode(tmp_path) + b"/caf\xe9." + suffix, "wb") as file:
            file.write(content)
    write(tmp_path, {"b.tar": pairs(1)})
    with open(os.fsencode(tmp_path) + b"/mute\xe9.png", "wb") as file:
        file.write(PNG)
    rows, loader = one_pass(tmp_path)
    assert set(rows) == {"caf\udce9.png", "b.tar/001"}
    assert "(mute\\udce9.png)" in loader.dataset.lines[1].encode().decode()


def test_many_kinds_of_other_files_are_counted_together(tmp_path):
    write(tmp_path, {f"{i}.kind{i}": "" for i in range(60)} | {"a.tar": pairs(1)})
    counts = list_data(tmp_path).left_out.counts
    assert sum(counts.values()) == 60 and len(counts) <= 22 and counts["other files"] > 30


# --------------------------------------------------------------------------------------------- tars


def tar(members) -> bytes:
    """A tar of (name, content) in this order."""
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def example(stem, suffix=".png", caption=".txt", seed=0) -> list:
    text = f"of {stem}"
    text = json.dumps({"caption": text}) if caption == ".json" else text
    return [(stem + suffix, encoded(noise(4, 4, 3, seed=seed))), (stem + caption, text.encode())]


def same_rows(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[k][0] == b[k][0] and np.array_equal(a[k][1], b[k][1]) for k in a)  # fmt: skip


DOTTED = ("photo.v2", "a.1", "a.2", "a", "d", "d.1/x", "d.1/x.y", "d/1.5.2024 at 10.30", "plain")


@pytest.mark.parametrize("order", ["by name", "images first", "captions first", "shuffled"])
def test_a_tar_gives_what_its_files_give_loose(tmp_path, order):
    members = []
    for i, stem in enumerate(DOTTED):
        members += example(stem, caption=(".txt", ".json", ".caption")[i % 3], seed=i)
    members += [(f"{stem}.png", PNG) for stem in ("a.3", "mute.v1", "d.1/mute")]
    members += [("lost.v1.txt", b"x")]
    members.sort(key=lambda member: member[0])
    if order != "by name":
        members.sort(key=lambda m: m[0].endswith(".png"), reverse=order == "images first")
    if order == "shuffled":
        members = [members[i] for i in np.random.default_rng(0).permutation(len(members))]
    loose = write(tmp_path / "loose", dict(members))
    write(tmp_path / "packed", {"s.tar": tar(members)})
    expected, loose_loader = one_pass(loose)
    rows, loader = one_pass(tmp_path / "packed")
    assert {os.path.splitext(name)[0] for name in expected} == set(DOTTED)
    expected = {f"s.tar/{os.path.splitext(name)[0]}": row for name, row in expected.items()}
    assert same_rows(rows, expected)
    assert loose_loader.left_out == {
        "images without a caption": 3, "loose texts without an image": 1}  # fmt: skip
    # Of a.3.png webdataset says that it is another column of a.
    assert loader.left_out == {"images without a caption": 2, "captions without an image": 1}


def webdataset(members) -> dict[str, dict[str, bytes]]:
    """Samples by key as webdataset's documentation has it: the key ends at the first dot of the
    base name, the rest is the column, and neighbours of one key are a sample."""
    parts = [(re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]*)", name), data) for name, data in members]
    parts = [(match[1], match[2].lower(), data) for match, data in parts if match]
    groups = groupby(parts, key=lambda part: part[0])
    return {key: {column: data for _, column, data in group} for key, group in groups}


def test_webdataset_archives_give_webdatasets_samples(tmp_path):
    """Columns beside the picture: masks, classes, metadata; sorted as its writer leaves them."""
    members = []
    for i in range(6):
        key = f"train.d/{i:04}"
        members += example(key, (".jpg", ".png", ".webp")[i % 3], seed=i)
        members += [(f"{key}.seg.png", PNG), (f"{key}.depth.16bit.png", PNG), (f"{key}.cls", b"7"),
                    (f"{key}.meta.json", b"{}"), (f"{key}.__url__", b"x")]  # fmt: skip
    for sort in (sorted, list):
        write(tmp_path, {"s.tar": tar(sort(members))})
        rows, loader = one_pass(tmp_path)
        samples = webdataset(sort(members))
        assert set(rows) == {f"s.tar/{key}" for key in samples} and not loader.left_out
        for key, sample in samples.items():
            caption, pixels = rows[f"s.tar/{key}"]
            assert caption == sample["txt"].decode()
            content = next(sample[column] for column in ("jpg", "png", "webp") if column in sample)
            stored = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(float)
            assert np.array_equal(pixels, stored)


def test_litter_links_and_second_images_in_tars(tmp_path, capsys):
    members = [("._a.png", b"\0\5\26\7"), *example("a"), ("a.webp", PNG),
               ("__MACOSX/._a.png", b"?"), (".ipynb_checkpoints/a.png", PNG),
               ("./.hidden/b.png", PNG), ("README.md", b"x"),
               *example("./dir/b"), ("a.bmp", PNG)]  # fmt: skip
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w") as archive:
        for kind, name in ((tarfile.LNKTYPE, "hard.png"), (tarfile.SYMTYPE, "soft.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.png"
            archive.addfile(info)
    write(
        tmp_path, {"1.tar": tar(members), "2.tar": file.getvalue(), "3.tar": tar([("x.cls", b"")])}
    )
    rows, loader = one_pass(tmp_path)
    assert set(rows) == {"1.tar/a", "1.tar/./dir/b"}
    assert loader.left_out == {
        "second images of one name": 2, "links within .tar files": 2,
        ".tar files that are broken or hold no image": 2,
    }  # fmt: skip
    assert loader.bad == 4 and loader.problems["3.tar"] == "holds neither images nor captions"
    assert "skipped 1.tar/a.webp: 1.tar/a.png is read" in capsys.readouterr().err


@pytest.mark.parametrize("size", [-1, -1536, 2**50, 2**80])
def test_a_tar_whose_header_lies_about_a_size_ends(tmp_path, size):
    """A negative one leads tarfile in circles, a huge one asks for more memory than there is."""
    content = bytearray(tar([*example("a"), *example("b"), *example("c")]))
    # The header of b's picture: base-256 as GNU tar writes it, and the checksum of the whole.
    start = content.index(b"b.png\0")
    content[start + 124 : start + 136] = (size % 2**96).to_bytes(12, "big")
    content[start + 124] = 0x80 if size > 0 else 0xFF
    content[start + 148 : start + 156] = b" " * 8
    content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    rows, loader = one_pass(write(tmp_path, {"s.tar": bytes(content)}))
    assert set(rows) == {"s.tar/a"} and loader.bad in (1, 2)
    assert "s.tar" in loader.problems


def test_an_empty_caption_gives_way_to_the_next_and_a_giant_one_is_refused(tmp_path, monkeypatch):
    write(tmp_path, {
        "a.png": PNG, "a.txt": " \n", "a.json": json.dumps({"caption": "", "text": "of a"}),
        "b.png": PNG, "b.txt": "", "b.caption": "\t", "b.json": "{}",
        "c.png": PNG, "c.txt": "x" * 2**20 + "x", "d.png": PNG, "d.txt": "x" * 2**20,
        "e.png": PNG, "e.txt": b"\xff", "e.caption": "of e",
        "f.png": PNG, "f.txt": "of f", "f.caption": "x", "f.json": json.dumps({"text": "x"}),
        "g.png": PNG, "g.caption": "of g", "g.json": json.dumps({"text": "x"}),
    })  # fmt: skip
    rows, loader = one_pass(tmp_path)
    assert {name: row[0][:4] for name, row in rows.items()} == {
        "a.png": "of a",
        "d.png": "xxxx",
        "e.png": "of e",
        "f.png": "of f",
        "g.png": "of g",
    }
    assert loader.problems["b.png"] == "its caption is empty or no text"
    assert loader.problems["c.png"] == "its caption has 1048577 bytes, more than 1048576"
    assert loader.left_out == {"captions that cannot be read": 2}


# ----------------------------------------------------------------------------------------- contents


def test_no_image_is_opened_to_know_the_data_and_nothing_twice(tmp_path, monkeypatch):
    write(tmp_path, pairs(*range(30)) | {f"{i}.tar": pairs(i) for i in range(9)})
    opened, fingerprint = [], listing.fingerprint
    monkeypatch.setattr(
        listing, "fingerprint", lambda path: opened.append(path) or fingerprint(path)
    )
    data = list_data(tmp_path)
    captions = [path for path in opened if str(path).endswith(".txt")]
    tars = [path for path in opened if str(path).endswith(".tar")]
    assert len(captions) == 30 and len(tars) == 9 and len(set(opened)) == len(opened) == 39
    assert set(data.contents) == set(listing.CONTENTS)
    # Of many an evenly spaced sample.
    monkeypatch.setattr(listing, "CAPTION_FILES", 10)
    monkeypatch.setattr(listing, "TARS", 4)
    opened.clear()
    assert list_data(tmp_path).contents["file names"] == data.contents["file names"]
    assert [path.name for path in opened] == [f"{i:03}.txt" for i in range(0, 30, 3)] + [
        "0.tar", "3.tar", "6.tar"]  # fmt: skip
    # The sizes of all tars count.
    tars = list_data(tmp_path).contents["tars"]
    with open(tmp_path / "1.tar", "ab") as file:
        file.write(b"\0")
    assert list_data(tmp_path).contents["tars"] != tars


def test_two_images_that_change_places_are_noticed(tmp_path):
    small, large = encoded(noise(4, 4, 3)), encoded(noise(9, 9, 3))
    contents = []
    for one, other in ((small, large), (large, small)):
        write(tmp_path, {"1.png": one, "2.png": other, "1.txt": "x", "2.txt": "x"})
        contents.append(list_data(tmp_path).contents)
    changed = {name for name in contents[0] if contents[0][name] != contents[1][name]}
    assert changed == {"image sizes"}


def test_lists_are_sampled_evenly():
    for n in range(1, 40):
        for limit in range(1, 20):
            sample = listing.evenly(list(range(n)), limit)
            assert (
                1 <= len(sample) <= limit
                and sample[0] == 0
                and len(sample) > limit // 2 * (n > limit)
            )
            assert len({*np.diff(sample)}) <= 1 and (n > limit or sample == list(range(n)))
    assert listing.evenly([], 5) == []


def test_files_that_vanish_while_they_are_listed_are_errors_of_their_examples(
    tmp_path, monkeypatch
):
    write(tmp_path, pairs(1, 2) | {"a.tar": pairs(3)})
    walk = listing.walk

    def then_delete(*arguments):
        yield from list(walk(*arguments))
        (tmp_path / "001.txt").unlink()
        (tmp_path / "002.png").unlink()
        (tmp_path / "a.tar").unlink()

    monkeypatch.setattr(listing, "walk", then_delete)
    rows, loader = one_pass(tmp_path)
    assert not rows and loader.left_out == {
        "captions that cannot be read": 1, "images that cannot be read": 1,
        ".tar files that are broken or hold no image": 1,
    }  # fmt: skip
    shutil.rmtree(tmp_path)
