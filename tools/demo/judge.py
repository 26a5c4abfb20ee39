#!/usr/bin/env python
"""Count the sampled pictures that show the colour of their prompt, and draw before and after as one PNG.

    python tools/demo/judge.py --expected=DATA/expected.json --samples=OUT/sample --grid=OUT/grid.png --at_least=12

The names of the trainer's samples tell their sets apart: the newest complete set is judged, and the newest set before
it at step or epoch 0, if there is one, shows the model before training. Exit status: 0 if at least --at_least pictures
are right, 1 if fewer, 2 if something is missing.

A picture is judged as follows: the background is the median colour of its rim; the shape is the region whose colour is
farthest from it; the shape's colour is the palette colour that most of its pixels are nearest to, in sRGB. The palette
has 8 colours, so 2 of 16 are right by chance.
"""

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from library.errors import InputError

_SAMPLE = re.compile(r"(?:^|_)(?P<time>\d{14})_(?P<position>e?\d{6,})_(?P<index>\d{2,})(?:_\d+)?\.png$")
_LEAST_DISTANCE = 40.0  # of the shape's colour from the background's, in sRGB units (0 .. 255)
_LEAST_SHARE = 0.01  # of the picture's pixels that a shape covers


@dataclass(frozen=True)
class Seen:
    """The judge's reading of a picture: names from the palettes; the colour is None if there is no shape."""

    colour: str | None
    background: str


@dataclass(frozen=True)
class SampleSet:
    """The pictures that the trainer sampled at one time, by the prompt's index."""

    time: str
    position: str
    pictures: Mapping[int, Path]

    @property
    def number(self) -> int:
        """The step or epoch of the set."""
        return int(self.position.removeprefix("e"))


