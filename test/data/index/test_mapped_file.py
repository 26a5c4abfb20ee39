import numpy as np
import pytest

from library.data.index.mapped_file import Opened, load, read_notes, store

ARRAYS = {
    "rows": np.array([(1, 2.5), (3, 4.5)], [("a", np.int32), ("b", np.float64)]),
    "none": np.empty(0, np.int64),
    "text": np.frombuffer(b"of any length", np.uint8),
}


def test_what_is_stored_is_what_is_mapped(tmp_path):
    for length in (0, 1, 70, 5000, 100_000):  # of the head: within the first read, and far over it
        path = tmp_path / "made" / f"{length}"
        notes = {"text": "ä" * length}
        store(path, ARRAYS, notes)
        arrays, found = load(path)
        assert found == notes == read_notes(path)
        for name, array in ARRAYS.items():
            assert arrays[name].dtype == array.dtype
            assert arrays[name].tolist() == array.tolist()
        with pytest.raises(ValueError, match="read-only"):
            arrays["text"][0] = 1
    assert len(list((tmp_path / "made").iterdir())) == 5


def test_a_file_that_is_cut_anywhere_is_none(tmp_path):
    store(tmp_path / "whole", ARRAYS, {"number": 1})
    whole = (tmp_path / "whole").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:length])
        assert read_notes(tmp_path / "cut") is None
    with pytest.raises(OSError, match="damaged"):
        load(tmp_path / "cut")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nowhere")
    store(tmp_path / "cut", ARRAYS, {"number": 2})
    assert read_notes(tmp_path / "cut") == {"number": 2}


def test_a_whole_file_that_is_there_is_not_written_again(tmp_path):
    store(tmp_path / "file", ARRAYS, {})
    before = (tmp_path / "file").stat().st_ino
    store(tmp_path / "file", ARRAYS, {})
    assert (tmp_path / "file").stat().st_ino == before


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    with pytest.raises(TypeError):
        store(tmp_path / "file", ARRAYS, {"number": object()})
    assert list(tmp_path.iterdir()) == []


def test_few_are_open_at_once():
    opened = []
    kept = Opened(lambda number: opened.append(number) or number)
    for number in [*range(100), 99, 98, 0]:
        assert kept[number] == number
    assert opened == [*range(100), 0]
    assert len(kept._kept) == 64
