"""Data sets by hub name, against a small stand-in of the hub on the loopback interface."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from library.data.dataset import prepare_data
from library.data.index import hub as hub_data
from library.errors import InputError, Stopped
from test.models.files.hub_server import TOKEN, Hub

ROOT = Path(__file__).parents[3]

SCRIPT = """
import sys
from pathlib import Path
from library.data.index.hub import local_data
from library.errors import InputError

if __name__ == "__main__":
    for name in sys.argv[1:]:
        try:
            folder = local_data(Path(name), "--train_data_dir", ".txt")
            print("found", sum(path.is_file() for path in folder.rglob("*")), folder.resolve())
        except InputError as error:
            print("refused", str(error).replace(chr(10), " "))
"""


class Client:
    """Processes that look for data sets, with one cache and one stand-in of the hub."""

    def __init__(self, base, server):
        self.base, self.server = base, server
        (base / "attempt.py").write_text(SCRIPT)

    def start(self, *names, **environment):
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_"))}
        own = {
            "HF_ENDPOINT": self.server.endpoint,
            "HF_HOME": str(self.base / "home"),
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        return subprocess.Popen(
            [sys.executable, "attempt.py", *names], env={**inherited, **own, **environment}, cwd=self.base,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def lines(self, process):
        out, self.errors = process.communicate(timeout=120)
        assert process.returncode == 0, self.errors
        return [line for line in out.splitlines() if line.startswith(("found", "refused"))]


@pytest.fixture
def client(tmp_path, make_shard, make_picture):
    shards, images = tmp_path / "shards", tmp_path / "images"
    (shards / "train").mkdir(parents=True)
    images.mkdir()
    for number in range(3):
        make_shard(shards / "train", number, [(40, 30), (30, 40)])
    (shards / "README.md").write_text("hello")
    (images / "a[1].JPG").write_bytes(make_picture(32, 32))
    (images / "a[1].txt").write_text("a picture")
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "train.parquet").write_bytes(b"PAR1")
    folders = {"tiny/shards": shards, "tiny/images": images, "tiny/table": tmp_path / "table", "tiny/gated": images}
    server = Hub(datasets=folders)
    server.gated.add("tiny/gated")
    yield Client(tmp_path, server)
    server.shutdown()
    server.server_close()


def test_a_hub_name_is_downloaded_once_for_all_processes_and_then_read_offline(client):
    processes = [client.start("tiny/shards") for _ in range(2)]
    lines = [line for process in processes for line in client.lines(process)]
    assert lines[0] == lines[1] and lines[0].startswith("found 6 ")
    shards = [f"tiny/shards/train/{number:05d}.{suffix}" for number in range(3) for suffix in ("tar", "parquet")]
    assert sorted(client.server.downloaded) == sorted(shards)  # each once, and nothing else
    assert client.lines(client.start("tiny/shards", HF_HUB_OFFLINE="1")) == lines[:1]


def test_a_download_that_breaks_off_goes_on_where_it_was(client):
    client.server.failing.add("train/00002.tar")
    (line,) = client.lines(client.start("tiny/shards"))
    assert line.startswith("refused --train_data_dir tiny/shards: the download broke off (")
    assert "Run again to go on with it" in line
    client.server.failing.clear()
    before = set(client.server.downloaded) - {"tiny/shards/train/00002.tar"}
    client.server.downloaded.clear()
    (offline,) = client.lines(client.start("tiny/shards", HF_HUB_OFFLINE="1"))
    assert "not in the hub's cache" in offline  # half a data set is not trained on
    assert client.lines(client.start("tiny/shards"))[0].startswith("found 6 ")
    assert "tiny/shards/train/00002.tar" in client.server.downloaded
    assert not before & set(client.server.downloaded)


def test_what_cannot_be_had_is_an_error_that_says_what_was_tried(client):
    lines = client.lines(client.start("tiny/absent", "tiny/table", "tiny/gated"))
    assert lines[0].startswith(
        "refused --train_data_dir tiny/absent: no file or folder of this name here, and no such dataset repository at "
        f"{client.server.endpoint}"
    )
    assert "If a path is meant, check its spelling" in lines[0]
    assert "images in the columns of a parquet are not read" in lines[1]
    assert "accept its licence and log in first" in lines[2]
    lines = client.lines(client.start("tiny/gated", "tiny/images", HF_TOKEN=TOKEN))
    assert [line.split()[:2] for line in lines] == [["found", "2"]] * 2
    (line,) = client.lines(client.start("tiny/other", HF_HUB_OFFLINE="1"))
    assert "no file or folder of this name here, not in the hub's cache" in line and "HF_HOME" in line


def test_the_folder_in_the_cache_is_indexed_unless_there_is_a_path_of_the_name(
    client, monkeypatch, tmp_path, make_options
):
    monkeypatch.setattr(hub_data, "_download_in_process", lambda *_: client.base / "shards")
    monkeypatch.chdir(tmp_path)
    options = make_options("tiny/shards")
    assert len(prepare_data(options, 1, rank=0, world_size=1, accumulation=1).index) == 6
    (tmp_path / "tiny").mkdir()
    (client.base / "images").rename(tmp_path / "tiny" / "shards")
    assert len(prepare_data(options, 1, rank=0, world_size=1, accumulation=1).index) == 1


def test_a_path_that_is_missing_is_not_looked_for_on_the_hub(monkeypatch, tmp_path, make_options):
    """data/laion on a disk that is not mounted: a stranger's laion of an owner called data would be trained on."""
    monkeypatch.setattr(hub_data, "_download_in_process", lambda *_: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "disk").symlink_to("/nowhere/disk")
    for given in ("data/laion", "disk/laion"):
        with pytest.raises(InputError, match=f"--train_data_dir {given}: '{given[:4]}' is here and has no 'laion'"):
            prepare_data(make_options(given), 1, rank=0, world_size=1, accumulation=1)
    for given in ("./other/laion", "other/laion/", "other//laion", "other/laion.tar", "öther/laion"):
        with pytest.raises(InputError, match=r"laion\S*: there is no such folder"):
            prepare_data(make_options(given), 1, rank=0, world_size=1, accumulation=1)
    reg = make_options(tmp_path / "data", "--reg_data_dir=./other/laion").subsets[1]
    assert reg.train_data_dir == tmp_path / "other" / "laion"


