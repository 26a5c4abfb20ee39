"""The judge of the demo's pictures: right on what is known, at chance on noise, strict about what is missing."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools.demo.judge import find_sets, main, see
from tools.demo.make_data import held_out_scenes, training_scenes, write_data
from tools.demo.scenes import BACKGROUNDS, COLOURS, render


@pytest.fixture
def expected(tmp_path: Path) -> Path:
    write_data(tmp_path / "data", seed=1, count=4)
    return tmp_path / "data/expected.json"


def write_samples(folder: Path, name: str, pictures: list[np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{name}_{index:02d}_{1000 + index}.png")


def truth() -> list[np.ndarray]:
    return [np.asarray(render(scene, 64, 64)) for scene in held_out_scenes(1)]


def noise() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(16)]


@pytest.mark.parametrize("size", [(64, 64), (80, 48), (56, 72)])
def test_every_rendered_scene_is_seen_as_it_is(size: tuple[int, int]) -> None:
    for scene in training_scenes(1, 448):
        seen = see(np.asarray(render(scene, *size)), COLOURS, BACKGROUNDS)
        assert (seen.colour, seen.background) == (scene.colour, scene.background)


def test_blurred_and_noisy_scenes_are_seen_too() -> None:
    random = np.random.default_rng(0)
    scenes = training_scenes(2, 112)
    right = 0
    for scene in scenes:
        small = render(scene, 64, 64).resize((12, 12), Image.Resampling.BOX).resize((64, 64), Image.Resampling.BICUBIC)
        rough = np.clip(np.asarray(small) + random.normal(0, 12, (64, 64, 3)), 0, 255).astype(np.uint8)
        right += see(rough, COLOURS, BACKGROUNDS).colour == scene.colour
    assert right / len(scenes) > 0.97


def test_a_plain_picture_shows_no_shape() -> None:
    assert see(np.full((64, 64, 3), 135, np.uint8), COLOURS, BACKGROUNDS).colour is None


def test_counts_judges_the_newest_set_and_draws_before_beside_after(expected: Path, tmp_path: Path, capsys) -> None:
    write_samples(tmp_path / "sample", "20260101000000_000000", noise())
    write_samples(tmp_path / "sample", "demo_20260101000500_000900", truth())
    arguments = [f"--expected={expected}", f"--samples={tmp_path / 'sample'}", f"--grid={tmp_path / 'g/grid.png'}"]
    assert main([*arguments, "--at_least=16"]) == 0
    output = capsys.readouterr().out
    assert "16 of 16 show the colour asked for" in output
    before = next(line for line in output.splitlines() if line.startswith("before training: "))
    assert int(before.split()[2]) <= 4  # of 16; 2 is chance
    grid = np.asarray(Image.open(tmp_path / "g/grid.png"))
    # The first cell: a noisy picture at the left, the rendered scene, enlarged, at the right.
    assert grid[8:160, 8:160].std(axis=(0, 1)).min() > 50
    scene = held_out_scenes(1)[0]
    assert np.abs(grid[12:16, 180:320].astype(int) - BACKGROUNDS[scene.background]).max() < 3
    assert np.abs(grid[86:90, 254:258].astype(int) - COLOURS[scene.colour]).max() < 3


def test_too_few_right_pictures_fail(expected: Path, tmp_path: Path, capsys) -> None:
    pictures = truth()
    for index in range(5):
        pictures[index] = pictures[15 - index]
    write_samples(tmp_path / "sample", "20260101000500_e000003", pictures)
    arguments = [f"--expected={expected}", f"--samples={tmp_path / 'sample'}"]
    assert main([*arguments, "--at_least=12"]) == 1
    assert "11 of 16 show the colour asked for" in capsys.readouterr().out
    assert main([*arguments, "--at_least=11"]) == 0


def test_incomplete_sets_are_passed_over(tmp_path: Path) -> None:
    write_samples(tmp_path, "20260101000000_000000", noise())
    write_samples(tmp_path, "20260101000100_000100", noise())
    write_samples(tmp_path, "20260101000200_000200", noise()[:7])
    before, after = find_sets(tmp_path, 16)
    assert before is not None
    assert (before.number, after.number) == (0, 100)


def test_of_two_runs_in_one_folder_the_newer_is_judged(tmp_path: Path) -> None:
    for run, hour in enumerate(("01", "02")):
        write_samples(tmp_path, f"20260101{hour}0000_000000", noise())
        write_samples(tmp_path, f"20260101{hour}0500_{900 - run:06d}", noise())
    before, after = find_sets(tmp_path, 16)
    assert before is not None
    assert (before.time, after.time, after.number) == ("20260101020000", "20260101020500", 899)


def test_no_samples_and_no_expectations_are_explained(expected: Path, tmp_path: Path, capsys) -> None:
    assert main([f"--expected={expected}", f"--samples={tmp_path / 'nothing'}"]) == 2
    assert "no complete set of 16 sampled pictures" in capsys.readouterr().err
    (tmp_path / "other.json").write_text(json.dumps([1]))
    assert main([f"--expected={tmp_path / 'other.json'}", f"--samples={tmp_path}"]) == 2
    assert "make_data.py" in capsys.readouterr().err
