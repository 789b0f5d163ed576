"""Zip archives made to harm: members are where their list says, once each, and unpack to what a file of that size can
honestly hold.
"""

import os
import pickle
import stat
import struct
import zipfile
import zlib

import ml_dtypes
import numpy as np
import pytest
from hostile import directory, directory_end, local, quoting_bomb, tensor, with_directory

from maect_jax.errors import CheckpointError
from maect_jax.exchange.archive import Archive
from maect_jax.exchange.pth import read_pth
from maect_jax.exchange.tensors import read_tensors
from torch_files import attempt, crafted, refusal

SIX = np.arange(6, dtype="<f4").tobytes()


def written(path, content: bytes):
    path = path / "crafted.pth"
    path.write_bytes(content)
    return path


def opened(path, name) -> bytes:
    with open(path, "rb") as file:
        return Archive(file).read(name)


def bounded_refusal(path, memory=1 << 22, read=read_pth) -> str:
    """Why a file is refused; to find out takes less than `memory` bytes."""
    assert not attempt(path, read, memory=memory)
    return refusal(path, read)


def test_members_are_read_whether_or_not_they_are_packed(tmp_path):
    noise = np.random.default_rng(0).normal(size=(50, 40)).astype("<f4")
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", noise=noise)
        read, kind = read_tensors(tmp_path / "x.npz")
        assert kind == "npz"
        np.testing.assert_array_equal(read["noise"], noise)


def test_storages_of_torch_files_are_not_packed(tmp_path):
    """torch.save packs none, so that no file takes more memory than its own size."""
    for packing in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = crafted(tmp_path, tensor(), {"0": SIX}, packing=packing)
        if packing == zipfile.ZIP_STORED:
            assert attempt(path)
        else:
            assert "packs 'archive/data/0', which torch.save does not" in bounded_refusal(path)


def test_weights_of_every_type_shrink_less_than_a_bomb(tmp_path):
    """float32 that was bfloat16 shrinks most of what is honest."""
    x = np.random.default_rng(0).normal(0, 0.02, (1 << 19,))
    for saved in (x, x.astype("f4"), x.astype("f2"), x.astype(ml_dtypes.bfloat16).astype("f4")):
        np.savez_compressed(tmp_path / "x.npz", x=saved)
        assert saved.nbytes > 1.9 * (1 << 19)
        np.testing.assert_array_equal(read_tensors(tmp_path / "x.npz")[0]["x"], saved)


def test_small_files_of_zeros_are_no_bombs(tmp_path):
    """np.savez_compressed packs the biases of a fresh model a hundredfold."""
    np.savez_compressed(tmp_path / "x.npz", bias=np.zeros(3072))
    content = opened(tmp_path / "x.npz", "bias.npy")
    assert content.endswith(bytes(8 * 3072)) and len(content) > 50 * os.path.getsize(tmp_path / "x.npz")


def test_large_sizes_are_found_in_the_extra_field(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive, archive.open("a/b", "w", force_zip64=True) as member:
        member.write(b"content")
    assert opened(tmp_path / "x.zip", "a/b") == b"content"
    numbers = [0, zlib.crc32(b"content"), 7, 7]
    body = local(b"a", *numbers) + b"content"
    entry = bytearray(directory([(b"a", *numbers[:2], 0xFFFFFFFF, 0xFFFFFFFF, 0)]))
    entry[30:32] = struct.pack("<H", 24)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(entry) + 24, len(body), 0)
    for extra in (struct.pack("<2H2Q4x", 1, 16, 7, 7), struct.pack("<2H2H2Q", 9, 0, 1, 16, 7, 7)):
        assert opened(written(tmp_path, body + entry + extra + end), "a") == b"content"
    for extra, why in (
        (bytes(24), "overlap"),
        (struct.pack("<2H20x", 2, 20), "overlap"),
        (struct.pack("<2H2Q4x", 1, 16, 7, 1 << 63), "declares 7 bytes for 'a', which has 9223372036854775808"),
        (b"\1\0\xff" * 8, "breaks off"),
    ):
        assert why in bounded_refusal(written(tmp_path, body + entry + extra + end))


