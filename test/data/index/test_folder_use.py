"""Folders that several users and runs share: what others can read, whose tables stay, where one without rights goes."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from library.data.cache.block_files import BlockShelf, write_shared
from library.data.cache.entries import Entry, Made
from library.data.cache.locations import cache_root, clear_left_behind, disk_shelf
from library.data.index import folder_use, kept_tables
from library.data.index.sources import Subset
from library.data.index.table import build_index
from library.errors import InputError
from library.training import cache_filling

NOBODY = 65534


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder of images that other users can reach, which pytest's own are not."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = Path(tempfile.mkdtemp(prefix="shared_"))
    root.chmod(0o755)
    folder = root / "data"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a cat")
    umask = os.umask(0o022)
    yield folder
    os.umask(umask)
    shutil.rmtree(root)


def scans(folder) -> int:
    """Builds the index; how many images had to be looked at."""
    looked_at = []

    def bar(subset):
        return lambda done, total: looked_at.append(total)

    index = build_index([Subset(folder, ".txt")], progress=bar)
    assert len(index) == len(list(folder.glob("*.png")))
    return max(looked_at, default=0)


def as_nobody(act):
    """What a function gives in a process of another user, as JSON has it."""
    if os.geteuid():
        pytest.skip("only root can become another user")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            os.write(write, json.dumps(act()).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        content = file.read()
    assert os.waitpid(child, 0)[1] == 0
    return json.loads(content)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_beside_the_data_have_the_mode_that_the_umask_says(data, umask):
    os.umask(umask)
    assert scans(data) == 3
    BlockShelf(data / "cache").write({0: entry()})
    written = [*(data / ".image_index").iterdir(), *(data / "cache").iterdir()]
    assert len(written) >= 3
    assert {path.stat().st_mode & 0o777 for path in written} == {0o666 & ~umask}


def test_another_user_reads_the_tables_and_keeps_his_own_where_there_are_none(data):
    assert scans(data) == 3
    own = data.parent / "his"
    own.mkdir()
    os.chown(own, NOBODY, NOBODY)

    def start():
        os.environ["XDG_CACHE_HOME"] = str(own)
        return scans(data)

    assert as_nobody(start) == 0
    Image.new("RGB", (8, 8)).save(data / "new.png")
    assert as_nobody(start) == 4
    assert as_nobody(start) == 0
    assert list(own.rglob("*.rows")) and len(list((data / ".image_index").glob("*.rows"))) == 1
    data.chmod(0o777)  # the data may be written to, and the tables of the first user still may not
    Image.new("RGB", (8, 8)).save(data / "newer.png")
    assert (as_nobody(start), as_nobody(start)) == (5, 0)


def test_another_users_cache_is_not_written_to(data):
    out = data.parent / "out"
    root = cache_root(data, out)
    assert root == data / ".encoding_cache"
    BlockShelf(root / "latents" / "a.b").write({0: entry()})
    assert cache_root(data, out) == root
    data.chmod(0o777)
    assert as_nobody(lambda: str(cache_root(data, out))).startswith(str(out / "cache"))
    root.chmod(0o777)
    (root / "latents").chmod(0o777)
    assert as_nobody(lambda: str(cache_root(data, out))).startswith(str(out / "cache"))
    (root / "latents" / "a.b").chmod(0o777)
    assert as_nobody(lambda: str(cache_root(data, out))) == str(root)
    (file,) = (root / "latents" / "a.b").iterdir()
    file.chmod(0o600)

    def find():
        found = BlockShelf(file.parent).find([0], True)
        return [len(found.made), found.damaged]

    assert as_nobody(find) == [0, []]


def test_a_file_among_the_folders_of_a_cache_is_none_of_them(data):
    """Also where Path.glob("*/") gives files, too, before Python 3.11."""
    out = data.parent / "out"
    root = cache_root(data, out)
    (root / "latents" / "a.b").mkdir(parents=True)
    for folder in (root, root / "latents"):
        (folder / "notes.txt").touch()
        (folder / "notes.txt").chmod(0o444)
    assert cache_root(data, out) == root
    (root / "latents" / "a.b").chmod(0o555)
    assert cache_root(data, out).parent == out / "cache"
    (root / "latents" / "a.b").chmod(0o755)


def test_the_folders_of_a_cache_are_looked_at_once_a_run(data, monkeypatch):
    """Not once more for each subset of one folder, each kind of cache and each sharing of the work."""
    asked = []

    def counted(path, output_dir):
        asked.append(path)
        return cache_root(path, output_dir)

    monkeypatch.setattr(cache_filling, "cache_root", counted)
    index = SimpleNamespace(subsets=[SimpleNamespace(path=data)] * 3, sources=[])
    options = SimpleNamespace(saving=SimpleNamespace(output_dir=data.parent / "out"))
    accelerator = SimpleNamespace(process_index=0, num_processes=1)
    work = cache_filling._Work(options, SimpleNamespace(index=index), accelerator, None)
    for kind in ("latents", "text_encoder_outputs"):
        work.shelves(kind, True, 0, None, None)
    assert asked == [data] and work._roots == [data / ".encoding_cache"] * 3


def test_tables_of_a_run_stay_as_long_as_it_lasts(data):
    """A run of months holds a lock; another start removes old tables of other states of the data once it has ended."""
    assert scans(data) == 3
    kept = data / ".image_index"
    (table,) = kept.glob("*.rows")
    old = time.time() - 40 * 24 * 3600
    os.utime(table, (old, old))
    held = folder_use._held.pop(kept)
    os.close(held)
    program = (
        "import sys; from pathlib import Path; from library.data.index.folder_use import mark_in_use; "
        "mark_in_use(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", program, str(kept)], stdin=-1, stdout=-1, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        Image.new("RGB", (8, 8)).save(data / "new.png")
        assert scans(data) == 4
        assert table.exists()
    finally:
        other.communicate()
    Image.new("RGB", (8, 8)).save(data / "newer.png")
    assert scans(data) == 5
    assert not table.exists()


def test_of_two_that_look_at_once_each_sees_the_other(tmp_path):
    """Looking does not take the own mark away, not for a moment."""
    assert not folder_use.used_by_others(tmp_path)
    program = (
        "import sys; from pathlib import Path; from library.data.index.folder_use import used_by_others; "
        "folder = Path(sys.argv[1]); print(used_by_others(folder), flush=True); sys.stdin.readline(); "
        "print({used_by_others(folder) for _ in range(3000)}, flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdin=-1, stdout=-1, text=True)
    try:
        assert other.stdout.readline() == "True\n"
        other.stdin.write("\n")
        other.stdin.flush()
        assert {folder_use.used_by_others(tmp_path) for _ in range(3000)} == {True}
        assert other.stdout.readline() == "{True}\n"
    finally:
        other.communicate()
    assert not folder_use.used_by_others(tmp_path)


def test_a_lock_that_is_a_link_leaves_what_it_leads_to(data):
    precious = data.parent / "precious"
    precious.write_text("mine")
    (data / ".image_index").mkdir()
    (data / ".image_index" / "lock").symlink_to(precious)
    assert scans(data) == 3
    assert precious.read_text() == "mine"


def test_without_a_home_tables_go_to_a_temporary_folder(data, tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    data.chmod(0o555)
    assert (scans(data), scans(data)) == (3, 0)
    assert list((tmp_path / f"sd_training-{os.getuid()}").rglob("*.rows"))
    monkeypatch.setenv("HOME", "")
    assert kept_tables.user_cache_folder().parent == tmp_path


def entry() -> Entry:
    return Entry(Made("content", "settings"), (8, 8, 0, 0, 8, 8), (torch.ones(4, 2, 2), torch.zeros(4, 2, 2)))


def test_a_cache_on_a_full_disk_is_an_error_that_names_the_file(tmp_path, monkeypatch):
    shelf = BlockShelf(tmp_path)
    shelf.write({0: entry()})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("library.data.cache.block_files._save", full)
    with pytest.raises(InputError, match=r"000000\.safetensors: cannot be written \(No space left"):
        shelf.write({1: entry()})
    assert torch.equal(BlockShelf(tmp_path).read(0).tensors[0], torch.ones(4, 2, 2))


def test_a_long_name_leaves_room_for_host_and_process(tmp_path):
    name = "n" * 250
    write_shared(tmp_path / name, lambda path: path.write_text("content"))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_only_old_half_written_blocks_are_cleared_away(tmp_path):
    folder = tmp_path / "latents" / "source"
    folder.mkdir(parents=True)
    old = time.time() - 2 * 24 * 3600
    gone = folder / ".000000.safetensors.partial.host.1"
    young = folder / ".000001.safetensors.partial.host.1"
    others = (folder / ".mine.partial.txt", folder / ".000002.safetensors.partial.dir", tmp_path / ".x.partial.y")
    for path in (gone, young, others[0], others[2]):
        path.write_text("x")
    others[1].mkdir()
    for path in (gone, *others):
        os.utime(path, (old, old))
    clear_left_behind(tmp_path)
    assert not gone.exists() and young.exists() and all(path.exists() for path in others)


def shelf_of(data, out, npz=frozenset()):
    """The shelf of the data's one source, as a process with its rights gets it."""
    index = build_index([Subset(data, ".txt")])
    settings = SimpleNamespace(of_source=lambda number: "settings")
    return disk_shelf(index, "latents", settings, lambda number: None, [cache_root(data, out)], npz, 0)


def test_another_users_entries_are_used_and_new_ones_go_to_ones_own(data):
    out = data.parent / "out"
    out.mkdir()
    os.chown(out, NOBODY, NOBODY)
    shelf_of(data, data.parent / "roots").write({0: entry(), 1: entry()})
    (beside,) = (data / ".encoding_cache").rglob("*.safetensors")
    before = beside.read_bytes()

    def fill():
        shelf = shelf_of(data, out)
        found = sorted(shelf.find(range(3), True).made)
        shelf.write({2: entry(), 1: replace(entry(), made=Made("newer", "settings"))})
        return found, sorted(shelf.find(range(3), True).made), [shelf.read(place).made.content for place in range(3)]

    assert as_nobody(fill) == [[0, 1], [0, 1, 2], ["content", "newer", "content"]]
    assert beside.read_bytes() == before
    assert [path.name for path in out.rglob("*.safetensors")] == [beside.name]
    beside.chmod(0o600)
    assert as_nobody(lambda: sorted(shelf_of(data, out).find(range(3), True).made)) == [1, 2]
