"""common/pictures.py: pixels as viewers show them, for training images and control images alike."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from common import pictures
from common.pictures import _srgb_transform, open_image, to_rgb
from tests.datasets import encoded, names, noise, on_white, write
from training.images import Images
from training.streams import Loader


def read(content: bytes) -> np.ndarray:
    """What to_rgb makes of a file's bytes, without a note."""
    image, note = to_rgb(Image.open(io.BytesIO(content)))
    assert image.mode == "RGB" and not note
    return np.asarray(image).astype(int)


def near(content: bytes, expected, limit=0) -> bool:
    difference = np.abs(read(content) - np.round(expected))
    return difference.max() <= limit


def repeat(grey) -> np.ndarray:
    return np.repeat(np.asarray(grey)[..., None], 3, 2)


# ------------------------------------------------------------------------------------- transparency


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG2000", "QOI"])
def test_what_is_transparent_shows_white_not_its_hidden_colour(kind):
    pixels, alpha = noise(9, 7, 3), noise(9, 7, 1, seed=1)
    alpha[0], alpha[-1] = 0, 255
    rgba = np.concatenate([pixels, alpha], 2)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    assert near(encoded(rgba, kind, **options), on_white(pixels, alpha), 1)
    assert (read(encoded(rgba, kind, **options))[0] == 255).all()


def test_grey_palettes_and_single_colours_may_be_transparent():
    grey, alpha = noise(8, 8), noise(8, 8, seed=1)
    assert near(encoded(np.stack([grey, alpha], 2)), on_white(repeat(grey), repeat(alpha)), 1)
    index = grey % 4
    colours = np.arange(10, 130, 10).reshape(4, 3)
    palette = Image.fromarray(index).convert("P")
    palette.putpalette(colours.flatten().tolist())
    opacity = np.array([0, 85, 170, 255])
    shades = on_white(colours[index], opacity[index][..., None])
    assert near(encoded(palette, transparency=bytes(opacity.tolist())), shades, 1)
    clear = np.where((index == 2)[..., None], 255, colours[index])
    assert near(encoded(palette, transparency=2), clear)
    assert near(encoded(palette, "GIF", transparency=2), clear)
    # tRNS of PNG: one grey or one colour is clear.
    clear = np.where(repeat(grey) == grey[0, 0], 255, repeat(grey))
    assert near(encoded(grey, transparency=int(grey[0, 0])), clear)
    rgb = np.stack([grey, alpha, grey], 2)
    clear = np.where((rgb == rgb[0, 0]).all(2, keepdims=True), 255, rgb)
    assert near(encoded(rgb, transparency=tuple(rgb[0, 0].tolist())), clear)


def test_premultiplied_pixels_are_blended_once():
    rgba = np.concatenate([noise(8, 8, 3), noise(8, 8, 1, seed=1)], 2)
    rgba[..., 3] |= 128
    image, _ = to_rgb(Image.fromarray(rgba).convert("RGBa"))
    assert np.abs(np.asarray(image) - on_white(rgba[..., :3], rgba[..., 3:])).max() <= 2


# ----------------------------------------------------------------------------------- 16 and 32 bits


