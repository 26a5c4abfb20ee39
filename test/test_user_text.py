"""Texts that users write are read in every encoding that tells itself, and refused by name in others."""

import re

import pytest

from library.errors import InputError
from library.user_text import decode_text, read_user_text

TEXT = "a café, 猫\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_unicode_is_read_with_and_without_its_mark(tmp_path, encoding):
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT.encode(encoding))
    assert read_user_text(path, "--flag") == TEXT
    path.write_bytes(TEXT.replace("\n", "\r\n").encode(encoding))
    assert read_user_text(path, "--flag") == TEXT


@pytest.mark.parametrize("order", ["le", "be"])
def test_a_mark_of_either_byte_order_is_taken(order):
    assert decode_text("\ufeffab".encode(f"utf-16-{order}")) == "ab"
    assert decode_text("\ufeffab".encode(f"utf-32-{order}")) == "ab"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("é".encode("cp1252"), "is not UTF-8 (byte 0 is 0xe9, perhaps Windows' CP1252"),
        ("一张图片".encode("gbk"), "iconv -f GBK -t UTF-8"),
        ("画像です".encode("shift-jis"), "GBK, Shift-JIS"),
        ("ab".encode("utf-16-le"), "has zero bytes"),
        (b"\xff\xfea", "is no whole UTF-16 text"),
    ],
)
def test_others_are_refused_with_the_file_and_the_way_out(tmp_path, data, reason):
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    with pytest.raises(InputError, match=re.escape(f"--flag {path} ") + f".*{re.escape(reason)}"):
        read_user_text(path, "--flag")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"--flag .*gone cannot be read: No such file"):
        read_user_text(tmp_path / "gone", "--flag")
