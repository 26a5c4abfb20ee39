import io
import os
import tarfile
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.data.index.tar_headers import Member, TornTarError, looks_like_tar, members


def walk(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        return list(members(fd))
    finally:
        os.close(fd)


def walk_torn(path):
    """(members, error) of a tar that may be cut short."""
    found = []
    fd = os.open(path, os.O_RDONLY)
    try:
        for member in members(fd):
            found.append(member)
    except TornTarError as error:
        return found, str(error)
    finally:
        os.close(fd)
    return found, ""


NAMES = [
    "000000001.jpg",
    "a folder/" + "x" * 90 + "/" + "y" * 60 + ".txt",  # ustar: split into prefix and name
    "z" * 300 + ".json",  # GNU and pax: an extended header
    "größe/猫.webp",
    "empty.txt",
]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(tmp_path, format):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=format) as tar:
        folder = tarfile.TarInfo("a folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for number, name in enumerate(NAMES):
            if format == tarfile.USTAR_FORMAT and name.startswith("z"):
                continue
            info = tarfile.TarInfo(name)
            info.mtime = 1.5  # webdataset writes such times, as a pax header in front of each member
            info.size = 700 * number if name != "empty.txt" else 0
            tar.addfile(info, io.BytesIO(bytes(info.size)))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "000000001.jpg"
        tar.addfile(link)
    with tarfile.open(path) as tar:
        expected = [Member(member.name, member.offset_data, member.size) for member in tar if member.isfile()]
    *found, linked = walk(path)
    assert found == expected
    assert (linked.name, linked.size, linked.odd) == ("link.jpg", 0, "a symbolic link to 000000001.jpg")
    assert looks_like_tar(path)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_member_of_nine_gib(tmp_path, format):
    """Sizes that octal digits cannot hold: base 256 in GNU tars, a pax header in pax ones. The file is sparse."""
    path, size = tmp_path / "a.tar", 9 << 30
    big, small = tarfile.TarInfo("big.jpg"), tarfile.TarInfo("small.jpg")
    big.size, small.size = size, 0
    with path.open("wb") as file:
        file.write(big.tobuf(format=format))
        offset = file.tell()
        file.seek(size, os.SEEK_CUR)
        file.write(small.tobuf(format=format) + bytes(1024))
    assert walk(path) == [Member("big.jpg", offset, size), Member("small.jpg", offset + size + 512, 0)]


def test_a_cut_tar_gives_its_whole_members_and_says_where_it_ends(tmp_path, make_tar):
    path, cut = tmp_path / "a.tar", tmp_path / "cut.tar"
    make_tar(path, [(f"{number}.jpg", bytes([number]) * 600) for number in range(4)], tarfile.PAX_FORMAT)
    whole, data = walk(path), path.read_bytes()
    end_mark = whole[-1].offset + 1024
    for length in [*range(0, end_mark, 100), end_mark]:
        cut.write_bytes(data[:length])
        found, error = walk_torn(cut)
        assert found == [member for member in whole if member.offset + member.size <= length]
        assert f"ends at byte {length}" in error


def test_a_pax_header_of_very_many_records_is_read_in_no_time(tmp_path):
    """A quarter of a million in its MiB: copying the rest at each would take minutes."""
    records = b"4 =\n" * 262_000
    header = tarfile.TarInfo("pax")
    header.type, header.size = b"x", len(records)
    member = tarfile.TarInfo("1.jpg")
    padding = bytes(-len(records) % 512)
    (tmp_path / "a.tar").write_bytes(header.tobuf() + records + padding + member.tobuf() + bytes(1024))
    began = time.process_time()
    assert [member.name for member in walk(tmp_path / "a.tar")] == ["1.jpg"]
    assert time.process_time() - began < 5


def test_garbage_after_a_member_is_reported(tmp_path, make_tar):
    path = tmp_path / "a.tar"
    make_tar(path, [("1.jpg", b"1"), ("2.jpg", b"2")])
    data = bytearray(path.read_bytes())
    data[1024:1034] = b"\xff" * 10
    path.write_bytes(data)
    found, error = walk_torn(path)
    assert [member.name for member in found] == ["1.jpg"]
    assert "no tar header at byte 1024" in error


@pytest.mark.parametrize("fill", [b"\xff", b"a", b"\x01\xfe\x80"])
def test_a_checksum_is_the_whole_sum_of_the_bytes(tmp_path, fill):
    """That of 0xFF throughout is more than any that is taken modulo 65521 or 65536."""
    header = (fill * 512)[:148] + b" " * 8 + (fill * 512)[:356]
    for off in (0, 1, -1, 65521, -65521, 65536, -65536):
        digits = b"%07o\0" % ((sum(header) + off) % 8**7)
        (tmp_path / "a").write_bytes(header[:148] + digits + header[156:])
        assert looks_like_tar(tmp_path / "a") == (off == 0)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damage_gives_members_inside_the_file_or_the_clear_error(tmp_path_factory, data):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("é1.jpg", "1.txt", "2" * 120 + ".jpg"):
            info = tarfile.TarInfo(name)
            info.size = 100
            tar.addfile(info, io.BytesIO(bytes(100)))
    content = bytearray(file.getvalue()[:8192])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
        block = content[place // 512 * 512 :][:512]
        if data.draw(st.booleans()):  # as if the damaged header had been written so
            block[148:156] = b" " * 8
            content[place // 512 * 512 + 148 : place // 512 * 512 + 156] = b"%06o\0 " % sum(block)
    path = tmp_path_factory.mktemp("fuzz") / "a.tar"
    path.write_bytes(content)
    found, _ = walk_torn(path)
    assert all(member.offset + member.size <= len(content) for member in found)
