"""training/images.py and cache.py: pixels against numpy, order by counting, resumed runs."""

import dataclasses
import gzip
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from threading import get_ident

import numpy as np
import pytest
import torch
from PIL import Image

from common import files
from tests.datasets import by_name, encoded, names, noise, on_white, pairs, write
from training import cache, data, images
from training.cache import Cached, fill, is_full, read_shard
from training.images import Images
from training.streams import Loader

# Counted in `mixed`, below.
BROKEN = {"images without a caption": 1, "images that cannot be read": 1}


@pytest.fixture
def mixed(tmp_path):
    """11 good examples in two shards and three loose files, and two bad ones."""
    b = pairs(5, 6, 7) | {"bad.png": "no", "bad.txt": "x"}
    loose = pairs(8, 9, 10, where="loose/") | {"loose/mute.png": "no"}
    return write(tmp_path / "in", {"a.tar": pairs(0, 1, 2, 3, 4), "sub/b.tar": b} | loose)


GOOD = [f"a.tar/00{i}" for i in range(5)] + [f"loose/{i:03}.png" for i in (8, 9, 10)]
GOOD += [f"sub/b.tar/00{i}" for i in (5, 6, 7)]


def one_pass(path, R=4, seed=0) -> tuple[dict, Loader]:
    loader = Loader(Images(path, R, 3, seed, once=True), 1)
    return by_name(loader), loader


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def off(row: dict, whole: np.ndarray) -> float:
    """How far an example's pixels are from the part of a picture that its time_ids name."""
    top, left, R = row["time_ids"].tolist()[2:5]
    pixels = ((row["images"] + 1) * 127.5).round().numpy().transpose(1, 2, 0)
    part = whole[top : top + R, left : left + R]
    assert pixels.shape == part.shape == (R, R, 3)
    return np.abs(pixels - part).max()


