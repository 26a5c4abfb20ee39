"""The demo's scenes: a shape of one colour on a plain background, drawn from a description, and its caption.

Colours are sRGB, 0 .. 255. Positions are in fractions of the room that the shape leaves free: 0 left or top, 1 right or
bottom.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

# Far enough from each other and from every background that the nearest one is no matter of taste.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 35),
    "orange": (255, 140, 20),
    "yellow": (250, 225, 40),
    "green": (40, 165, 50),
    "cyan": (50, 210, 220),
    "blue": (40, 70, 225),
    "purple": (130, 40, 170),
    "pink": (250, 130, 190),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (246, 246, 246),
    "gray": (135, 135, 135),
    "black": (16, 16, 16),
    "beige": (222, 200, 160),
}
SHAPES = ("circle", "square", "triangle", "star")
POSITIONS: dict[str, tuple[float, float]] = {
    "in the middle": (0.5, 0.5),
    "at the left": (0.0, 0.5),
    "at the right": (1.0, 0.5),
    "at the top": (0.5, 0.0),
    "at the bottom": (0.5, 1.0),
}
_OVERSAMPLING = 4  # drawn so many times larger, then averaged down
_MARGIN = 0.04  # of the shorter side, kept free around the shape


@dataclass(frozen=True)
class Scene:
    """The description of a picture.

    Attributes:
        shape, colour, background, position: names from the tables above.
        radius: radius of the circle around the shape, in units of the picture's shorter side.
        colour_shift, background_shift: added to the table's colours.
    """

    shape: str
    colour: str
    background: str
    position: str
    radius: float = 0.34
    colour_shift: tuple[int, int, int] = (0, 0, 0)
    background_shift: tuple[int, int, int] = (0, 0, 0)

    @property
    def combination(self) -> tuple[str, str, str]:
        """Shape, colour and background; combinations of the three are held out from training."""
        return self.shape, self.colour, self.background

    @property
    def caption(self) -> str:
        """The caption, for example 'a red circle on a gray background, at the left'."""
        article = "an" if self.colour[0] in "aeiou" else "a"
        return f"{article} {self.colour} {self.shape} on a {self.background} background, {self.position}"


def combinations() -> list[tuple[str, str, str]]:
    """Every (shape, colour, background), in the tables' order."""
    return [(shape, colour, background) for shape in SHAPES for colour in COLOURS for background in BACKGROUNDS]


def random_scene(random: np.random.Generator, combination: tuple[str, str, str]) -> Scene:
    """A scene of the combination, with position, size and shades drawn."""
    shape, colour, background = combination
    shifts = random.integers(-8, 9, size=(2, 3)).tolist()
    return Scene(
        shape,
        colour,
        background,
        list(POSITIONS)[random.integers(len(POSITIONS))],
        radius=float(random.uniform(0.29, 0.38)),
        colour_shift=tuple(shifts[0]),
        background_shift=tuple(shifts[1]),
    )


def random_size(random: np.random.Generator, area_side_px: tuple[int, int] = (64, 100)) -> tuple[int, int]:
    """Width and height in px: aspect ratios from about 3:5 to 5:3, every other picture about square."""
    side = random.uniform(*area_side_px)
    ratio = math.exp(random.uniform(-0.52, 0.52)) if random.random() < 0.5 else math.exp(random.uniform(-0.07, 0.07))
    return round(side * ratio**0.5), round(side / ratio**0.5)


def render(scene: Scene, width: int, height: int) -> "Image.Image":
    """The scene as an antialiased RGB picture of the given size in px."""
    from PIL import Image, ImageDraw

    scale = _OVERSAMPLING
    background = _shifted(BACKGROUNDS[scene.background], scene.background_shift)
    image = Image.new("RGB", (width * scale, height * scale), background)
    draw = ImageDraw.Draw(image)
    radius = scene.radius * min(width, height) * scale
    margin = radius + _MARGIN * min(width, height) * scale
    across, down = POSITIONS[scene.position]
    x = margin + across * (width * scale - 2 * margin)
    y = margin + down * (height * scale - 2 * margin)
    fill = _shifted(COLOURS[scene.colour], scene.colour_shift)
    if scene.shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    else:
        draw.polygon(_corners(scene.shape, x, y, radius), fill=fill)
    return image.reduce(scale)


def _corners(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """A polygon around (x, y); the square has the circle's area, so that the size alone does not tell the shape."""
    if shape == "square":
        half = radius * math.sqrt(math.pi) / 2
        return [(x - half, y - half), (x + half, y - half), (x + half, y + half), (x - half, y + half)]
    if shape == "triangle":
        return [(x, y - radius), (x + radius, y + radius * 0.8), (x - radius, y + radius * 0.8)]
    if shape == "star":
        radii = [radius * (1.08 if k % 2 == 0 else 0.5) for k in range(10)]
        return [(x + r * math.sin(math.pi * k / 5), y - r * math.cos(math.pi * k / 5)) for k, r in enumerate(radii)]
    raise ValueError(f"shape {shape!r} is not one of {', '.join(SHAPES)}")


def _shifted(colour: tuple[int, int, int], shift: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, value + by)) for value, by in zip(colour, shift, strict=True))
    return red, green, blue