def png16(pixels: np.ndarray, colour_type: int, clear=()) -> bytes:
    """A PNG of 16 bits a channel by the format's definition, which pillow does not write."""

    def chunk(kind, data):
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    trns = chunk(b"tRNS", np.array(clear, ">u2").tobytes()) if clear else b""
    parts = (
        chunk(b"IHDR", header) + trns + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + parts


def test_16_bits_give_their_upper_byte_and_their_transparency():
    deep = np.random.default_rng(0).integers(0, 65536, (8, 8, 4))
    high = deep >> 8
    assert near(png16(deep[..., :1], 0), repeat(high[..., 0]))
    assert near(png16(deep[..., :3], 2), high[..., :3])
    alpha = high[..., 3:]
    assert near(png16(deep, 6), on_white(high[..., :3], alpha), 1)
    assert near(png16(deep[..., 2:], 4), on_white(repeat(high[..., 2]), alpha), 1)
    clear = np.where(repeat(deep[..., 0]) == deep[2, 2, 0], 255, repeat(high[..., 0]))
    assert near(png16(deep[..., :1], 0, [deep[2, 2, 0]]), clear)
    shown = np.where((deep == deep[3, 3])[..., :3].all(2, keepdims=True), 255, high[..., :3])
    assert near(png16(deep[..., :3], 2, deep[3, 3, :3].tolist()), shown)
    values = deep[..., 0].astype(np.uint16)
    for kind in ("TIFF", "JPEG2000"):
        assert near(encoded(values, kind), repeat(high[..., 0]))
    pgm = b"P5 8 8 65535\n" + (deep[..., 0] % 256).astype(">u2").tobytes()
    assert near(pgm, np.zeros((8, 8, 3)))


@pytest.mark.parametrize("low, high", [(0.2, 0.9), (-3.0, 40.0), (0.0, 1e6), (500.0, 501.0)])
def test_float_depth_is_scaled_not_cut_off(low, high):
    ramp = np.linspace(low, high, 64, dtype=np.float32).reshape(8, 8)
    # From 0 to 1 is a scale of its own; any other goes from black to white.
    share = ramp if low == 0.2 else np.linspace(0, 1, 64).reshape(8, 8)
    assert near(encoded(ramp, "TIFF"), repeat(255 * share), 1)
    pfm = b"Pf\n8 8\n-1.0\n" + ramp[::-1].tobytes()
    assert near(pfm, repeat(255 * share), 1)


def test_32_bit_integers_and_numbers_that_cannot_be_shown():
    ramp = np.arange(64).reshape(8, 8)
    for values, expected in [
        (4 * ramp, 4 * ramp), (1000 * ramp, 1000 * ramp >> 8), (-100 * ramp, 255 - ramp * 255 / 63),
        (10**6 * ramp, ramp * 255 / 63), (0 * ramp, 0 * ramp), (0 * ramp - 7, 0 * ramp),
    ]:  # fmt: skip
        assert near(encoded(values.astype(np.int32), "TIFF"), repeat(expected), 1)
    for value in (np.nan, np.inf):
        depth = np.where(ramp == 9, value, ramp).astype(np.float32)
        with pytest.raises(ValueError, match="its values are not all finite"):
            read(encoded(depth, "TIFF"))


# ---------------------------------------------------------------------------------- colour profiles


def fixed(*numbers) -> bytes:
    """The s15Fixed16 numbers of an ICC profile."""
    return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)


def icc(space: bytes, tags: dict[bytes, bytes], pcs=b"XYZ ", kind=b"mntr") -> bytes:
    """An ICC profile, version 2, by the specification's layout."""
    header = bytes(4) + struct.pack(">I", 0x02100000) + kind + space + pcs + bytes(12) + b"acsp"
    header = header + bytes(28) + fixed(0.9642, 1, 0.8249)
    table, content = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for tag, data in tags.items():
        table += tag + struct.pack(">II", start + len(content), len(data))
        content += data + bytes(-len(data) % 4)
    body = bytes(4) + header + bytes(124 - len(header)) + table + content
    return struct.pack(">I", len(body)) + body[4:]


def gamma_curve(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))


# Columns are the primaries' XYZ, adapted to D50.
ADOBE = np.array(
    [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]
)
SRGB = np.array(
    [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.7141]]
)


def matrix_profile(matrix, gamma) -> bytes:
    tags = {}
    for i, name in enumerate((b"r", b"g", b"b")):
        tags[name + b"XYZ"] = b"XYZ " + bytes(4) + fixed(*matrix[:, i])
        tags[name + b"TRC"] = gamma_curve(gamma)
    return icc(b"RGB ", tags)


def srgb_bytes(xyz) -> np.ndarray:
    """Values from 0 to 255 of XYZ (.., 3) under D50, by sRGB's definition."""
    linear = (xyz @ np.linalg.inv(SRGB).T).clip(0, 1)
    curve = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return 255 * curve


