"""The demo's data set: what is drawn, what is written, what is held out."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from library.data.index.sources import Subset
from library.data.index.table import build_index
from library.options.prompts import read_prompts
from tools.demo.make_data import held_out_scenes, main, training_scenes, write_data
from tools.demo.scenes import BACKGROUNDS, COLOURS, SHAPES, Scene, combinations, random_size, render


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data")
    assert main([f"--out={out}", "--images=700", "--seed=3"]) == 0
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_a_scene_has_its_colours_where_its_caption_says(shape: str) -> None:
    scene = Scene(shape, "red", "gray", "at the left")
    picture = np.asarray(render(scene, 100, 60))
    assert picture.shape == (60, 100, 3)
    assert scene.caption == f"a red {shape} on a gray background, at the left"
    red_HW = np.linalg.norm(picture.astype(float) - COLOURS["red"], axis=2) < 10
    gray_HW = np.linalg.norm(picture.astype(float) - BACKGROUNDS["gray"], axis=2) < 10
    assert 0.05 < red_HW.mean() < 0.4
    assert gray_HW.mean() > 0.5
    assert red_HW.any(axis=0).nonzero()[0].mean() < 35  # px from the left, of 100
    between = ~red_HW & ~gray_HW
    assert 0 < between.mean() < 0.06  # the soft edge of antialiasing, and no more


def test_the_article_fits_the_colour() -> None:
    assert Scene("star", "orange", "white", "at the top").caption.startswith("an orange star")


def test_sizes_have_many_aspect_ratios() -> None:
    random = np.random.default_rng(0)
    sizes = [random_size(random) for _ in range(500)]
    ratios = np.array([width / height for width, height in sizes])
    assert ratios.min() < 0.65
    assert ratios.max() > 1.5
    assert all(45 < side < 135 for size in sizes for side in size)


@pytest.mark.parametrize("seed", range(5))
def test_held_out_combinations_never_occur_in_training(seed: int) -> None:
    held_out = held_out_scenes(seed)
    combined = {scene.combination for scene in held_out}
    trained = Counter(scene.combination for scene in training_scenes(seed, 1000))
    assert len(combined) == 16
    assert not combined & set(trained)
    assert len(trained) == len(combinations()) - 16
    assert max(trained.values()) - min(trained.values()) <= 1
    assert set(Counter(scene.colour for scene in held_out).values()) == {2}
    assert Counter(scene.shape for scene in held_out) == dict.fromkeys(SHAPES, 4)
    assert Counter(scene.background for scene in held_out) == dict.fromkeys(BACKGROUNDS, 4)


def test_shards_are_as_img2dataset_writes_them(data: Path) -> None:
    rows = []
    for shard, count in (("00000", 600), ("00001", 100)):
        with tarfile.open(data / f"{shard}.tar") as tar:
            contents = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        table = pq.read_table(data / f"{shard}.parquet").to_pylist()
        stats = json.loads((data / f"{shard}_stats.json").read_text())
        assert len(contents) == 3 * count
        assert len(table) == stats["count"] == stats["successes"] == stats["status_dict"]["success"] == count
        for row in table[:20]:
            picture = Image.open(io.BytesIO(contents[row["key"] + ".jpg"]))
            assert (picture.format, picture.size) == ("JPEG", (row["width"], row["height"]))
            assert contents[row["key"] + ".txt"].decode() == row["caption"]
            assert json.loads(contents[row["key"] + ".json"]) == row
        rows += table
    assert len({row["key"] for row in rows}) == 700
    real = ["caption", "url", "key", "status", "error_message", "width", "height", "original_width", "original_height"]
    assert list(rows[0]) == [*real, "exif", "sha256"]


def test_the_trainer_finds_every_picture_and_nothing_else(data: Path) -> None:
    assert len(build_index([Subset(data, ".txt")])) == 700


def test_prompts_ask_for_what_is_expected(data: Path) -> None:
    prompts = read_prompts(data / "prompts.txt").prompts
    expected = json.loads((data / "expected.json").read_text())
    assert len(prompts) == len(expected["prompts"]) == 16
    for prompt, wanted in zip(prompts, expected["prompts"], strict=True):
        assert prompt.prompt == wanted["prompt"]
        assert f"{wanted['colour']} {wanted['shape']} on a {wanted['background']}" in prompt.prompt
        assert (prompt.width, prompt.height, prompt.seed) == (wanted["width"], wanted["height"], wanted["seed"])
        assert prompt.scale > 1
    trained = {scene.caption for scene in training_scenes(3, 700)}
    assert not trained & {prompt.prompt for prompt in prompts}


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        write_data(tmp_path / name, seed, 30)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["00000.parquet", "00000.tar", "00000_stats.json", "expected.json", "prompts.txt"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "a/00000.tar").read_bytes() != (tmp_path / "c/00000.tar").read_bytes()


def test_a_tool_writes_over_what_it_wrote_and_not_over_the_users(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "data"
    for _ in range(2):
        assert main([f"--out={out}", "--images=4"]) == 0
    before = (out / "00000.tar").read_bytes()
    assert {path.stat().st_mode & 0o044 for path in out.iterdir()} == {0o044}
    (out / "00001.tar").write_bytes(b"mine")
    with pytest.raises(SystemExit):
        main([f"--out={out}", "--images=4", "--seed=2"])
    assert "holds what this tool has not written" in capsys.readouterr().err
    assert (out / "00000.tar").read_bytes() == before and (out / "00001.tar").read_bytes() == b"mine"
