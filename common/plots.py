"""Charts drawn with pillow: a figure, axes in it, lines, bands, dots and densities of points."""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common import files

INK, GREY, FAINT = (38, 40, 48), (120, 124, 134), (228, 230, 234)
CLASS_COLOURS = [(214, 69, 65), (44, 110, 190), (46, 150, 92), (232, 152, 30)]

# ----------------------------------------------------------------------------------------- figure
#
# Coordinates are pixels of the finished picture, y downwards; only Axes knows data coordinates.


class Figure:
    """A white picture, drawn at SCALE times its size and shrunk when saved, for smooth edges."""

    SCALE = 3

    def __init__(self, width: int, height: int):
        self.size = width, height
        self.image = Image.new("RGB", (width * self.SCALE, height * self.SCALE), "white")
        self.pen = ImageDraw.Draw(self.image, "RGBA")

    def text(self, x, y, text: str, size=16, colour=INK, anchor="lm", rotated=False) -> None:
        """Text at (x, y), with pillow's anchors, or rotated to read upwards and centred there."""
        # Pillow's built-in font has no Greek, so eta is spelt out.
        font = ImageFont.load_default(size * self.SCALE)
        x, y = x * self.SCALE, y * self.SCALE
        if rotated:
            # Pillow has no anchor for rotated text, which starts at its upper left corner.
            font, anchor = ImageFont.TransposedFont(font, Image.Transpose.ROTATE_90), None
            _, _, width, height = font.getbbox(text)
            x, y = x - width / 2, y - height / 2
        self.pen.text((x, y), text, colour, font, anchor)

    def line(self, points, colour=INK, width=1.5, dash: float | None = None) -> None:
        """A path through points; dash: the length of its dashes and of the gaps."""
        points = self._scaled(points)
        pieces = [points] if dash is None else _dashes(points, dash * self.SCALE)
        for piece in pieces:
            self.pen.line(piece, colour, max(1, round(width * self.SCALE)), joint="curve")

    def dot(self, x, y, colour=INK, radius=3.0, hollow=False) -> None:
        x, y, r = x * self.SCALE, y * self.SCALE, radius * self.SCALE
        fill, width = ("white", round(1.6 * self.SCALE)) if hollow else (colour, 0)
        self.pen.ellipse((x - r, y - r, x + r, y + r), fill, colour, width)

    def polygon(self, points, colour) -> None:
        self.pen.polygon(self._scaled(points), colour)

    def paste(self, pixels: np.ndarray, x, y, width, height) -> None:
        """An RGB picture (h, w, 3) in uint8, resized to the given box."""
        size = round(width * self.SCALE), round(height * self.SCALE)
        # Bicubic: a histogram's cells should not show as squares.
        picture = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
        self.image.paste(picture, (round(x * self.SCALE), round(y * self.SCALE)))

    def save(self, path: Path) -> None:
        with files.atomic_write(path) as part:
            self.image.resize(self.size, Image.Resampling.LANCZOS).save(part, "PNG")

    def _scaled(self, points) -> list[tuple[float, float]]:
        return [(x * self.SCALE, y * self.SCALE) for x, y in points]


def _dashes(points, length: float):
    """Pieces of a path, `length` drawn and `length` left out in turn."""
    x, y = np.array(points).T
    distance = np.append(0, np.hypot(np.diff(x), np.diff(y)).cumsum())  # along the path, to corners
    for start in np.arange(0, distance[-1], 2 * length):
        # The pattern goes on around corners, and a dash with a corner in it bends with the path.
        end = min(start + length, distance[-1])
        stops = [start, *distance[(start < distance) & (distance < end)], end]
        yield list(zip(np.interp(stops, distance, x), np.interp(stops, distance, y)))


# ------------------------------------------------------------------------------------------- axes
#
# Two kinds of picture need axes: curves with ticks, and clouds of points without.


class Axes:
    """A box (x, y, width, height) of a figure with data coordinates, y upwards."""

    def __init__(self, figure: Figure, box, xlim, ylim, log_y=False, log_x=False):
        self.figure, self.box = figure, box
        self.xlim, self.ylim, self.log_x, self.log_y = xlim, ylim, log_x, log_y

    def place(self, x, y):
        """Data coordinates to the figure's."""
        left, top, width, height = self.box
        (x0, x1), (y0, y1) = self.xlim, self.ylim
        # Zero has no logarithm; a tiny number lies far below the box.
        if self.log_y:
            y, y0, y1 = (math.log(max(v, 1e-12)) for v in (y, y0, y1))
        if self.log_x:
            x, x0, x1 = (math.log(max(v, 1e-12)) for v in (x, x0, x1))
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
        self.figure.text(left - 3.6 * size, top + height / 2, ylabel, size, INK, rotated=True)

    def line(self, x, y, colour=INK, width=2.0, dash=None, dots=0.0) -> None:
        """A curve through data points; dots: the radius of a dot at each of them, 0 for none."""
        points = self._places(x, y)
        self.figure.line(points, colour, width, dash)
        if dots:
            for a, b in points:
                self.figure.dot(a, b, colour, dots)

    def band(self, x, low, high, colour) -> None:
        """The area between two curves, in a pale shade of the colour."""
        self.figure.polygon(self._places(x, low) + self._places(x, high)[::-1], (*colour, 45))

    def _places(self, x, y) -> list[tuple[float, float]]:
        return [self.place(a, b) for a, b in zip(x, y, strict=True)]

    def density(self, points: np.ndarray, label: np.ndarray) -> None:
        """Points (n, 2) as a smooth cloud, each label (n,) in its class colour."""
        left, top, w, h = self.box
        columns, rows = round(1.5 * w), round(1.5 * h)
        ink = np.zeros((rows, columns, 3))
        for c, colour in enumerate(CLASS_COLOURS):
            yx = points[label == c][:, ::-1]
            counts, _ = np.histogramdd(yx, (rows, columns), (self.ylim, self.xlim))
            # Ink saturates: one stray sample shows, and a thousand on one spot are no blot.
            cover = 1 - np.exp(-0.36 * columns * _blur(counts, 0.006 * columns))
            ink += cover[..., None] * (255 - np.array(colour))
        self.figure.paste((255 - ink.clip(0, 255))[::-1].astype(np.uint8), left, top, w, h)
        corners = [(left, top), (left + w, top), (left + w, top + h), (left, top + h), (left, top)]
        self.figure.line(corners, FAINT, 1)


def _blur(grid: np.ndarray, radius: float) -> np.ndarray:
    """A Gaussian blur, as a product with a band matrix along each axis."""

    def band(size: int) -> np.ndarray:
        i = np.arange(size)
        return np.exp(-0.5 * ((i[:, None] - i) / radius) ** 2) / (radius * math.sqrt(2 * math.pi))

    return band(len(grid)) @ grid @ band(len(grid[0]))