GAMMA = 563 / 256  # AdobeRGB's 2.19921875


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_adobe_rgb_becomes_srgb(kind):
    rgb = noise(16, 16, 3)
    expected = srgb_bytes((rgb / 255.0) ** GAMMA @ ADOBE.T)
    options = {"icc_profile": matrix_profile(ADOBE, GAMMA)}
    assert np.abs(expected - rgb).max() > 20
    assert near(encoded(rgb, kind, **options), expected, 2)
    alpha = noise(16, 16, 1, seed=1)
    rgba = np.concatenate([rgb, alpha], 2)
    assert near(encoded(rgba, kind, **options), on_white(expected, alpha), 2)
    # A grey picture may have it too.
    grey = noise(16, 16)
    expected = srgb_bytes((repeat(grey) / 255.0) ** GAMMA @ ADOBE.T)
    assert near(encoded(grey, kind, **options), expected, 2)


def test_a_profile_that_changes_little_is_used():
    """sRGB's colours with a plain power for its curve: up to eight levels apart in the shadows."""
    rgb = noise(16, 16, 3) // 8
    expected = srgb_bytes((rgb / 255.0) ** 2.2 @ SRGB.T)
    assert near(encoded(rgb, icc_profile=matrix_profile(SRGB, 2.2)), expected, 2)
    assert 5 < np.abs(expected - rgb).max() < 9


def test_where_a_profile_changes_nothing_pixels_stay_bit_by_bit():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert _srgb_transform(srgb) == ("RGB", None)
    for pixels in (noise(16, 16, 3), noise(16, 16)):
        expected = pixels if pixels.ndim == 3 else repeat(pixels)
        assert near(encoded(pixels, icc_profile=srgb), expected)
        assert near(encoded(pixels, "TIFF", icc_profile=srgb), expected)


def test_grey_and_palette_pictures_have_profiles_too():
    grey = noise(16, 16)
    profile = icc(b"GRAY", {b"kTRC": gamma_curve(1.75)})
    expected = srgb_bytes((repeat(grey) / 255.0) ** 1.75 * [0.9642, 1, 0.8249])
    assert near(encoded(grey, icc_profile=profile), expected, 2)
    la = np.stack([grey, 0 * grey], 2)
    assert (read(encoded(la, icc_profile=profile)) == 255).all()
    deep = (grey.astype(np.uint16) << 8) | 99
    assert near(encoded(deep, icc_profile=profile), expected, 2)
    palette = Image.fromarray(grey % 4).convert("P")
    colours = noise(4, 3, seed=3)
    palette.putpalette(colours.flatten().tolist())
    expected = srgb_bytes((colours[grey % 4] / 255.0) ** GAMMA @ ADOBE.T)
    assert near(encoded(palette, icc_profile=matrix_profile(ADOBE, GAMMA)), expected, 2)


def cmyk_profile(lab_of_cyan) -> bytes:
    """White paper, black where there is K, and this CIELAB colour for full cyan."""
    corners = []
    for c in (0, 1):
        for m in (0, 1):
            for y in (0, 1):
                for k in (0, 1):
                    L, a, b = lab_of_cyan if c and not (m or y) else (100 - 40 * (m + y), 0, 0)
                    corners += [round(0 if k else L * 2.55), 128 + (not k) * a, 128 + (not k) * b]
    ramp = bytes(range(256))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    return icc(b"CMYK", {b"A2B0": lut + 4 * ramp + bytes(corners) + 3 * ramp}, b"Lab ", b"prtr")


def test_cmyk_jpegs_with_and_without_a_profile():
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    assert near(encoded(cyan, "JPEG", quality=100), [[[0, 255, 255]]], 2)
    L, a, b = 60, -20, -30
    # CIELAB's definition, white D50.
    f = np.array([(L + 16) / 116 + a / 500, (L + 16) / 116, (L + 16) / 116 - b / 200])
    expected = srgb_bytes(f**3 * [0.9642, 1, 0.8249])
    assert expected.min() > 20 and expected.max() < 250
    profile = cmyk_profile((L, a, b))
    assert near(encoded(cyan, "JPEG", quality=100, icc_profile=profile), expected, 3)
    white = Image.new("CMYK", (16, 16))
    assert near(encoded(white, "JPEG", quality=100, icc_profile=profile), [[[255] * 3]], 2)