def test_members_beyond_four_gigabytes_are_found(tmp_path):
    """In a sparse file. A training checkpoint of a ViT-H is twice as large."""
    start, numbers = 5 << 30, (0, zlib.crc32(SIX), 24, 24)
    member = local(b"a/b", *numbers) + SIX
    entry = bytearray(directory([(b"a/b", *numbers, 0xFFFFFFFF)])) + struct.pack("<2HQ", 1, 8, start)
    entry[30:32] = struct.pack("<H", 12)
    with open(tmp_path / "x", "wb") as file:
        file.write(local(b"a/c", *numbers) + SIX)
        file.seek(start)
        file.write(member + directory_end(1, entry, start + len(member)))
    assert opened(tmp_path / "x", "a/b") == SIX


def test_bombs_are_refused_before_they_unpack(tmp_path):
    zeros, small = bytes(1 << 26), 1 << 20
    bomb = tmp_path / "bomb"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", zeros)
    assert "bytes of content in a file of" in bounded_refusal(bomb, read=read_tensors)
    content = bomb.read_bytes()
    lying = content.replace(struct.pack("<I", len(zeros)), struct.pack("<I", small))
    assert lying != content
    path = written(tmp_path, lying)  # a small size is declared, and the content is as large as before
    assert "does not unpack to the 1048576 bytes declared" in bounded_refusal(path, read=read_tensors)


def test_packed_members_end_where_they_should(tmp_path):
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    begun = packer.compress(SIX) + packer.flush(zlib.Z_SYNC_FLUSH)
    whole = begun + packer.flush()
    for packed, good in ((whole, True), (begun, False), (whole + b"more", False)):
        numbers = (8, zlib.crc32(SIX), len(packed), 24)
        path = written(tmp_path, with_directory(local(b"a", *numbers) + packed, [(b"a", *numbers, 0)]))
        if good:
            assert opened(path, "a") == SIX
        else:
            with pytest.raises(CheckpointError, match="does not unpack to the 24 bytes declared"):
                opened(path, "a")


def test_bombs_whose_members_quote_each_other_are_refused(tmp_path):
    members, size = 30, 1 << 20
    bomb = quoting_bomb(members, size)
    assert len(bomb) < 1 << 13
    start = len(local(b"archive/data/0", 0, 0, 0, 0))
    assert len(zlib.decompress(bomb[start:], -15)) > size  # the first member does unpack, through all others
    assert "overlap" in bounded_refusal(written(tmp_path, bomb))


def test_members_in_one_place_are_refused(tmp_path):
    numbers = (0, zlib.crc32(SIX), 24, 24)
    body = local(b"archive/data/0", *numbers) + SIX
    for name in (b"archive/data/0", b"archive/data/1"):
        path = written(tmp_path, with_directory(body, [(b"archive/data/0", *numbers, 0), (name, *numbers, 0)]))
        assert ("two members" if name.endswith(b"0") else "overlap") in bounded_refusal(path)


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ((b"a", 0, 0, 24, 1 << 31, 0), "declares 2147483648 bytes for 'a', which has 24"),
        ((b"a", 0, 0, 1 << 31, 1 << 31, 0), "overlap"),
        ((b"a", 8, 0, 24, 0xFFFFFFFE, 0), "declares 4294967294 bytes of content"),
        ((b"a", 0, 0, 24, 24, 0xFFFFFFF0), "overlap"),
        ((b"a", 0, 0, 24, 24, 1), "overlap"),
        ((b"a", 12, 0, 24, 24, 0), "by method 12"),
        ((b"a" * 1001, 0, 0, 24, 24, 0), "a name of 1001 bytes"),
        ((b"\xff", 0, 0, 24, 24, 0), "whose name is no text"),
        ((b"", 0, 0, 24, 24, 0), "leaves its folder"),
    ],
)
def test_entries_that_lie_are_refused(entry, why, tmp_path):
    path = written(tmp_path, with_directory(local(b"a", 0, 0, 24, 24) + SIX, [entry]))
    assert why in bounded_refusal(path)


