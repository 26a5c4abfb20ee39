"""Plots of how one quantity grows with another, as SVG: both axes logarithmic, a power law fitted to each line."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

import numpy as np

WIDTH, HEIGHT = 640, 440
LEFT, RIGHT, TOP, BOTTOM = 80, 24, 44, 64  # margins; a line more at the bottom for each series' caption
CAPTION_LINE = 20
COLOURS = ("#0b62a4", "#c2571a", "#3b7d23", "#7a3b9a")


@dataclass(frozen=True)
class Series:
    """A line of the plot: its name and its points, all positive."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class PowerLaw:
    """y = factor · x^exponent."""

    exponent: float
    factor: float

    def __call__(self, x: float) -> float:
        return self.factor * x**self.exponent


def fit(points: Sequence[tuple[float, float]]) -> PowerLaw:
    """The power law with the least squares of log y.

    Raises:
        ValueError: fewer than two different x, or a number that is not positive.
    """
    if len({x for x, _ in points}) < 2 or any(value <= 0 for point in points for value in point):
        raise ValueError("a power law needs two different x, and positive numbers only")
    log_x, log_y = np.log(np.asarray(points, dtype=float)).T
    exponent, log_factor = np.polyfit(log_x, log_y, 1)
    return PowerLaw(float(exponent), float(np.exp(log_factor)))


def ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from the last one not above `low` to the first not below `high`."""
    candidates = [
        factor * 10.0**power
        for power in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
        for factor in (1, 2, 5)
    ]
    first = max(index for index, value in enumerate(candidates) if value <= low * (1 + 1e-9))
    last = min(index for index, value in enumerate(candidates) if value >= high * (1 - 1e-9))
    return candidates[first : max(last, first + 1) + 1]


@dataclass(frozen=True)
class _Axis:
    """A logarithmic axis, which maps values to pixels of the picture."""

    marks: list[float]
    start_px: float
    end_px: float

    def __call__(self, value: float) -> float:
        share = math.log(value / self.marks[0]) / math.log(self.marks[-1] / self.marks[0])
        return round(self.start_px + share * (self.end_px - self.start_px), 1)


def log_plot(title: str, x_label: str, y_label: str, series: Sequence[Series]) -> str:
    """The SVG: measured points, each series' fit as a dashed line, and the fits' exponents below."""
    xs, ys = zip(*(point for line in series for point in line.points), strict=True)
    height = HEIGHT + CAPTION_LINE * len(series)
    floor = HEIGHT - BOTTOM
    x_axis = _Axis(ticks(min(xs), max(xs)), LEFT, WIDTH - RIGHT)
    y_axis = _Axis(ticks(min(ys), max(ys)), floor, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        _text(WIDTH / 2, 26, title, "middle", 'font-size="16"'),
        *(_line(x_axis(mark), TOP, x_axis(mark), floor, "#ddd") for mark in x_axis.marks),
        *(_line(LEFT, y_axis(mark), WIDTH - RIGHT, y_axis(mark), "#ddd") for mark in y_axis.marks),
        *(_text(x_axis(mark), floor + 18, _number(mark), "middle") for mark in _sparse(x_axis.marks)),
        *(_text(LEFT - 8, y_axis(mark) + 4, _number(mark), "end") for mark in y_axis.marks),
        _text((LEFT + WIDTH - RIGHT) / 2, floor + 42, x_label, "middle"),
        _text(0, 0, y_label, "middle", f'transform="translate(20 {(TOP + floor) / 2}) rotate(-90)"'),
    ]
    for index, line in enumerate(series):
        colour, law = COLOURS[index % len(COLOURS)], fit(line.points)
        first, last = min(x for x, _ in line.points), max(x for x, _ in line.points)
        ends = [(x_axis(x), min(max(y_axis(law(x)), TOP), floor)) for x in (first, last)]
        parts.append(_line(*ends[0], *ends[1], colour, 'stroke-dasharray="6 4"'))
        parts += [f'<circle cx="{x_axis(x)}" cy="{y_axis(y)}" r="4.5" fill="{colour}"/>' for x, y in line.points]
        caption = f"{line.name}: fitted exponent {law.exponent:.2f}"
        parts.append(_text(LEFT, HEIGHT + CAPTION_LINE * index, caption, "start", f'fill="{colour}"'))
    return "\n".join([*parts, "</svg>", ""])


def _sparse(marks: list[float]) -> list[float]:
    """The powers of ten among the ticks if there is no space to label all."""
    return marks if len(marks) <= 8 else [mark for mark in marks if f"{mark:e}".startswith("1.0")]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, more: str = "") -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" {more}/>'


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" {more}>{escape(text)}</text>'