def test_a_profile_that_cannot_be_used_is_ignored_and_counted(tmp_path, capsys):
    rgb, cmyk = noise(16, 16, 3), cmyk_profile((60, 0, 0))
    profiles = {
        "junk": b"no profile", "cut": matrix_profile(ADOBE, 2.2)[:150], "kind": cmyk,
        "grey": icc(b"GRAY", {b"kTRC": gamma_curve(1.0)}),
    }  # fmt: skip
    for name, profile in profiles.items():
        content = encoded(rgb, icc_profile=profile)
        write(tmp_path, {f"{name}.png": content, f"{name}.txt": "x"})
        image, note = to_rgb(Image.open(io.BytesIO(content)))
        assert note.startswith("its colour profile is ignored: ")
        assert np.array_equal(np.asarray(image), rgb)
        assert np.array_equal(np.asarray(open_image(tmp_path / f"{name}.png")), rgb)
        assert f"{name}.png: its colour profile is ignored" in capsys.readouterr().err
    loader = Loader(Images(tmp_path, 16, 4, 0, once=True), 2, max_bad=0)
    batches = list(loader)
    assert len(names(batches)) == 4 and loader.bad == 0
    assert loader.left_out == {"images whose colour profile was ignored": 4}
    pixels = np.round((batches[0]["images"][0].numpy() + 1) * 127.5)
    assert np.array_equal(pixels.transpose(1, 2, 0), rgb)


def test_lab_pictures_are_read():
    lab = ImageCms.createProfile("LAB")
    srgb = ImageCms.createProfile("sRGB")
    colour = Image.new("RGB", (8, 8), (200, 30, 60))
    image = ImageCms.profileToProfile(colour, srgb, lab, outputMode="LAB")
    assert near(encoded(image, "TIFF"), [[[200, 30, 60]]], 3)


# ----------------------------------------------------------------------------------- control images


def test_control_images_are_read_as_training_images_are(tmp_path):
    """Turned, on white, with their profile; what is no picture is an error in one line."""
    rgb, alpha = noise(12, 8, 3), noise(12, 8, 1, seed=1)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown a quarter turn clockwise
    rgba = np.concatenate([rgb, alpha], 2)
    shown = srgb_bytes((rgb / 255.0) ** GAMMA @ ADOBE.T)
    content = encoded(rgba, exif=exif, icc_profile=matrix_profile(ADOBE, GAMMA))
    image = np.asarray(open_image(write(tmp_path, {"a.png": content}) / "a.png"))
    assert np.abs(image - np.rot90(on_white(shown, alpha), -1)).max() <= 3
    for name, content in {"b.png": "no", "c.eps": "%!PS-Adobe-3.0 EPSF-3.0\n"}.items():
        with pytest.raises(ValueError, match=f"{name} is no picture that can be read"):
            open_image(write(tmp_path, {name: content}) / name)
    with pytest.raises(ValueError, match="none is no picture"):
        open_image(tmp_path / "none")


# ---------------------------------------------------------------------------------------- writing


def test_a_grid_has_one_file_open_at_a_time(monkeypatch, capsys, tmp_path):
    paths, opened, open_file = [], [], Image.open
    for i in range(3):
        paths.append(tmp_path / f"{i}.png")
        Image.new("RGB", (4, 2), (i, 0, 0)).save(paths[-1])

    def open_and_count(path):
        assert all(image.fp is None for image in opened)
        opened.append(open_file(path))
        return opened[-1]

    monkeypatch.setattr(Image, "open", open_and_count)
    pictures.write_grid(paths, tmp_path / "grid.png")
    monkeypatch.undo()
    with Image.open(tmp_path / "grid.png") as grid:
        pixels = np.asarray(grid)
    assert len(opened) == 3 and pixels.shape == (4, 8, 3)
    assert [pixels[y, x, 0] for y, x in ((0, 0), (0, 4), (2, 0), (2, 4))] == [0, 1, 2, 255]
    # Pictures in memory, as cifar/sample.py has them, give the same.
    pictures.save_grid([Image.open(path) for path in paths], tmp_path / "other.png")
    assert (tmp_path / "other.png").read_bytes() == (tmp_path / "grid.png").read_bytes()
    monkeypatch.setattr(pictures, "LARGEST_GRID", 2)
    pictures.write_grid(paths, tmp_path / "none.png")
    assert capsys.readouterr().err == "no none.png: 3 pictures, and 2 fit\n"
    assert not (tmp_path / "none.png").exists()