def test_lists_of_too_many_members_are_not_followed(tmp_path):
    entries = [(f"{i}".encode(), 0, 0, 0, 0, 0) for i in range(100_001)]
    path = written(tmp_path, with_directory(local(b"0", 0, 0, 0, 0), entries))
    assert "has 100001 members" in bounded_refusal(path, memory=1 << 20)
    entries = [(bytes(1000), 0, 0, 0, 0, 0)] * 17_000
    path = written(tmp_path, with_directory(local(b"0", 0, 0, 0, 0), entries))
    assert "has 17000 members, listed in 17782000 bytes" in bounded_refusal(path, memory=1 << 20)


def test_a_file_larger_than_any_weights_is_refused_unread(tmp_path):
    """A sparse file: it takes no place on the disk."""
    path = written(tmp_path, b"PK\3\4")
    os.truncate(path, 1 << 40)
    assert "at most 68719476736 are read" in bounded_refusal(path)


@pytest.mark.parametrize("name", ["../x", "/x", "archive/..\\x", "archive//x", ""])
def test_members_that_leave_their_folder_are_refused(name, tmp_path):
    path = crafted(tmp_path, tensor(), {"0": SIX})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(zipfile.ZipInfo(name), b"")
    assert "leaves its folder" in bounded_refusal(path)


def test_links_are_refused(tmp_path):
    path = crafted(tmp_path, tensor(), {"0": SIX})
    link = zipfile.ZipInfo("archive/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    assert "a link among its members, 'archive/link'" in bounded_refusal(path)


def test_archives_that_can_be_read_in_two_ways_are_refused(tmp_path):
    path = crafted(tmp_path, tensor(), {"0": SIX})
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data/0", bytes(24))
    assert "two members named 'archive/data/0'" in bounded_refusal(path)
    path = crafted(tmp_path, tensor(), {"0": SIX})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/data.pkl", pickle.dumps({}, 2))
    assert "2 members data.pkl" in bounded_refusal(path)
    content = crafted(tmp_path, tensor(), {"0": SIX}).read_bytes()
    assert "does not end as a zip archive does" in bounded_refusal(written(tmp_path, content + content[:100]))
    assert "not where its end says" in bounded_refusal(written(tmp_path, b"PK\3\4" + content))


def test_two_ends_that_do_not_agree_are_refused(tmp_path):
    numbers = (0, zlib.crc32(SIX), 24, 24)
    content = bytearray(with_directory(local(b"a", *numbers) + SIX, [(b"a", *numbers, 0)]))
    assert opened(written(tmp_path, content), "a") == SIX
    for magic, at in ((b"PK\6\7", 8), (b"PK\6\6", 0)):
        changed = bytearray(content)
        changed[changed.index(magic) + at] ^= 1
        assert "the records at its end do not agree" in bounded_refusal(written(tmp_path, changed))


@pytest.mark.parametrize(
    ("part", "at", "value", "why"),
    [
        (b"PK\1\2", 8, b"\x01", "encrypted"),
        (b"PK\1\2", 10, b"\x0c", "by method 12"),
        (b"PK\1\2", 16, b"\0\0\0\0", "CRC"),
        (b"PK\1\2", 20, b"\xff\xff\xff\x7f", "declares 146 bytes for 'archive/data.pkl', which has 2147483647"),
        (b"PK\1\2", 28, b"\xff\xff", "breaks off"),
        (b"PK\1\2", 30, b"\xff\xff", "breaks off"),
        (b"PK\1\2", 46, b"A", "not where the list of members says"),
        (b"PK\3\4", 0, b"QK", "no file of torch.save"),
        (b"PK\3\4", 26, b"\xff\xff", "ends too early"),
        (b"PK\3\4", 28, b"\xff\xff", "not where the list of members says"),
        (b"PK\5\6", 4, b"\1", "not where its end says"),
        (b"PK\5\6", 10, b"\1", "goes on after the 1"),
        (b"PK\5\6", 10, b"\3", "breaks off"),
        (b"PK\5\6", 12, b"\0\0\0\0", "not where its end says"),
        (b"PK\5\6", 16, b"\xff\xff\xff\xff", "not where its end says"),
    ],
)
def test_numbers_of_a_zip_file_that_do_not_agree_are_refused(part, at, value, why, tmp_path):
    path = crafted(tmp_path, tensor(), {"0": SIX})
    content = bytearray(path.read_bytes())
    start = content.index(part) + at
    content[start : start + len(value)] = value
    path.write_bytes(content)
    assert why in bounded_refusal(path)