def see(image_HWC: np.ndarray, colours: Mapping[str, Sequence[int]], backgrounds: Mapping[str, Sequence[int]]) -> Seen:
    """The colour of the shape and of the background in a picture.

    Args:
        image_HWC: uint8 RGB.
        colours, backgrounds: palettes, name to sRGB.
    """
    pixels_HWC = image_HWC.astype(np.float64)
    height, width = pixels_HWC.shape[:2]
    rim = max(1, min(height, width) // 24)
    inside_HW = np.zeros((height, width), bool)
    inside_HW[rim:-rim, rim:-rim] = True
    background_C = np.median(pixels_HWC[~inside_HW], axis=0)
    distance_HW = np.linalg.norm(pixels_HWC - background_C, axis=2)
    # Most of the way to the farthest pixels (but not the few extreme ones): inside the shape, off its soft edge.
    threshold = max(_LEAST_DISTANCE, 0.6 * float(np.quantile(distance_HW, 0.97)))
    shape_NC = pixels_HWC[distance_HW >= threshold]
    names = list(colours)
    colour = None
    if len(shape_NC) >= _LEAST_SHARE * height * width:
        nearest_N = _nearest(shape_NC, [colours[name] for name in names])
        colour = names[int(np.bincount(nearest_N, minlength=len(names)).argmax())]
    return Seen(colour, list(backgrounds)[int(_nearest(background_C[None], list(backgrounds.values()))[0])])


def _nearest(colours_NC: np.ndarray, palette: Sequence[Sequence[int]]) -> np.ndarray:
    return np.linalg.norm(colours_NC[:, None] - np.array(palette, np.float64)[None], axis=2).argmin(axis=1)


def find_sets(folder: Path, count: int) -> tuple[SampleSet | None, SampleSet]:
    """The pictures before training, if there are any, and after it.

    Args:
        folder: the trainer's OUTPUT_DIR/sample.
        count: number of prompts; a set without a picture for each prompt is ignored.

    Raises:
        InputError: no complete set.
    """
    found: dict[tuple[str, str], dict[int, Path]] = {}
    for path in sorted(folder.glob("*.png")):
        if match := _SAMPLE.search(path.name):
            found.setdefault((match["time"], match["position"]), {})[int(match["index"])] = path
    sets = [SampleSet(*key, pictures) for key, pictures in found.items() if set(range(count)) <= set(pictures)]
    if not sets:
        raise InputError(
            f"--samples {folder}: no complete set of {count} sampled pictures; train with --sample_prompts of the "
            "demo's prompts.txt and sample at the end"
        )
    sets.sort(key=lambda sample_set: (sample_set.time, sample_set.number))
    first = [sample_set for sample_set in sets[:-1] if sample_set.number == 0]
    return (first[-1] if first else None), sets[-1]


def judge(pictures: Mapping[int, Path], expected: Mapping[str, Any]) -> list[Seen]:
    """The judge's reading of each prompt's picture, in the prompts' order."""
    from PIL import Image

    return [
        see(
            np.asarray(Image.open(pictures[prompt["index"]]).convert("RGB")),
            expected["colours"],
            expected["backgrounds"],
        )
        for prompt in expected["prompts"]
    ]


def count_right(seen: Sequence[Seen], expected: Mapping[str, Any], what: str = "colour") -> int:
    """How many pictures show the asked `what`: colour or background."""
    return sum(
        getattr(reading, what) == prompt[what] for reading, prompt in zip(seen, expected["prompts"], strict=True)
    )


def draw_grid(
    path: Path,
    expected: Mapping[str, Any],
    before: Mapping[int, Path] | None,
    after: Mapping[int, Path],
    seen: Sequence[Seen],
) -> None:
    """Write the PNG: for each prompt the pictures before and after training, the prompt below; 4 prompts a row."""
    from PIL import Image, ImageDraw, ImageFont

    side, gap, text_height, columns = 160, 8, 44, 4
    prompts = expected["prompts"]
    cell_width, cell_height = 2 * side + 3 * gap, side + text_height + gap
    rows = -(-len(prompts) // columns)
    grid = Image.new("RGB", (columns * cell_width, rows * cell_height + gap), (255, 255, 255))
    draw = ImageDraw.Draw(grid)
    font = ImageFont.load_default()
    for index, (prompt, shown) in enumerate(zip(prompts, seen, strict=True)):
        left, top = index % columns * cell_width + gap, index // columns * cell_height + gap
        for column, pictures in enumerate((before, after)):
            box = (left + column * (side + gap), top)
            draw.rectangle((*box, box[0] + side - 1, box[1] + side - 1), fill=(230, 230, 235))
            if pictures is None:
                draw.text((box[0] + 6, box[1] + 6), "not sampled", fill=(90, 90, 90), font=font)
                continue
            picture = Image.open(pictures[prompt["index"]]).convert("RGB")
            scale = side / max(picture.size)
            size = (round(picture.width * scale), round(picture.height * scale))
            at = (box[0] + (side - size[0]) // 2, box[1] + (side - size[1]) // 2)
            grid.paste(picture.resize(size, Image.Resampling.NEAREST), at)
        right = shown.colour == prompt["colour"]
        verdict = f"before | after: {shown.colour or 'no shape'}" + ("" if right else "  (wrong)")
        lines = [*textwrap.wrap(prompt["prompt"], 52), verdict]
        for number, line in enumerate(lines):
            last = number == len(lines) - 1
            fill = (20, 20, 20) if not last else (0, 120, 0) if right else (190, 0, 0)
            draw.text((left, top + side + 2 + 13 * number), line, fill=fill, font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path, format="PNG")


def read_expected(path: Path) -> dict[str, Any]:
    """The content of expected.json as make_data.py wrote it.

    Raises:
        InputError: the file is missing or has another content.
    """
    try:
        expected = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--expected {path}: cannot be read: {error}") from error
    if not isinstance(expected, dict) or not {"colours", "backgrounds", "prompts"} <= set(expected):
        raise InputError(f"--expected {path}: is not what tools/demo/make_data.py writes as expected.json")
    return expected


def run(expected_path: Path, samples: Path, grid: Path | None, at_least: int) -> int:
    """Judge, print, draw; returns the exit status 0 or 1."""
    expected = read_expected(expected_path)
    count = len(expected["prompts"])
    before, after = find_sets(samples, count)
    if before is not None:
        right = count_right(judge(before.pictures, expected), expected)
        print(f"before training: {right} of {count} show the colour asked for")
    seen = judge(after.pictures, expected)
    for prompt, reading in zip(expected["prompts"], seen, strict=True):
        mark = "right" if reading.colour == prompt["colour"] else "WRONG"
        print(f"{mark}  {prompt['prompt']}: {reading.colour or 'no shape'} on {reading.background}")
    right = count_right(seen, expected)
    print(f"{count_right(seen, expected, 'background')} of {count} show the background asked for")
    print(f"{right} of {count} show the colour asked for")
    if grid is not None:
        draw_grid(grid, expected, None if before is None else before.pictures, after.pictures, seen)
        print(f"before and after: {grid}")
    if right < at_least:
        print(f"that is fewer than the {at_least} wanted", file=sys.stderr)
        return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    """Judge the pictures of a run."""
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--expected", required=True, type=Path, help="expected.json of make_data.py")
    parser.add_argument("--samples", required=True, type=Path, help="the trainer's OUTPUT_DIR/sample")
    parser.add_argument("--grid", type=Path, help="PNG to write: before beside after, with the prompts")
    parser.add_argument("--at_least", type=int, default=0, help="how many have to be right (%(default)s)")
    args = parser.parse_args(argv)
    try:
        return run(args.expected, args.samples, args.grid, args.at_least)
    except InputError as error:
        print(f"judge.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
