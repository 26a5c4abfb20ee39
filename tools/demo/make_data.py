#!/usr/bin/env python
"""The demo's data set: rendered scenes with captions in LAION shards, and prompts that were held out from it.

    python tools/demo/make_data.py --out=test/output/demo/data

Writes shards exactly as img2dataset does (00000.tar with KEY.jpg, KEY.json, KEY.txt; 00000.parquet; 00000_stats.json),
prompts.txt (16 sample prompts whose combination of shape, colour and background no training picture has) and
expected.json (what each prompt asks for, for judge.py). The same seed writes the same bytes.
"""

import argparse
import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from library.keyed_random import Stream, generator
from tools.demo.own_out import write_out
from tools.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    POSITIONS,
    SHAPES,
    Scene,
    combinations,
    random_scene,
    random_size,
    render,
)

HELD_OUT = 16
SHARD_SIZE = 600
PROMPT_SIZES = ((64, 64), (72, 56), (64, 64), (56, 72))  # width, height in px, in turn
_JPEG: dict[str, Any] = {"format": "JPEG", "quality": 95, "subsampling": 0}
_FIRST_SEED = 1000


def held_out_scenes(seed: int) -> list[Scene]:
    """16 scenes of combinations that training never sees: each colour twice, each shape and background 4 times.

    Every colour, shape and background, and every pair of them, stays in the training set in other combinations.
    """
    random = generator(seed, Stream.ORDER)
    colours = [colour for colour in COLOURS for _ in range(2)]
    while True:
        shapes = random.permutation([SHAPES[i % len(SHAPES)] for i in range(HELD_OUT)]).tolist()
        backgrounds = random.permutation([list(BACKGROUNDS)[i % len(BACKGROUNDS)] for i in range(HELD_OUT)]).tolist()
        chosen = list(zip(shapes, colours, backgrounds, strict=True))
        # A colour's two prompts differ in shape and in background.
        if all(a[0] != b[0] and a[2] != b[2] for a, b in zip(chosen[::2], chosen[1::2], strict=True)):
            break
    return [Scene(*combination, list(POSITIONS)[i % len(POSITIONS)]) for i, combination in enumerate(chosen)]


def training_scenes(seed: int, count: int) -> list[Scene]:
    """That many scenes, in which all combinations that are not held out occur equally often (within 1)."""
    held_out = {scene.combination for scene in held_out_scenes(seed)}
    known = [combination for combination in combinations() if combination not in held_out]
    order = generator(seed, Stream.ORDER, 1).permutation(count)
    drawn = [known[index % len(known)] for index in order]
    return [random_scene(generator(seed, Stream.AUGMENTATION, i), combination) for i, combination in enumerate(drawn)]


def write_data(out: Path, seed: int = 1, count: int = 2400) -> dict[str, Any]:
    """Write shards, prompts.txt and expected.json; returns the content of expected.json."""
    out.mkdir(parents=True, exist_ok=True)
    scenes = training_scenes(seed, count)
    for shard, start in enumerate(range(0, count, SHARD_SIZE)):
        numbers = range(start, min(start + SHARD_SIZE, count))
        _write_shard(out, shard, [_sample(seed, number, scenes[number]) for number in numbers])
    expected = _expectations(held_out_scenes(seed))
    (out / "prompts.txt").write_text(_prompt_lines(expected), encoding="utf-8")
    (out / "expected.json").write_text(json.dumps(expected, indent=2) + "\n", encoding="utf-8")
    return expected


def _sample(seed: int, number: int, scene: Scene) -> tuple[bytes, dict[str, Any]]:
    """A picture's JPEG bytes and its metadata with img2dataset's fields."""
    width, height = random_size(generator(seed, Stream.CROP, number))
    buffer = io.BytesIO()
    render(scene, width, height).save(buffer, **_JPEG)
    name = f"{scene.background}/{scene.colour}-{scene.shape}-{number}.jpg"
    return buffer.getvalue(), {
        "caption": scene.caption,
        "url": f"scene://demo/{name}",
        "key": f"{number // SHARD_SIZE:05d}{number % SHARD_SIZE:04d}",
        "status": "success",
        "error_message": None,
        "width": width,
        "height": height,
        "original_width": width,
        "original_height": height,
        "exif": "{}",
        "sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
    }


def _write_shard(out: Path, shard: int, samples: Sequence[tuple[bytes, dict[str, Any]]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # PAX, as img2dataset's writer has it; no times and owners, so that the bytes follow from the seed alone.
    with tarfile.open(out / f"{shard:05d}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for jpeg, row in samples:
            parts = {"jpg": jpeg, "json": json.dumps(row, indent=4).encode(), "txt": row["caption"].encode()}
            for extension, content in parts.items():
                info = tarfile.TarInfo(f"{row['key']}.{extension}")
                info.size, info.mode = len(content), 0o444
                tar.addfile(info, io.BytesIO(content))
    rows = [row for _, row in samples]
    sizes = ("width", "height", "original_width", "original_height")
    schema = pa.schema([(name, pa.int32() if name in sizes else pa.string()) for name in rows[0]])
    pq.write_table(pa.Table.from_pylist(rows, schema), out / f"{shard:05d}.parquet")
    stats = {
        "count": len(rows),
        "successes": len(rows),
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "duration": 0.0,
        "start_time": 0.0,
        "end_time": 0.0,
        "status_dict": {"success": len(rows)},
    }
    (out / f"{shard:05d}_stats.json").write_text(json.dumps(stats, indent=4), encoding="utf-8")


def _expectations(scenes: Sequence[Scene]) -> dict[str, Any]:
    prompts = []
    for index, scene in enumerate(scenes):
        width, height = PROMPT_SIZES[index % len(PROMPT_SIZES)]
        prompts.append(
            {
                "index": index,
                "prompt": scene.caption,
                "shape": scene.shape,
                "colour": scene.colour,
                "background": scene.background,
                "position": scene.position,
                "width": width,
                "height": height,
                "seed": _FIRST_SEED + index,
            }
        )
    palettes = {"colours": COLOURS, "backgrounds": BACKGROUNDS}
    tables = {what: {name: list(value) for name, value in table.items()} for what, table in palettes.items()}
    return {**tables, "prompts": prompts}


def _prompt_lines(expected: dict[str, Any], steps: int = 20, guidance: float = 3.0) -> str:
    """The prompts in the syntax of --sample_prompts, each with an empty negative prompt."""
    lines = ["# combinations of shape, colour and background that the training set does not have"]
    for prompt in expected["prompts"]:
        lines.append(
            f"{prompt['prompt']} --w {prompt['width']} --h {prompt['height']} --s {steps} --l {guidance:g} "
            f"--d {prompt['seed']}"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Write the data set."""
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, type=Path, help="folder for shards, prompts.txt and expected.json")
    parser.add_argument("--images", type=int, default=2400, help="training pictures (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    args = parser.parse_args(argv)
    write_out(parser, args.out, lambda: write_data(args.out, args.seed, args.images))
    print(f"{args.images} pictures and {len(held_out_scenes(args.seed))} held-out prompts in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