def test_area_resize_and_crop_are_block_means_at_the_place_that_time_ids_name(tmp_path):
    pictures = {f"{i}.png": noise(*((32, 60), (60, 32))[i % 2], 3, seed=i) for i in range(48)}
    write(tmp_path, {name: encoded(pixels) for name, pixels in pictures.items()})
    rows, _ = one_pass(write(tmp_path, {f"{i}.txt": "x" for i in range(48)}), R=8)
    for name, pixels in pictures.items():
        h, w, top, left, *target = rows[name]["time_ids"].tolist()
        assert [h, w, *target] == [*pixels.shape[:2], 8, 8] and 0 in (top, left)
        # Pillow rounds to whole numbers twice.
        assert off(rows[name], pixels.reshape(h // 4, 4, w // 4, 4, 3).mean((1, 3))) <= 1
    tops, lefts = np.stack([row["time_ids"] for row in rows.values()]).T[2:4]
    assert {0, 7} <= set(tops[1::2]) == set(tops) and {0, 7} <= set(lefts[::2]) == set(lefts)
    row, other = rows["0.png"], one_pass(tmp_path, R=8, seed=1)[0]
    assert (row["images"].dtype, row["time_ids"].dtype) == (torch.float32, torch.int64)
    assert any((other[name]["time_ids"] != rows[name]["time_ids"]).any() for name in rows)


@pytest.mark.parametrize(
    ("size", "resized", "method"),
    [((37, 53), (16, 23), "BOX"), ((17, 16), (17, 16), "BOX"), ((10, 13), (16, 21), "BICUBIC"),
     ((16, 999), (16, 999), "BOX"), ((33, 32), (16, 16), "BOX"), ((9, 9), (16, 16), "BICUBIC")],
)  # fmt: skip
def test_the_short_side_is_the_resolution_and_no_side_is_less(tmp_path, size, resized, method):
    image = Image.fromarray(noise(size[1], size[0], 3))
    write(tmp_path, {"a.tar": {"x.png": encoded(image), "x.txt": "x"}})
    whole = np.asarray(image.resize(resized, getattr(Image.Resampling, method)), int)
    assert off(one_pass(tmp_path / "a.tar", R=16)[0]["a.tar/x"], whole) == 0


def test_every_mode_becomes_rgb_and_is_turned_as_exif_says(tmp_path):
    rgb, grey, high = noise(8, 8, 3), noise(8, 8), noise(12, 8, 3)
    deep = np.random.default_rng(1).integers(0, 65536, (8, 8)).astype(np.uint16)
    colours, palette = np.arange(10, 130, 10).reshape(4, 3), Image.fromarray(grey % 4).convert("P")
    palette.putpalette(colours.flatten().tolist())
    alpha, clear = noise(8, 8, 1, seed=2), np.concatenate([[[255] * 3], colours[1:]])
    three, red = np.repeat(grey[..., None], 3, 2), np.full((8, 8, 3), [255, 0, 0])
    cases = {
        "rgb": (encoded(rgb), rgb), "grey": (encoded(grey), three),
        "alpha": (encoded(np.concatenate([rgb, alpha], 2)), on_white(rgb, alpha)),
        "deep": (encoded(deep), np.repeat(deep[..., None] >> 8, 3, 2)),
        "palette": (encoded(palette), colours[grey % 4]),
        "see-through": (encoded(palette, transparency=0), clear[grey % 4]),
        "two": (encoded(np.stack([grey, 255 - grey], 2)), on_white(three, 255 - three)),
        "bits": (encoded(Image.fromarray(grey > 99)), 255 * (three > 99)),
        "webp": (encoded(rgb, "WEBP", lossless=True), rgb),
        "cmyk": (encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), red),
    }  # fmt: skip
    turned = [
        high, high[:, ::-1], high[::-1, ::-1], high[::-1], high.swapaxes(0, 1), np.rot90(high, -1),
        np.rot90(high, 2).swapaxes(0, 1), np.rot90(high),
    ]  # fmt: skip
    exif = Image.Exif()
    for exif[0x0112], expected in enumerate(turned, 1):
        cases[f"exif {exif[0x0112]}"] = encoded(high, exif=exif), expected
    files = {f"{name}.png": image for name, (image, _) in cases.items()}
    rows, loader = one_pass(write(tmp_path, files | {f"{name}.txt": name for name in cases}), R=8)
    assert not loader.problems
    for name, (_, expected) in cases.items():
        assert rows[f"{name}.png"]["time_ids"][:2].tolist() == [*expected.shape[:2]]
        # JPEG's rounding; composition's.
        limit = {"cmyk": 3, "alpha": 1, "two": 1}.get(name, 0)
        assert off(rows[f"{name}.png"], expected) <= limit, name


def test_captions_of_every_kind(tmp_path):
    png = encoded(noise(4, 4, 3))
    write(tmp_path, {
        "v.2/one.txt": "\ufeff  ein großes Haus 🎨\n水彩画 \n", "v.2/one.JPEG": png,
        "v.2/one.json": "{}", "two.png": png,
        "two.json": json.dumps({"prompt": "c", "text": "b", "caption": " a "}),
        "x.json": json.dumps({"prompt": "c", "text": "çà et là"}), "x.webp": png,
        "x.y.json": json.dumps({"key": 1, "prompt": "c"}), "x.y.jpg": png, "note.txt": "of none",
        "s.tar": {
            "./d.1/x.cls": "7", "./d.1/x.PNG": png, "./d.1/x.seg.png": b"", "./d.1/x.json": "{}",
            "./d.1/x.txt": "of x", "d/README.md": "more", "d/y.txt": "of y", "d/y.webp": png,
        },
    })  # fmt: skip
    rows, loader = one_pass(tmp_path)
    assert not loader.problems and {name: row["captions"] for name, row in rows.items()} == {
        "v.2/one.JPEG": "ein großes Haus 🎨\n水彩画", "two.png": "a", "x.webp": "çà et là",
        "x.y.jpg": "c", "s.tar/./d.1/x": "of x", "s.tar/d/y": "of y",
    }  # fmt: skip


def test_what_is_bad_is_said_and_left_out(tmp_path, capsys):
    png, jpg = encoded(noise(9, 9, 3)), encoded(noise(64, 64, 3), "JPEG")
    film = encoded(Image.new("L", (9, 9)), save_all=True, append_images=[Image.new("L", (9, 9), 9)])
    huge, unknown = png[:16] + (1 << 17).to_bytes(4, "big") * 2 + png[24:], "^cannot identify image"
    bad = {
        "corrupt.jpg": (jpg[:300] + b"\xff" * 40, "a", "."), "half.jpg": (jpg[:2000], "a", "trunc"),
        "text.png": ("hello", "a", "file$"), "empty.png": ("", "a", unknown),
        "film.png": (film, "a", "animated"),
        "eps.png": ("%!PS-Adobe-3.0 EPSF-3.0\n", "a", unknown), "huge.png": (huge, "a", "."),
        "narrow.png": (encoded(noise(1, 30000)), "a", "30000 x 1 is too narrow"),
        "blank.png": (png, " \n", "caption is empty"), "latin.png": (png, b"\xe9t\xe9", "utf-8"),
    }  # fmt: skip
    broken = ['{"caption": ""}', '{"a": "b"}', "[1]", '{"text": 3}', "{", r'{"text": "\ud800"}']
    for i, text in enumerate(broken):
        write(tmp_path, {f"json{i}.json": text})
        bad[f"json{i}.png"] = png, None, "."
    for name, (image, text, _) in bad.items():
        write(tmp_path, {name: image} | ({f"{name[:-4]}.txt": text} if text is not None else {}))
    write(tmp_path, {"mute.png": png, "s.tar": {"lost.txt": "a", "mute.png": png} | pairs(1)})
    reasons = {"s.tar/mute": "^no caption$", "s.tar/lost": "^no image$"}
    reasons |= {name: reason for name, (_, _, reason) in bad.items()}
    # Epoch after epoch the same ones; each counts once. mute.png counts from the start.
    dataset = Images(tmp_path, 64, 1, 0)
    loader = Loader(dataset, 1)
    assert loader.bad == 1 and "1 images without a caption (mute.png)" in dataset.lines[1]
    assert names(islice(loader, 3)) == ["s.tar/001"] * 3
    assert loader.problems.keys() == reasons.keys() and loader.bad == len(reasons) + 1 == 19
    assert all(re.search(reasons[name], reason) for name, reason in loader.problems.items())
    assert loader.left_out == {
        "images without a caption": 2, "captions without an image": 1,
        "images that cannot be read": 8, "captions that cannot be read": 8,
    }  # fmt: skip
    # Of each reason the first five.
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 + 1 + 5 + 5
    assert set(lines) <= {f"skipped {name}: {why}" for name, why in loader.problems.items()}


def test_shards_that_are_cut_off_or_compressed(tmp_path):
    whole = (write(tmp_path, {"whole.tar": pairs(0, 1, 2)}) / "whole.tar").read_bytes()
    # The last text is cut off; a header; only the block of zeros; a header is overwritten.
    write(tmp_path, {
        "text.tar": whole[: 11 * 512 + 2], "head.tar": whole[: 8 * 512 + 99],
        "end.tar": whole[: 12 * 512], "junk.tar": whole[: 4 * 512] + b"j" * 512 + whole[5 * 512 :],
        "none.tar": "", "zip.tar": gzip.compress(whole),
    })  # fmt: skip
    rows, loader = one_pass(tmp_path)
    good = {"whole": 3, "text": 2, "head": 2, "end": 3, "junk": 1}
    assert rows.keys() == {f"{k}.tar/00{i}" for k, n in good.items() for i in range(n)}
    bad = {"zip.tar", "text.tar", "head.tar", "end.tar", "junk.tar", "none.tar", "text.tar/002"}
    assert loader.problems.keys() == bad
    assert loader.problems["text.tar/002"] == "its caption is cut off"
    assert loader.problems["head.tar"] == "no complete, uncompressed tar: breaks off in the middle"


@pytest.mark.parametrize("workers", [1, 2])
def test_what_ends_a_run(tmp_path, workers):
    def refused(loader, words):
        with pytest.raises(ValueError) as problem:
            next(loader)
        assert re.fullmatch(words, str(problem.value))

    files = {f"bad/{i}.{kind}": "?" for i in range(6) for kind in ("png", "txt")}
    bad = Images(write(tmp_path, files) / "bad", 4, 2, 0)
    first = r"the first(| problem): \d.png: cannot identify image file"
    many = r" broken examples or shards in \S+/bad, more than --max-bad allows; "
    refused(Loader(bad, workers, max_bad=3), "4" + many + first)
    counted = r"left out: 6 images that cannot be read \((\d.png, ){5}..\); "
    refused(Loader(bad, workers), r"no usable example in \S+/bad; " + counted + first)
    mute = Images(write(tmp_path / "mute", pairs(1) | {"a.png": "?", "b.png": "?"}), 4, 2, 0)
    with pytest.raises(ValueError, match=r"2 broken .*; the first: 2 images without a caption"):
        Loader(mute, workers, max_bad=1)
    with pytest.raises(ValueError, match=r"none does not exist$"):
        Images(tmp_path / "none", 4, 2, 0)
    with pytest.raises(ValueError, match=r"text holds neither images with .* nor .tar files; "):
        Images(write(tmp_path / "text", {"a.txt": "x"}), 4, 2, 0)


@pytest.mark.parametrize("world", [1, 2, 3, 6, 7, 13])
def test_ranks_share_out_every_epoch_exactly_once(mixed, world):
    orders = []
    for seed, epoch in ((3, 0), (3, 1), (4, 0)):
        shares = []
        for rank in range(world):
            sources = Images(mixed, 4, 2, seed, rank, world).sources(epoch, {})
            shares.append([source.name for source in sources])
        orders.append([name for share in shares for name in share])
        assert sorted(orders[-1]) == sorted([*GOOD, "sub/b.tar/bad"])
        # Two shards and three images: with enough files each stays with one rank.
        of_a = sum(any(name.startswith("a.tar") for name in share) for share in shares)
        assert of_a == 1 if world <= 5 else of_a > 1
    assert len({tuple(order) for order in orders}) == 3 and sorted(orders[0]) != orders[0]


def test_a_shard_is_shuffled_through_a_buffer(mixed, monkeypatch):
    dataset, orders = Images(mixed / "a.tar", 4, 2, 0), set()
    for size in (3, 10_000):
        monkeypatch.setattr(images, "SHUFFLE_BUFFER", size)
        for epoch in range(50):
            order = [int(source.name[-1]) for source in dataset.sources(epoch, {})]
            assert sorted(order) == [0, 1, 2, 3, 4]
            assert all(e < place + size for place, e in enumerate(order))
            orders.add((size, *order))
    # Fifty draws of each: first from 54 orders, then from 120.
    assert sum(size == 3 for size, *_ in orders) > 25 and len(orders) > 60


def test_ranks_together_make_one_pass_with_the_same_crops(mixed):
    batches = list(Loader(Images(mixed, 4, 2, 0, once=True), 1))
    assert names(batches) == GOOD and [len(b["names"]) for b in batches] == [2, 2, 2, 2, 2, 1]
    for world, workers in ((1, 2), (2, 1), (3, 2)):
        ranks = (Images(mixed, 4, 2, 0, rank, world, once=True) for rank in range(world))
        split = [batch for rank in ranks for batch in Loader(rank, workers)]
        assert sorted(names(split)) == GOOD
        rows, others = by_name(batches), by_name(split)
        assert all(same(rows[name], others[name]) for name in GOOD)


def test_endless_batches_are_full_and_every_epoch_is_whole(mixed, capsys):
    state = torch.get_rng_state()
    batches = list(islice(Loader(Images(mixed, 4, 4, 0), 1), 11))
    epochs = [names(batches)[i : i + 11] for i in range(0, 44, 11)]
    assert all(b["images"].shape == (4, 3, 4, 4) and b["images"].is_contiguous() for b in batches)
    assert all(sorted(epoch) == GOOD for epoch in epochs) and len({*map(tuple, epochs)}) == 4
    assert capsys.readouterr().err.count("skipped") == 1
    # Training draws its noise from there.
    assert torch.equal(torch.get_rng_state(), state)


def check_resume(make, workers, points, steps=9):
    """A stream goes on at each of these points as it does without a break."""
    loader = Loader(make(), workers)
    batches, positions = [], [loader.position]
    for batch in islice(loader, steps):
        batches.append(batch)
        positions.append(json.loads(json.dumps(loader.position)))
    for point in points:
        again = Loader(make(), workers, position=positions[point])
        assert all(map(same, batches[point:], islice(again, len(batches) - point)))
        assert again.position == positions[-1] and len(batches) >= point
    return batches


@pytest.mark.parametrize(("workers", "points"), [(1, (0, 1, 2, 3, 5, 8)), (2, (1, 4, 7))])
def test_a_resumed_stream_goes_on_bit_for_bit(mixed, workers, points):
    batches = check_resume(lambda: Images(mixed, 4, 3, 0, rank=1, world=2), workers, points)
    # 27 examples of an epoch's 5 or 6, and in the same order whatever decodes them.
    other = islice(Loader(Images(mixed, 4, 3, 0, rank=1, world=2), 5), 9)
    assert all(map(same, batches, other))
    assert len(names(batches)) == 27 and not same(batches[0], batches[2])


def test_a_single_pass_resumes_even_behind_its_end(mixed):
    batches = check_resume(lambda: Images(mixed, 4, 1, 0, once=True), 2, (3, 8, 10, 11), steps=99)
    assert sorted(names(batches)) == GOOD


def test_positions_of_another_stream_are_refused(mixed):
    position = Loader(Images(mixed, 4, 2, 0, 0, 2), 2).position
    base = {"seed": 0, "rank": 0, "world": 2}
    for key, value in {"seed": 1, "rank": 1, "world": 3}.items():
        dataset = Images(mixed, 4, 2, **base | {key: value})
        with pytest.raises(ValueError, match=f"read its data with {key} {position[key]}, not "):
            Loader(dataset, 2, position=position)


CHANGES = {
    "file names 5 .*, not 6 ": pairs(0, where="more/"),
    "image sizes .* bytes .*, not ": {"loose/008.png": encoded(noise(7, 9, 3))},
    "captions ": {"loose/008.txt": "?" * 9}, "tars ": {"a.tar": pairs(0, 1, 2, 3, 5)},
}  # fmt: skip


def test_data_is_known_by_its_content_wherever_it_lies(mixed, tmp_path):
    position = Loader(Images(mixed, 4, 2, 0), 2).position
    rows = by_name(islice(Loader(Images(mixed, 4, 2, 0), 2), 9))
    moved = shutil.copytree(mixed, tmp_path / "moved", copy_function=shutil.copyfile)
    write(moved, {"README.md": "not read"})
    (tmp_path / "link").symlink_to(moved)
    for path in (moved, tmp_path / "link"):
        others = by_name(islice(Loader(Images(path, 4, 2, 0), 1, position=position), 9))
        assert rows.keys() == others.keys() and all(same(rows[n], others[n]) for n in rows)
    for i, (words, change) in enumerate(CHANGES.items()):
        path = write(shutil.copytree(mixed, tmp_path / str(i)), change)
        with pytest.raises(ValueError, match=f"read its data with {words}.*: go on with the same"):
            Loader(Images(path, 4, 2, 0), 2, position=position)


# ------------------------------------------------------------------------------------- few examples


def few(folder, good: int, broken: int, kind: str) -> Path:
    """So many images that can be read and that cannot: loose, in a tar, or each in its own."""
    files = pairs(*range(good + broken))
    files |= {f"{i:03}.png": "no" for i in range(good, good + broken)}
    if kind == "tars":
        files = {f"{i:03}.tar": {n: files[n] for n in files if n.startswith(f"{i:03}")}
                 for i in range(good + broken)}  # fmt: skip
    return write(folder, {"all.tar": files} if kind == "tar" else files)


def numbers(batches) -> set[int]:
    return {int(re.search(r"\d+(?!.*/)", name)[0]) for name in names(batches)}


@pytest.mark.parametrize("kind", ["loose", "tar", "tars"])
@pytest.mark.parametrize(("good", "broken"), [(1, 0), (2, 0), (3, 0), (8, 0), (1, 1), (1, 7)])
def test_any_number_of_images_from_one_on_trains(tmp_path, good, broken, kind):
    path = few(tmp_path, good, broken, kind)
    for world, workers in ((1, 1), (1, 4), (8, 1), (8, 4)):
        for rank in range(world):
            batches = list(islice(Loader(Images(path, 4, 3, 0, rank, world), workers), 3 * good))
            assert numbers(batches) == set(range(good)) and len(names(batches)) == 9 * good


@pytest.mark.parametrize("kind", ["loose", "tar", "tars"])
@pytest.mark.parametrize(("n", "world"), [(1, 3), (3, 8), (11, 4)])
def test_each_rank_meets_every_example_once_in_as_many_epochs_as_ranks(tmp_path, n, world, kind):
    path, epochs = few(tmp_path, n, 0, kind), {}
    for rank in range(world):
        for block in range(3):
            seen = []
            for entry in Images(path, 4, 1, 0, rank, world).walk(block * world, 0):
                if entry.epoch == (block + 1) * world:
                    break
                if entry.source is not None:
                    seen.append(entry.source.name)
                    epochs.setdefault(entry.epoch, []).append(entry.source.name)
            assert len(seen) == len(set(seen)) == n
    # And all ranks together see each once in every epoch, in another order in every block.
    assert len(epochs) == 3 * world
    assert all(len(epoch) == len(set(epoch)) == n for epoch in epochs.values())
    assert n < 4 or len({tuple(epoch) for epoch in epochs.values()}) == 3 * world


def test_few_images_resume_bit_for_bit(tmp_path):
    path = few(tmp_path, 2, 1, "loose")
    check_resume(lambda: Images(path, 4, 3, 0, rank=5, world=8), 4, (0, 1, 2, 5), steps=6)


@pytest.mark.parametrize("kind", ["loose", "tar", "tars"])
@pytest.mark.parametrize("world", [1, 4, 16])
def test_ranks_count_each_broken_example_once_and_go_on_counting(tmp_path, world, kind):
    path = few(tmp_path / "in", 3, 5, kind)
    whole = write(tmp_path / "tar", {"cut.tar": pairs(90)}) / "cut.tar"
    write(path, {"cut.tar": whole.read_bytes()[:-9000], "mute.png": "?", "a.md": "x"})
    expected = {"images that cannot be read": 5, ".tar files that are broken or hold no image": 1,
                "images without a caption": 2, ".md files": 1}  # fmt: skip
    totals, bad = Counter(), 0
    for rank in range(world):
        loader = Loader(Images(path, 4, 1, 0, rank, world), 2)
        while loader.position["epoch"] <= world:
            next(loader)
            # Begin anew, in the middle of the epoch that counts too.
            position = json.loads(json.dumps(loader.position))
            loader = Loader(Images(path, 4, 1, 0, rank, world), 1, position=position)
        totals.update(loader.left_out)
        bad += loader.bad
    assert totals == expected and bad == 8


def test_without_a_usable_example_every_rank_ends(tmp_path):
    path = few(tmp_path, 0, 3, "tar")
    for rank in range(8):
        with pytest.raises(ValueError, match=r"no usable .*: 3 images that cannot be read "):
            next(Loader(Images(path, 4, 1, 0, rank, 8), 2))


# -------------------------------------------------------------------------------------- in training


@pytest.mark.parametrize("read", [1, 9])
def test_threads_leave_signals_to_the_loop_and_end_with_the_process(mixed, read):
    script = f"""if True:
        import os, signal
        from training.distributed import GracefulExit
        from training.images import Images
        from training.streams import Loader
        loader = Loader(Images({str(mixed)!r}, 4, 2, 0), 2)
        with GracefulExit() as stop:
            next(loader)
            os.kill(os.getpid(), signal.SIGTERM)
            print(stop.signal, sum(len(next(loader)["names"]) for _ in range({read})))
        raise ValueError("over")"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, timeout=60)
    assert (done.stdout.decode(), done.returncode) == (f"15 {2 * read}\n", 1), done.stderr
    # A thread may still report a bad example after it.
    assert b"ValueError: over" in done.stderr.splitlines()


def test_pinning_threads_use_the_gpu_of_this_process(mixed, monkeypatch):
    calls = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    monkeypatch.setattr("torch.cuda.set_device", lambda i: calls.append((i, get_ident())))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: (calls.append(get_ident()), x)[1])
    next(Loader(Images(mixed, 4, 2, 0), 1))
    gpu, thread = calls.pop(0)
    assert gpu == 3 and set(calls) == {thread} and thread != get_ident()


# -------------------------------------------------------------------------------------------- cache


def encode(batch) -> dict:
    """Stands in for the VAE and the text encoders."""
    pooled = torch.tensor([[float(len(text))] for text in batch["captions"]])
    prompt_embeds = pooled[:, None].expand(-1, 7, 5).half()
    latents = batch["images"].to(memory_format=torch.channels_last)[:, :, ::2]
    cond = {"prompt_embeds": prompt_embeds, "pooled": pooled, "time_ids": batch["time_ids"]}
    return {"latents": latents, **cond}


def filled(folder, source, encode=encode, workers=1, world=1, **settings) -> Path:
    # Rank 0 last: it counts what the others have written.
    for rank in reversed(range(world)):
        loader = Loader(Images(source, 4, 2, 0, rank, world, once=True), workers)
        fill(folder, loader, encode, {"resolution": 4} | settings, rank, world, lambda: None)
    return folder


def shards_of(folder) -> dict:
    contents = {path.name: read_shard(path) for path in sorted(folder.glob("*.safetensors"))}
    return {name: tensors | metadata for name, (tensors, metadata) in contents.items()}


def check_rows(batches, source):
    """Each row is what encode returns for the example of its name."""
    examples = one_pass(source)[0]
    for name, row in by_name(batches).items():
        length = 1 + int(re.search(r"\d+", name)[0])
        cond = {
            "prompt_embeds": torch.full((7, 5), length, dtype=torch.float16),
            "pooled": torch.tensor([length * 1.0]), "time_ids": examples[name]["time_ids"],
        }  # fmt: skip
        latents = examples[name]["images"][:, ::2]
        assert same(row, {"latents": latents, "names": name, **cond})
        assert row["prompt_embeds"].dtype == torch.float16 and row["time_ids"].dtype == torch.int64


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(cache, "ROWS_PER_SHARD", 3)


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (2, 2)])
def test_a_cache_holds_what_encode_returned(mixed, tmp_path, world, workers):
    folder = filled(tmp_path / "cache", mixed, workers=workers, world=world)
    shards, index = shards_of(folder), json.loads((folder / "index.json").read_text())
    assert index["settings"] == {"resolution": 4, "version": 3}
    assert index["shards"] == {name: len(shard["names"]) for name, shard in shards.items()}
    assert world > 1 or list(index["shards"].values()) == [4, 4, 3]
    rows = [{k: s[k] for k in s.keys() - {"position", "settings"}} for s in shards.values()]
    check_rows(rows, mixed)
    assert sorted(names(rows)) == GOOD and is_full(folder, {"resolution": 4})
    filled(folder, mixed, encode=None)  # which would fail if it were called


@pytest.mark.parametrize("workers", [1, 2])
def test_a_cache_that_was_stopped_goes_on_behind_its_last_shard(mixed, tmp_path, workers):
    calls, cut = [], tmp_path / "cut"

    def failing(batch):
        calls.append(batch["names"])
        if len(calls) == 6:
            raise RuntimeError("killed")
        return encode(batch)

    with pytest.raises(RuntimeError):
        filled(cut, mixed, failing, workers)
    assert not is_full(cut, {"resolution": 4}) and len(shards_of(cut)) == 2
    with pytest.raises(ValueError, match=r"made with resolution 4, not 8; name another --cache"):
        filled(cut, mixed, resolution=8)
    write(cut, {"rank00000-00002.safetensors.part": "half"})
    filled(cut, mixed, failing, workers)
    # Two shards are four batches: the fifth and the sixth are made again.
    assert calls[6:] == calls[4:6]
    indices = [json.loads((filled(tmp_path / f, mixed, workers=workers) / "index.json").read_text())
               for f in ("whole", "cut")]  # fmt: skip
    assert indices[0] == indices[1] and indices[0]["left_out"] == BROKEN
    whole, cut = (shards_of(tmp_path / f) for f in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(same(whole[name], cut[name]) for name in whole)
    with pytest.raises(ValueError, match=r"cut was made with resolution 4, not \[8\]; name"):
        is_full(tmp_path / "cut", {"resolution": (8,)})


def test_of_two_runs_that_fill_one_cache_one_stops(mixed, tmp_path):
    """The second begins while the first encodes, in other batches: each example is there once."""
    folder, begun = tmp_path / "cache", []

    def interrupted(batch):
        if not begun:
            begun.append(True)
            loader = Loader(Images(mixed, 4, 3, 0, once=True), 1)
            fill(folder, loader, encode, {"resolution": 4}, 0, 1, lambda: None)
        return encode(batch)

    message = rf"another run is filling {folder}: this one stops; start it again when"
    with pytest.raises(ValueError, match=message):
        filled(folder, mixed, interrupted)
    rows = [{k: s[k] for k in s.keys() - {"position", "settings"}}
            for s in shards_of(folder).values()]  # fmt: skip
    check_rows(rows, mixed)
    assert sorted(names(rows)) == GOOD and is_full(folder, {"resolution": 4})


def test_a_rank_that_was_done_when_others_were_stopped_counts_nothing_twice(tmp_path):
    """The last tar is broken, so its entry comes behind the last example; no index is written."""
    source = write(tmp_path / "in", {"a.tar": pairs(0, 1, 2), "b.tar": "no"})
    folder = filled(tmp_path / "cache", source)
    whole = (folder / "index.json").read_bytes()
    (folder / "index.json").unlink()
    # Left behind by a run of more processes, which came no further.
    shutil.copy(folder / "rank00000-00000.safetensors", folder / "rank00001-00000.safetensors")
    filled(folder, source, encode=None)
    assert (folder / "index.json").read_bytes() == whole
    assert json.loads(whole)["left_out"] == {".tar files that are broken or hold no image": 1}


def test_caches_of_nothing_and_shards_that_are_not_whole(mixed, tmp_path):
    counted = r"no usable example in \S+bad; left out: 1 images that cannot be read"
    with pytest.raises(ValueError, match=counted):
        filled(tmp_path / "none", write(tmp_path / "bad", {"a.png": "no", "a.txt": "x"}))
    folder, name = filled(tmp_path / "cache", mixed), "rank00000-00001.safetensors"
    index, whole = json.loads((folder / "index.json").read_text()), (folder / name).read_bytes()
    index["shards"][name] = 5
    for words, file, content in [
        ("holds 4 rows, not 5", "index.json", json.dumps(index)),
        ("is no whole safetensors file", name, whole[:-1]),
    ]:
        with pytest.raises(ValueError, match=f"{name} {words}"):
            Cached(write(folder, {file: content}), 2, 0)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        Cached(folder, 2, 0)


@pytest.mark.parametrize(("world", "workers", "b"), [(1, 1, 1), (11, 1, 3), (1, 2, 1), (3, 1, 11)])
def test_cached_rows_come_once_an_epoch_as_they_were_written(mixed, tmp_path, world, workers, b):
    folder = filled(tmp_path / "cache", mixed)
    loaders = [Loader(Cached(folder, b, 7, rank, world), workers) for rank in range(world)]
    rounds = [[next(loader) for loader in loaders] for _ in range(33 // world)]
    check_rows([batch for each in rounds for batch in each], mixed)
    # Ranks take turns, example by example.
    order = [batch["names"][i] for each in rounds for i in range(b) for batch in each]
    epochs = [order[i : i + 11] for i in range(0, len(order) // 11 * 11, 11)]
    assert len(epochs) >= 3 and all(sorted(epoch) == GOOD for epoch in epochs)
    assert len({*map(tuple, epochs)}) == len(epochs)


def test_a_cached_stream_resumes_even_with_more_ranks_than_rows(mixed, tmp_path):
    folder = filled(tmp_path / "cache", mixed)
    for workers in (1, 2):
        check_resume(lambda: Cached(folder, 5, 0, rank=20, world=21), workers, (1, 4))
    orders = [names(islice(Loader(Cached(folder, 11, seed), 1), 1)) for seed in range(2)]
    assert orders[0] != orders[1]


def test_caches_of_another_version_are_refused(mixed, tmp_path):
    folder = filled(tmp_path / "cache", mixed)
    index = json.loads((folder / "index.json").read_text())
    for settings, version in (({"resolution": 4}, 1), ({"resolution": 4, "version": 2}, 2)):
        write(folder, {"index.json": json.dumps({**index, "settings": settings})})
        with pytest.raises(ValueError, match=rf"made with version {version}, not 3; name another"):
            is_full(folder, {"resolution": 4})


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (3, 2)])
def test_a_cache_records_how_many_were_left_out(tmp_path, capsys, world, workers):
    """40 images of which 32 are broken, tiny ones, and a tar that breaks off."""
    files = pairs(*range(42))
    files |= {f"{i:03}.png": "no" for i in range(32)}
    files |= {"041.png": encoded(noise(3, 90, 3)), "040.png": encoded(noise(90, 3, 3))}
    files["039.png"] = encoded(noise(4, 90, 3))  # just large enough
    whole = write(tmp_path / "tar", {"a.tar": pairs(50, 51)}) / "a.tar"
    source = write(tmp_path / "in", files | {"b.tar": whole.read_bytes()[:3000]})
    for rank in reversed(range(world)):
        images = Images(source, 4, 2, 0, rank, world, once=True, min_size=4)
        loader = Loader(images, workers, max_bad=34)
        fill(tmp_path / "cache", loader, encode, {}, rank, world, lambda: None)
    left_out = json.loads((tmp_path / "cache" / "index.json").read_text())["left_out"]
    assert left_out == {
        "images that cannot be read": 32, "images smaller than --min-size": 2,
        ".tar files that are broken or hold no image": 1, "images without a caption": 1,
    }  # fmt: skip
    cached = Cached(tmp_path / "cache", 2, 0)
    (line,) = cached.lines
    assert line.startswith(f"{tmp_path / 'cache'}: 9 encoded images; left out: ")
    assert "32 images that cannot be read" in line and Loader(cached, 1).left_out == left_out
    assert "041.png: 90 x 3 is smaller than --min-size 4" in capsys.readouterr().err


def test_latents_that_are_not_finite_are_left_out_and_counted(mixed, tmp_path, capsys):
    def overflowing(batch):
        tensors = encode(batch)
        for i, name in enumerate(batch["names"]):
            if name in ("a.tar/003", "loose/010.png"):
                tensors["latents"][i, 0, 0, 0] = np.inf
        return tensors

    folder = filled(tmp_path / "cache", mixed, overflowing)
    left_out = json.loads((folder / "index.json").read_text())["left_out"]
    assert left_out == BROKEN | {"images whose latents are not finite": 2}
    rows = by_name(islice(Loader(Cached(folder, 3, 0), 1), 9))
    assert sorted(rows) == sorted({*GOOD} - {"a.tar/003", "loose/010.png"})
    assert "skipped a.tar/003: its latents are not finite" in capsys.readouterr().err
    # Where a stopped rank goes on it adds to the counts of its last shard.
    (folder / "index.json").unlink()
    filled(folder, mixed, encode=None)
    assert json.loads((folder / "index.json").read_text())["left_out"] == left_out
    loader = Loader(Images(mixed, 4, 2, 0, once=True), 1, max_bad=sum(BROKEN.values()) + 1)
    with pytest.raises(ValueError, match=r"^2 images whose .*/003, loose/010.png\), with other"):
        fill(tmp_path / "few", loader, overflowing, {}, 0, 1, lambda: None)


@pytest.mark.parametrize(("key", "value"), [("latents", np.nan), ("pooled", np.inf)])
def test_a_shard_with_a_number_that_is_not_finite_is_refused(mixed, tmp_path, key, value):
    folder = filled(tmp_path / "cache", mixed)
    path = folder / "rank00000-00001.safetensors"
    tensors, metadata = files.read_tensors(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors[key].view(-1)[-1] = value
    files.write_tensors(path, tensors, **metadata)
    name = json.loads(metadata["names"])[-1]
    with pytest.raises(ValueError, match=f"{path.name} is damaged: {key} of {name} is not"):
        list(islice(Loader(Cached(folder, 1, 0), 2), 11))


@pytest.mark.parametrize("change", [
    {"shards": []}, {"shards": {}}, {"shards": {"rank00000-00000.safetensors": "4"}},
    {"shards": None}, {"left_out": 3}, {"left_out": {"x": -1}}, {"settings": 5},
])  # fmt: skip
def test_an_index_that_is_none_is_one_line(mixed, tmp_path, change):
    folder = filled(tmp_path / "cache", mixed)
    index = json.loads((folder / "index.json").read_text())
    write(folder, {"index.json": json.dumps(index | change)})
    with pytest.raises(ValueError, match=r"no index of a cache|no cache of this"):
        assert is_full(folder, {"resolution": 4}) and Cached(folder, 2, 0)


@pytest.mark.parametrize("damage", [
    {"position": {"epoch": 0}}, {"position": {"epoch": "0", "drawn": 1, "left_out": {}}},
    {"position": [1]}, {"position": {"epoch": 0, "drawn": 1, "left_out": {"x": None}}},
    {"names": 4}, {"names": ["a"]}, {"names": [1, 2, 3, 4]}, {"settings": "x"},
])  # fmt: skip
def test_a_shard_with_other_metadata_is_one_line(mixed, tmp_path, damage):
    folder = filled(tmp_path / "cache", mixed)
    (folder / "index.json").unlink()
    for path in folder.glob("*.safetensors"):
        tensors, metadata = files.read_tensors(path)
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        metadata |= {key: json.dumps(value) for key, value in damage.items()}
        files.write_tensors(path, tensors, **metadata)
    with pytest.raises(ValueError, match=r"damaged, or of|is no shard of a cache|no cache of"):
        filled(folder, mixed)


# -------------------------------------------------------------------------------- from the settings


class Model:
    """Stands in for SDXL: its place, and a tokenizer with room for a single word."""

    def __init__(self):
        self.tokenizer = self

    def tail(self, text):
        return text.partition(" ")[2]

    def to(self, device):
        return self


@pytest.fixture
def config(mixed, tmp_path, monkeypatch):
    def encode_batch(model, batch, generator, device):
        tensors = encode(batch)
        return tensors.pop("latents"), tensors

    monkeypatch.setattr(data, "encode_batch", encode_batch)
    return data.DataConfig(
        mixed, is_prompts=False, cache=tmp_path / "cache", settings={"vae": "1"}, resolution=4,
        min_size=1, batch_size=2, seed=0, workers=1, max_bad=5,
    )  # fmt: skip


def opened(config) -> Loader:
    return data.open_data(config, Model(), 0, 1, "cpu", None)


def test_batches_of_a_cache_have_noise_of_their_own(config, tmp_path, monkeypatch):
    """And the same again in a cache that is filled anew."""
    seeds, encode_batch = [], data.encode_batch

    def spy(model, batch, generator, device):
        seeds.append(generator.initial_seed())
        return encode_batch(model, batch, generator, device)

    monkeypatch.setattr(data, "encode_batch", spy)
    for name in ("cache", "other"):
        opened(dataclasses.replace(config, cache=tmp_path / name))
    assert len({*seeds}) == 6 and seeds == 2 * seeds[:6]


def test_a_cache_is_known_by_the_content_that_it_was_made_of(config, mixed, tmp_path, capsys):
    expected = next(opened(config))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("in: 3 images with captions, 2 .tar files")
    assert lines[1] == "left out: 1 images without a caption (loose/mute.png)"
    cached = f"{config.cache}: 11 encoded images; left out: " + "; ".join(
        f"{number} {reason}" for reason, number in BROKEN.items())  # fmt: skip
    assert lines[2:] == [cached]
    # The same data elsewhere, with the cache elsewhere.
    moved = mixed.rename(tmp_path / "moved")
    cache = config.cache.rename(tmp_path / "elsewhere")
    config = dataclasses.replace(config, data=moved, cache=cache)
    assert same(next(opened(config)), expected) and "11 encoded" in capsys.readouterr().out
    with pytest.raises(ValueError, match="was made with vae 1, not 2; name another --cache"):
        opened(dataclasses.replace(config, settings={"vae": "2"}))
    # A changed caption; then none of the data at all.
    write(moved, {"loose/008.txt": "?" * 9})
    with pytest.raises(ValueError, match=r"was made with captions \w+, not \w+; name another"):
        opened(config)
    for gone in (lambda: shutil.rmtree(moved), moved.mkdir):
        gone()
        assert same(next(opened(config)), expected)
        line = capsys.readouterr().out.splitlines()[0]
        assert str(moved) in line and line.endswith("the run goes on from --cache alone")
        with pytest.raises(ValueError, match="was made with vae 1, not 2"):
            opened(dataclasses.replace(config, settings={"vae": "2"}))
    (cache / "index.json").unlink()
    with pytest.raises(ValueError, match="moved holds neither images"):
        opened(config)


def test_min_size_and_rank_reach_the_data(config, mixed, capsys):
    small = dataclasses.replace(config, cache=None, min_size=7)
    with pytest.raises(ValueError, match=r"no usable example .* 11 images smaller than --min-size"):
        next(opened(small))
    capsys.readouterr()
    data.open_data(dataclasses.replace(config, cache=None), Model(), 1, 2, "cpu", None)
    assert not capsys.readouterr().out


def test_captions_that_are_cut_are_counted_with_a_cache_and_without(tmp_path, config, capsys):
    """Two of three captions have more than the one word that the stub's tokenizer has room for."""
    texts = ("fox", "two owls", "three old trees" + " and more" * 1000)
    files = {f"{i}.txt": text for i, text in enumerate(texts)}
    files |= {f"{i}.png": encoded(noise(6, 9, 3, seed=i)) for i in range(3)}
    config = dataclasses.replace(config, data=write(tmp_path / "few", files))
    for _ in range(2):  # filled, then read
        loader = opened(config)
        next(loader)
        said = capsys.readouterr()
        assert loader.left_out == {"captions cut after 75 tokens": 2}
        assert "2 captions cut after 75 tokens" in said.out
    config = dataclasses.replace(config, cache=None)
    loader = opened(config)
    assert len(names(islice(loader, 6))) == 12  # four epochs
    assert loader.left_out == {"captions cut after 75 tokens": 2} and not loader.bad
    lines = capsys.readouterr().err.splitlines()
    assert "1.png: its caption is cut before 'owls'" in lines
    assert max(map(len, lines)) < 100
    # Millions of them would not fit in memory.
    assert not loader.problems
    # Of prompts each rank counts its own, once.
    prompts = (
        write(tmp_path, {"prompts.txt": "a\ntwo words\nb\nc\nthree more words"}) / "prompts.txt"
    )
    config, total = dataclasses.replace(config, data=prompts, is_prompts=True), Counter()
    for rank in range(2):
        loader = data.open_data(config, Model(), rank, 2, "cpu", None)
        assert len(names(islice(loader, 9))) == 18  # more than three epochs
        total += loader.left_out
    assert total == {"captions cut after 75 tokens": 2}
