"""Charts drawn with pillow: a figure, axes in it, lines, bands, dots and densities of points."""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common import files

# Coordinates are pixels of the finished picture, y downwards; Axes alone knows data coordinates.

INK, GREY, FAINT = (38, 40, 48), (120, 124, 134), (228, 230, 234)
CLASS_COLOURS = [(214, 69, 65), (44, 110, 190), (46, 150, 92), (232, 152, 30)]


class Figure:
    """A white picture drawn at SCALE times its size and shrunk when saved: all is anti-aliased."""

    SCALE = 3

    def __init__(self, width: int, height: int):
        self.size = width, height
        self.image = Image.new("RGB", (width * self.SCALE, height * self.SCALE), "white")
        self.pen = ImageDraw.Draw(self.image, "RGBA")

    def text(self, x, y, words: str, size=16, colour=INK, anchor="lm", turned=False) -> None:
        """Words at (x, y), turned left if asked; anchor as in pillow, "l m r" by "t m b"."""
        # The font that comes inside pillow; it has no Greek, so eta is spelt out.
        font = ImageFont.load_default(size * self.SCALE)
        x, y = x * self.SCALE, y * self.SCALE
        if turned:
            # Turned text has no anchor in pillow, only an upper left corner.
            font, anchor = ImageFont.TransposedFont(font, Image.Transpose.ROTATE_90), None
            _, _, width, height = font.getbbox(words)
            x, y = x - width / 2, y - height / 2
        self.pen.text((x, y), words, colour, font, anchor)

    def line(self, points, colour=INK, width=1.5, dash: float | None = None) -> None:
        points = [(x * self.SCALE, y * self.SCALE) for x, y in points]
        for piece in [points] if dash is None else _dashes(points, dash * self.SCALE):
            self.pen.line(piece, colour, max(1, round(width * self.SCALE)), joint="curve")

    def dot(self, x, y, colour=INK, radius=3.0, hollow=False) -> None:
        x, y, r = x * self.SCALE, y * self.SCALE, radius * self.SCALE
        edge = round(1.6 * self.SCALE) if hollow else 0
        self.pen.ellipse((x - r, y - r, x + r, y + r), "white" if hollow else colour, colour, edge)

    def polygon(self, points, colour) -> None:
        self.pen.polygon([(x * self.SCALE, y * self.SCALE) for x, y in points], colour)

    def paste(self, pixels: np.ndarray, x, y, width, height) -> None:
        """An RGB picture (h, w, 3) in uint8, resized to the given box."""
        size = round(width * self.SCALE), round(height * self.SCALE)
        # Bicubic: a histogram's cells should not show as squares.
        picture = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
        self.image.paste(picture, (round(x * self.SCALE), round(y * self.SCALE)))

    def save(self, path: Path) -> None:
        with files.whole(path) as part:
            self.image.resize(self.size, Image.Resampling.LANCZOS).save(part, "PNG")


def _dashes(points, length):
    """Pieces of a path, `length` drawn and `length` left out in turn."""
    x, y = np.array(points).T
    way = np.append(0, np.hypot(np.diff(x), np.diff(y)).cumsum())  # to each corner of the path
    for start in np.arange(0, way[-1], 2 * length):
        # The pattern runs on around corners, and a dash that holds one bends with the path.
        end = min(start + length, way[-1])
        stops = [start, *way[(start < way) & (way < end)], end]
        yield list(zip(np.interp(stops, way, x), np.interp(stops, way, y)))


# Two kinds of picture need axes: curves with ticks, and clouds of points without.
class Axes:
    """A box (x, y, width, height) of a figure with data coordinates, y upwards."""

    def __init__(self, figure: Figure, box, xlim, ylim, log_y=False):
        self.figure, self.box, self.log_y = figure, box, log_y
        self.xlim, self.ylim = xlim, ylim

    def place(self, x, y):
        """Data coordinates to the figure's."""
        left, top, width, height = self.box
        (x0, x1), (y0, y1) = self.xlim, self.ylim
        # A logarithm of zero would be a point at infinity; a tiny number lies far below the box.
        if self.log_y:
            y, y0, y1 = (math.log(max(v, 1e-12)) for v in (y, y0, y1))
        return left + width * (x - x0) / (x1 - x0), top + height * (y1 - y) / (y1 - y0)

    def frame(self, title="", xlabel="", ylabel="", xticks=(), yticks=(), size=14) -> None:
        """Grid lines, tick labels and titles."""
        left, top, width, height = self.box
        for tick in xticks:
            x = self.place(tick, self.ylim[0])[0]
            self.figure.line([(x, top), (x, top + height)], FAINT, 1)
            self.figure.text(x, top + height + size, f"{tick:g}", size, GREY, "mm")
        for tick in yticks:
            y = self.place(self.xlim[0], tick)[1]
            self.figure.line([(left, y), (left + width, y)], FAINT, 1)
            self.figure.text(left - size / 2, y, f"{tick:g}", size, GREY, "rm")
        corners = [(left, top), (left, top + height), (left + width, top + height)]
        self.figure.line(corners, GREY, 1)
        self.figure.text(left, top - size * 1.1, title, size + 3, INK, "lm")
        self.figure.text(left + width / 2, top + height + 2.6 * size, xlabel, size, INK, "mm")
        self.figure.text(left - 3.6 * size, top + height / 2, ylabel, size, INK, turned=True)

    def line(self, x, y, colour=INK, width=2.0, dash=None, dots=0.0) -> None:
        points = [self.place(a, b) for a, b in zip(x, y, strict=True)]
        self.figure.line(points, colour, width, dash)
        for point in points if dots else ():
            self.figure.dot(*point, colour, dots)

    def band(self, x, low, high, colour) -> None:
        """The area between two curves, in a pale shade of the colour."""
        lower, upper = ([self.place(a, b) for a, b in zip(x, y, strict=True)] for y in (low, high))
        self.figure.polygon(lower + upper[::-1], (*colour, 45))

    def density(self, points: np.ndarray, label: np.ndarray) -> None:
        """Points (n, 2) as a smooth cloud, each label in its class colour."""
        width, height = (round(1.5 * side) for side in self.box[2:])
        ink, limits = np.zeros((height, width, 3)), (self.ylim, self.xlim)
        for c, colour in enumerate(CLASS_COLOURS):
            counts, _ = np.histogramdd(points[label == c][:, ::-1], (height, width), limits)
            # Ink saturates: one stray sample shows, and a thousand on one spot are no blot.
            cover = 1 - np.exp(-0.36 * width * _blur(counts, 0.006 * width))
            ink += cover[..., None] * (255 - np.array(colour))
        self.figure.paste((255 - ink.clip(0, 255))[::-1].astype(np.uint8), *self.box)
        left, top, w, h = self.box
        corners = [(left, top), (left + w, top), (left + w, top + h), (left, top + h), (left, top)]
        self.figure.line(corners, FAINT, 1)


def _blur(grid: np.ndarray, radius: float) -> np.ndarray:
    """A Gaussian blur, as a product with a band matrix along each axis."""

    def band(size: int) -> np.ndarray:
        i = np.arange(size)
        return np.exp(-0.5 * ((i[:, None] - i) / radius) ** 2) / (radius * math.sqrt(2 * math.pi))

    return band(len(grid)) @ grid @ band(len(grid[0]))
