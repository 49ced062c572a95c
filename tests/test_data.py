"""training/images.py and cache.py: pixels against numpy, order by counting, resumed runs."""

import gzip
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from itertools import islice
from pathlib import Path
from threading import get_ident

import numpy as np
import pytest
import torch
from PIL import Image

from training import cache, images
from training.cache import Cached, fill, is_full, read_shard
from training.images import Images, Loader

# ---------------------------------------------------------------------------------------- data sets


def noise(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image, kind="PNG", **options) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def write(folder: Path, files: dict) -> Path:
    """Files by name, as bytes or text; a dict of such is a tar."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, dict):
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
            continue
        with tarfile.open(folder / name, "w", format=tarfile.GNU_FORMAT) as tar:
            for member in content:
                tar.add(write(folder / f"{name}.in", {member: content[member]}) / member, member)
            shutil.rmtree(folder / f"{name}.in")
    return folder


def pairs(*numbers, where="") -> dict:
    """Small pictures, wider than high, each with a caption as long as its number, and one more."""
    files = [(f"{where}{i:03}", encoded(noise(6, 9, 3, seed=i)), "." * (i + 1)) for i in numbers]
    return dict(p for k, png, text in files for p in ((f"{k}.png", png), (f"{k}.txt", text)))


@pytest.fixture
def mixed(tmp_path):
    """11 good examples in two shards and three loose files, and two bad ones."""
    b = pairs(5, 6, 7) | {"bad.png": "no", "bad.txt": "x"}
    loose = pairs(8, 9, 10, where="loose/") | {"loose/mute.png": "no"}
    return write(tmp_path / "in", {"a.tar": pairs(0, 1, 2, 3, 4), "sub/b.tar": b} | loose)


GOOD = [f"a.tar/00{i}" for i in range(5)] + [f"loose/{i:03}.png" for i in (8, 9, 10)]
GOOD += [f"sub/b.tar/00{i}" for i in (5, 6, 7)]


def names(batches) -> list[str]:
    return [name for batch in batches for name in batch["names"]]


def by_name(batches) -> dict:
    return {n: {k: v[i] for k, v in b.items()} for b in batches for i, n in enumerate(b["names"])}


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
    three, red = np.repeat(grey[..., None], 3, 2), np.full((8, 8, 3), [255, 0, 0])
    cases = {
        "rgb": (encoded(rgb), rgb), "grey": (encoded(grey), three),
        "alpha": (encoded(np.concatenate([rgb, noise(8, 8, 1, seed=2)], 2)), rgb),
        "deep": (encoded(deep), np.repeat(deep[..., None] >> 8, 3, 2)),
        "palette": (encoded(palette), colours[grey % 4]),
        "see-through": (encoded(palette, transparency=0), colours[grey % 4]),
        "two": (encoded(np.stack([grey, 255 - grey], 2)), three),
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
        assert off(rows[f"{name}.png"], expected) <= (3 if name == "cmyk" else 0), name


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
        "gif.png": (encoded(noise(9, 9), "GIF"), "a", unknown), "huge.png": (huge, "a", "."),
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
    reasons = {"mute.png": "^no caption$", "s.tar/mute": "^no caption$", "s.tar/lost": "^no image$"}
    reasons |= {name: reason for name, (_, _, reason) in bad.items()}
    # Epoch after epoch the same ones; each counts once.
    loader = Loader(Images(tmp_path, 64, 1, 0), 1)
    assert names(islice(loader, 3)) == ["s.tar/001"] * 3
    assert loader.problems.keys() == reasons.keys() and loader.bad == len(reasons) == 19
    assert all(re.search(reasons[name], reason) for name, reason in loader.problems.items())
    said = capsys.readouterr().err.strip().splitlines()
    assert said == [f"skipped {name}: {why}" for name, why in islice(loader.problems.items(), 5)]


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
    many = r" bad examples or shards in \S+/bad, more than --max-bad allows; "
    refused(Loader(bad, workers, max_bad=3), "4" + many + first)
    refused(Loader(bad, workers), r"no usable example in \S+/bad; " + first)
    lonely = Images(write(tmp_path / "one", pairs(1)), 4, 2, 0, rank=1, world=2)
    refused(Loader(lonely, workers), r"no usable example in \S+/one; .*: fewer than 2 examples")
    with pytest.raises(ValueError, match=r"none does not exist$"):
        Images(tmp_path / "none", 4, 2, 0)
    with pytest.raises(ValueError, match=r"text holds neither images nor .tar files$"):
        Images(write(tmp_path / "text", {"a.txt": "x"}), 4, 2, 0)


@pytest.mark.parametrize("world", [1, 2, 3, 6, 7, 13])
def test_ranks_share_out_every_epoch_exactly_once(mixed, world):
    orders = []
    for seed, epoch in ((3, 0), (3, 1), (4, 0)):
        shares = []
        for rank in range(world):
            sources = Images(mixed, 4, 2, seed, rank, world).sources(epoch, {})
            shares.append([name for name, _ in sources])
        orders.append([name for share in shares for name in share])
        assert sorted(orders[-1]) == sorted([*GOOD, "sub/b.tar/bad", "loose/mute.png"])
        # Two shards and four images: with enough files each stays with one rank.
        of_a = sum(any(name.startswith("a.tar") for name in share) for share in shares)
        assert of_a == 1 if world <= 6 else of_a > 1
    assert len({tuple(order) for order in orders}) == 3 and sorted(orders[0]) != orders[0]


def test_a_shard_is_shuffled_through_a_buffer(mixed, monkeypatch):
    dataset, orders = Images(mixed / "a.tar", 4, 2, 0), set()
    for size in (3, 10_000):
        monkeypatch.setattr(images, "SHUFFLE_BUFFER", size)
        for epoch in range(50):
            order = [int(name[-1]) for name, _ in dataset.sources(epoch, {})]
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
    assert capsys.readouterr().err.count("skipped") == 2
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
    base = {"path": mixed, "seed": 0, "rank": 0, "world": 2}
    others = {"path": mixed / "a.tar", "seed": 1, "rank": 1, "world": 3}
    for key, value in others.items():
        dataset = Images(resolution=4, batch_size=2, **base | {key: value})
        with pytest.raises(ValueError, match=f"read its data with {key} {position[key]}, not "):
            Loader(dataset, 2, position=position)


@pytest.mark.parametrize("read", [1, 9])
def test_threads_leave_signals_to_the_loop_and_end_with_the_process(mixed, read):
    script = f"""if True:
        import os, signal
        from training.distributed import GracefulExit
        from training.images import Images, Loader
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
    assert index["settings"] == {"resolution": 4, "version": 2}
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
    whole, cut = (shards_of(filled(tmp_path / f, mixed, workers=workers)) for f in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(same(whole[name], cut[name]) for name in whole)
    with pytest.raises(ValueError, match=r"cut was made with resolution 4, not \[8\]; name"):
        is_full(tmp_path / "cut", {"resolution": (8,)})


def test_caches_of_nothing_and_shards_that_are_not_whole(mixed, tmp_path):
    with pytest.raises(ValueError, match=r"no usable example in \S+bad: 1 are bad"):
        filled(tmp_path / "none", write(tmp_path / "bad", {"a.png": "no"}))
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
    for settings, version in (({"resolution": 4}, 1), ({"resolution": 4, "version": 3}, 3)):
        write(folder, {"index.json": json.dumps({**index, "settings": settings})})
        with pytest.raises(ValueError, match=rf"made with version {version}, not 2; name another"):
            is_full(folder, {"resolution": 4})
