"""Data sets that the tests of library/data make for themselves."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sdxl_pretrain
from library.options.data import DataOptions
from library.options.training import TrainingOptions


def picture(width: int, height: int, seed: int = 0, format: str = "JPEG") -> bytes:
    """A small image file of smooth random colours."""
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC).save(file, format)
    return file.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT) -> None:
    """A tar of files in the order given."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_laion_shard(
    folder: Path, number: int, sizes: list[tuple[int, int]], *, parquet: bool = True, captions: bool = True
) -> Path:
    """A shard as img2dataset writes it: unsorted samples, .txt, .json and a parquet sidecar with a failed row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    members, rows = [], []
    for place, (width, height) in reversed(list(enumerate(sizes))):
        key = f"{number:05d}{place:04d}"
        caption = f"picture {number}, place {place}, {width} by {height}"
        facts = {"key": key, "status": "success", "caption": caption, "width": width, "height": height}
        members.append((f"{key}.jpg", picture(width, height, seed=number * 1000 + place)))
        members.append((f"{key}.json", json.dumps(facts).encode()))
        if captions:
            members.append((f"{key}.txt", caption.encode()))
        rows.append(facts)
    rows.append({"key": "failed", "status": "failed_to_download", "caption": "none", "width": None, "height": None})
    path = folder / f"{number:05d}.tar"
    write_tar(path, members)
    if parquet:
        pq.write_table(pa.Table.from_pylist(rows), path.with_suffix(".parquet"))
    return path


@pytest.fixture
def make_picture() -> Callable[..., bytes]:
    return picture


@pytest.fixture
def make_tar() -> Callable[..., None]:
    return write_tar


@pytest.fixture
def make_shard() -> Callable[..., Path]:
    return write_laion_shard


@pytest.fixture
def emoji_laion() -> Path:
    """The real shards beside the repository; tests that want them are skipped where they are not."""
    path = Path(__file__).parents[3] / "shared" / "data" / "emoji-laion"
    if not path.is_dir():
        pytest.skip(f"{path} is not here")
    return path


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tests' own cache folder, so that none meets what another or the user has kept."""
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    return path


@pytest.fixture
def make_options() -> Callable[..., DataOptions]:
    """The options of data at a place, at 32 px with buckets, with more arguments of the command line."""

    def make(data: object, *more: str) -> DataOptions:
        arguments = ["--pretrained_model_name_or_path=m", "--output_dir=o", f"--train_data_dir={data}"]
        arguments += ["--resolution=32", "--enable_bucket", "--min_bucket_reso=16", "--max_bucket_reso=64"]
        arguments += ["--bucket_reso_steps=8", "--caption_extension=.txt", "--max_data_loader_n_workers=0", *more]
        return sdxl_pretrain.SCRIPT.options(arguments).data

    return make


@pytest.fixture
def all_options() -> Callable[..., TrainingOptions]:
    """All options of a run out of arguments of the command line."""

    def make(*more: str) -> TrainingOptions:
        required = ["--pretrained_model_name_or_path=m", "--output_dir=o", "--resolution=32"]
        return sdxl_pretrain.SCRIPT.options([*required, *more])

    return make
