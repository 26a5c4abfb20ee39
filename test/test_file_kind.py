"""A file's kind is told by its content: weights under any name are read, and what is none is called what it is."""

import io
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from library.errors import InputError
from library.file_kind import weight_form
from library.models.files.weight_files import read_names, read_weights

TENSORS = {"a": torch.arange(6.0)}


def _zip(**members: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return content.getvalue()


def _tar() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.safetensors"))
    return content.getvalue()


@pytest.mark.parametrize("name", ["real.ckpt", "UP.SAFETENSORS", "31e35c80fc4829d1", "model.safetensors", "m.pt"])
def test_safetensors_are_read_under_any_name(tmp_path, name):
    save_file(TENSORS, tmp_path / name, {"key": "value"})
    tensors, metadata = read_weights(tmp_path / name)
    assert torch.equal(tensors["a"], TENSORS["a"]) and metadata["key"] == "value"
    assert list(read_names(tmp_path / name)) == ["a"]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["pickle.safetensors", "last.ckpt", "blob"])
def test_pickles_are_read_under_any_name(tmp_path, name, zipped):
    torch.save({"state_dict": TENSORS}, tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert torch.equal(read_weights(tmp_path / name)[0]["a"], TENSORS["a"])
    assert list(read_names(tmp_path / name)) == ["a"]


POINTER = b"version " + b"https:/" + b"/git-lfs.github.com/spec/v1\noid sha256:31e35c80fc\nsize 6938078334\n"


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (POINTER, r"is a pointer of git-lfs \(\d+ bytes\).*git lfs pull"),
        (b'<!DOCTYPE html><html class=""><head>', "is a web page, not a model"),
        (b"\xef\xbb\xbf\n<HTML><body>log in", "is a web page, not a model"),
        (b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>', "is a web page, not a model"),
        (b'{"error": "Repository not found"}', "is text, not a model's weights .*Repository not found"),
        (b"Access to model x/y is restricted.", "is text, not a model's weights .*restricted"),
        (b"", "cut off: the file is empty"),
        (bytes(10_000), "begins with zeros alone .*broke off"),
        (b"\x1f\x8b\x08" + bytes(50), "is a gzip archive: unpack it"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(50), "is a 7-Zip archive: unpack it"),
        (_tar(), "is a tar archive: unpack it"),
        (_zip(**{"model.safetensors": save(TENSORS)}), r"is a zip archive of model\.safetensors.*unpack it"),
        (_zip(a=bytes(9000))[:5000], "damaged or cut off: the end of its zip archive is missing"),
        (b"GGUF\x03" + bytes(50), "is a GGUF file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), r"is a picture \(PNG\)"),
        (b"\x07\xfe\x83" * 90, "damaged or cut off, or no file of weights at all"),
    ],
)
def test_what_is_no_file_of_weights_is_called_what_it_is(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    for read in (weight_form, read_weights, read_names):
        with pytest.raises(InputError, match=rf"(?s){name}: {said}") as raised:
            read(tmp_path / name)
        assert "weights_only" not in str(raised.value) and len(str(raised.value)) < 600


def test_a_download_that_broke_off_says_how_much_there_is(tmp_path):
    whole = save({"a": torch.zeros(1000), "b": torch.zeros(1000)})
    (tmp_path / "part.safetensors").write_bytes(whole[:5000])
    with pytest.raises(InputError, match=rf"damaged or cut off: by its header it has {len(whole)} bytes.* are 5000"):
        weight_form(tmp_path / "part.safetensors")
    (tmp_path / "part.safetensors").write_bytes(whole[:20])
    with pytest.raises(InputError, match="damaged or cut off"):
        weight_form(tmp_path / "part.safetensors")


@pytest.mark.parametrize("content", [b"\x80\x02}q\x00.", b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x01a."])
def test_nobody_is_told_to_read_a_pickle_without_its_guard(tmp_path, content):
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(InputError) as raised:
        read_weights(tmp_path / "x.ckpt")
    assert "weights_only" not in str(raised.value)


def test_a_folder_or_nothing_is_said_to_be_that(tmp_path: Path):
    for read in (read_weights, read_names):
        with pytest.raises(InputError, match="no such file"):
            read(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        weight_form(tmp_path / "nowhere")