def test_what_is_fetched_is_said_before_it_is(monkeypatch, tmp_path, caplog):
    def download(*_):
        said.extend(caplog.messages)
        return tmp_path

    said = []
    monkeypatch.setattr(hub_data, "_download_in_process", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https:" + "//me:p@ss/word@hub.test")
    with caplog.at_level("INFO"):
        hub_data.local_data(Path("tiny/shards"), "--train_data_dir", ".txt")
    (line,) = said
    assert line == (
        "--train_data_dir tiny/shards: no such path here; it is taken as the dataset repository of that name: "
        f"https://hub.test/datasets/tiny/shards is fetched into {tmp_path / 'cache'}, as far as it is not there yet"
    )


def test_a_signal_ends_a_download_at_once(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        began = time.monotonic()

        def between():
            if time.monotonic() > began + 1:
                raise Stopped(signal.SIGTERM)

        with pytest.raises(Stopped):
            hub_data.local_data(Path("tiny/shards"), "--train_data_dir", ".txt", between)
    assert time.monotonic() < began + 10  # the hub is waited for for 20 s
    assert multiprocessing.active_children() == []


def test_only_what_is_spelt_as_a_hub_name_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(hub_data, "_download_in_process", lambda *_: pytest.fail("asked the hub"))
    for path in (tmp_path, Path("/nowhere/data"), Path("shards"), Path("data/laion/train"), Path("../data")):
        assert hub_data.local_data(path, "--train_data_dir", ".txt") == path
