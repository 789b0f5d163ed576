"""Tars and zips of pictures: layouts, the cache of their lists, and what is said of those that can not be taken."""

import io
import logging
import os
import pickle
import shutil
import tarfile
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from forms import tar, zipped
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image

from maect_jax.data.batches.training import training_batches
from maect_jax.data.sources import archives, index_cache, members
from maect_jax.data.sources import tar as tar_lists
from maect_jax.data.sources.archives import ArchiveSource
from maect_jax.data.sources.open import open_source
from maect_jax.errors import BadPicture, DataError

PACK = {".tar": tar, ".zip": zipped}


@pytest.fixture(scope="module")
def sharding():
    mesh = jax.sharding.Mesh(
        np.array(jax.devices()[:1]).reshape(1, 1), ("replica", "fsdp"), axis_types=(AxisType.Auto,) * 2
    )
    return NamedSharding(mesh, PartitionSpec(("replica", "fsdp")))


def png(value=0, side=4):
    file = io.BytesIO()
    Image.new("RGB", (side, side), (value, 2 * value, 255 - value)).save(file, "PNG")
    return file.getvalue()


def value_of(source, index):
    """What the picture was made of."""
    return int(source.image(index)[0, 0, 0])


def few(classes="ab", each=2):
    return [(f"{name}/{i}.png", png(10 * c + i)) for c, name in enumerate(classes) for i in range(each)]


def only_error(path, split="train", **changes):
    """The one line that opening ends in."""
    with pytest.raises(DataError) as caught:
        open_source(str(path), split, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("ending", PACK)
def test_archives_of_classes_are_read_in_the_order_of_class_and_name(ending, tmp_path):
    for c, name in enumerate(("dog", "cat")):
        members = [(f"{i}.png", png(100 * c + i)) for i in (2, 10, 1)] + [("deep/0.png", png(100 * c))]
        others = [("notes.txt", b"no picture"), (".hidden.png", b""), ("__MACOSX/._1.png", b""), ("x/.y/1.png", b"")]
        PACK[ending](tmp_path / "train" / f"{name}{ending}", members + others)
    source = open_source(str(tmp_path), "train")
    assert isinstance(source, ArchiveSource)
    assert source.classes == ("cat", "dog")
    assert source.labels.tolist() == [0] * 4 + [1] * 4
    assert source.file_names()[:4] == ["cat/1.png", "cat/10.png", "cat/2.png", "cat/deep/0.png"]
    assert [value_of(source, i) for i in range(8)] == [101, 110, 102, 100, 1, 10, 2, 0]
    assert source.where(1) == f"{tmp_path}/train/cat{ending}:10.png"


@pytest.mark.parametrize("ending", PACK)
def test_splits_are_found_in_folders_of_archives_and_in_archives(ending, tmp_path):
    for split, count in (("train", 3), ("val", 1)):
        for c, name in enumerate("ab"):
            PACK[ending](tmp_path / "sets" / split / f"{name}{ending}", [(f"{i}.png", png(c)) for i in range(count)])
        PACK[ending](tmp_path / "two" / f"{split}{ending}", few(each=count))
    members = [(f"train/{name}", content) for name, content in few(each=3)]
    one = PACK[ending](tmp_path / f"one{ending}", members + [(f"val/{name}", c) for name, c in few(each=1)])
    for name in (tmp_path / "sets", tmp_path / "two", one):
        train, test = open_source(str(name), "train"), open_source(str(name), "test")
        assert (len(train), len(test)) == (6, 2)
        assert train.classes == test.classes == ("a", "b")
        assert test.labels.tolist() == [0, 1]
    alone = open_source(str(tmp_path / "two" / f"val{ending}"), "test")
    assert alone.classes == ("a", "b")  # of train.zip beside it


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("top", ["", "set/", "other/deeper/"])
def test_the_folder_around_all_others_in_an_archive_says_nothing(ending, top, tmp_path):
    path = PACK[ending](tmp_path / f"set{ending}", [(top + name, content) for name, content in few()])
    source = open_source(str(path), "train")
    assert source.classes == ("a", "b")
    assert source.file_names() == ["a/0.png", "a/1.png", "b/0.png", "b/1.png"]


@pytest.mark.parametrize("ending", PACK)
def test_archive_of_pictures_alone_is_unlabelled(ending, tmp_path):
    path = PACK[ending](tmp_path / f"set{ending}", [("1.png", png(1)), ("0.png", png(0))])
    source = open_source(str(path), "train")
    assert (source.classes, source.labels.tolist()) == ((), [-1, -1])
    assert [value_of(source, i) for i in (0, 1)] == [0, 1]
    assert "none of test/, val/, validation/" in only_error(path, "test")


def test_test_archive_takes_the_class_numbers_of_training(tmp_path):
    path = zipped(tmp_path / "mine.zip", few("bc"))
    assert open_source(str(path), "test", classes=("a", "b", "c")).labels.tolist() == [1, 1, 2, 2]
    assert "class 'c'" in (message := only_error(path, "test", classes=("a", "b")))
    assert "is not in the training set (2 classes)" in message


def test_the_later_of_two_members_of_one_name_counts_as_after_unpacking(tmp_path):
    path = tar(tmp_path / "set.tar", [*few(), ("a/0.png", png(99))])
    assert value_of(open_source(str(path), "train"), 0) == 99


def test_archives_beside_class_folders_are_left_out_with_a_word(tmp_path, caplog):
    for name, content in few():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    tar(tmp_path / "backup.tar", few("c")).write_bytes(b"and damaged, which does not matter")
    with caplog.at_level(logging.WARNING):
        assert open_source(str(tmp_path), "train").classes == ("a", "b")
    assert "1 archives beside the pictures" in caplog.text


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("form", ["folder", ".tar", ".zip"])
def test_arrays_of_five_channels_stream_from_every_form(form, kind, tmp_path, sharding):
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, np.iinfo(kind).max, (9, 7 + i, 5), dtype=kind, endpoint=True) for i in range(4)]
    files = []
    for i, array in enumerate(arrays):
        file = io.BytesIO()
        np.save(file, array)
        files.append((f"{'ab'[i // 2]}/{i}.npy", file.getvalue()))
    if form == "folder":
        for name, content in files:
            (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "set" / name).write_bytes(content)
        path = tmp_path / "set"
    else:
        path = PACK[form](tmp_path / f"set{form}", files)
    source = open_source(str(path), "train", channels=5)
    for i, array in enumerate(arrays):
        expected = array if kind == np.uint8 else (array // 256).astype(np.uint8)
        np.testing.assert_array_equal(source.image(i), expected)
    settings = {"batch": 2, "seed": 0, "start_step": 0, "views": 2, "image_size": 6, "crop_scale": (0.5, 1.0)}
    loader = training_batches(source, sharding=sharding, resident_limit=0, **settings)
    try:
        batch = next(loader)
    finally:
        loader.close()
    assert batch["image"].shape == (2, 2, 6, 6, 5)
    spread = np.asarray(batch["image"], np.float64).std(axis=(0, 1, 2, 3))
    assert (spread > 10).all()  # every channel holds something
    with pytest.raises(DataError, match="set channels to 5"):
        open_source(str(path), "train").image(0)


# ------------------------------------------------------------------------------------------------------------- reading


def test_more_archives_than_are_kept_open_are_read_by_many_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "OPEN", 2)
    for c in range(8):
        PACK[".zip" if c % 2 else ".tar"](tmp_path / f"{c}{'.zip' if c % 2 else '.tar'}", few("x", 4)[:4])
    source = pickle.loads(pickle.dumps(open_source(str(tmp_path), "train")))
    ids = np.random.default_rng(0).integers(0, 32, 400).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: value_of(source, i), ids)) == [i % 4 for i in ids]


def test_stored_and_deflated_members_with_long_names_are_read(tmp_path):
    members = [(f"{'n' * 200}{i}/{'ü' * 80}{j}.png", png(10 * i + j, 60)) for i in range(2) for j in range(2)]
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = zipped(tmp_path / f"{method}.zip", members, method)
        with zipfile.ZipFile(path, "a") as archive:  # an extra field before the bytes, longer than what is read ahead
            facts = zipfile.ZipInfo(f"{'n' * 200}0/9.png")
            facts.extra = b"\x99\x99" + (2000).to_bytes(2, "little") + bytes(2000)
            archive.writestr(facts, png(9, 60), method)
        source = open_source(str(path), "train")
        assert [value_of(source, i) for i in range(5)] == [9, 0, 1, 10, 11]


LONG = st.text(st.characters(exclude_characters="\0/\\", exclude_categories=("Cs",)), min_size=1, max_size=150)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.lists(LONG, min_size=1, max_size=3), st.binary(max_size=1200)), max_size=6),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_tar_is_listed_as_the_standard_library_lists_it(tmp_path_factory, members, form):
    path = tmp_path_factory.mktemp("tars") / "x.tar"
    try:
        tar(path, [("/".join(parts), content) for parts, content in members], form)
    except ValueError:  # the name is too long for the format
        return
    with tarfile.open(path) as archive:
        expected = [(m.name, m.offset_data, m.size) for m in archive if m.isreg()]
    assert [tuple(entry) for entry in tar_lists.entries(path)] == expected


# --------------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index_cache, "LARGE", 1)
    return tmp_path / "cache" / "maect_jax" / "index"


def test_list_of_a_large_tar_is_made_once(cache, tmp_path, monkeypatch):
    path = tar(tmp_path / "set.tar", [("a/ü\udcff.png", png(7)), *few()])
    first = open_source(str(path), "train")
    assert len(list(cache.iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(members, "_tar_table", lambda path: pytest.fail("read again"))
        again = open_source(str(path), "train")
    assert again.file_names() == first.file_names() == ["a/0.png", "a/1.png", "a/ü\udcff.png", "b/0.png", "b/1.png"]
    assert [value_of(again, i) for i in range(5)] == [0, 1, 7, 10, 11]
    tar(path, few("xyz"))
    assert open_source(str(path), "train").classes == ("x", "y", "z")


def broken_caches():
    def arrays(**changed):
        good = {"names": np.frombuffer(b"a/0.png\0b/0.png\0", np.uint8), "numbers": np.array([[512, 9], [1536, 9]])}
        file = io.BytesIO()
        np.savez(file, **good | changed)
        return file.getvalue()

    return {
        "empty": b"",
        "foreign": b"#!/bin/sh\n",
        "cut off": arrays()[:-30],
        "pickle": arrays(numbers=np.array([{}, {}], object)),
        "beyond the end": arrays(numbers=np.array([[512, 9], [1 << 62, 1 << 62]])),
        "other shape": arrays(numbers=np.zeros((3, 2), np.int64)),
        "floats": arrays(numbers=np.zeros((2, 2))),
        "no names": arrays(names=np.zeros((0,), np.float32)),
    }


@pytest.mark.parametrize("kind", broken_caches())
def test_damaged_or_foreign_cache_is_made_anew(kind, cache, tmp_path):
    path = tar(tmp_path / "set.tar", few())
    open_source(str(path), "train")
    (kept,) = cache.iterdir()
    good = kept.read_bytes()
    kept.write_bytes(broken_caches()[kind])
    source = open_source(str(path), "train")
    assert [value_of(source, i) for i in range(4)] == [0, 1, 10, 11]
    with np.load(kept) as anew, np.load(io.BytesIO(good)) as before:
        assert all((anew[key] == before[key]).all() for key in before.files)


def test_cache_that_can_not_be_written_is_no_error(cache, tmp_path):
    cache.parent.parent.write_text("a file, not a folder")
    assert len(open_source(str(tar(tmp_path / "set.tar", few())), "train")) == 4


# ------------------------------------------------------------------------------------------------ refused, in one line


@pytest.mark.parametrize("ending", PACK)
def test_archive_that_is_cut_off_anywhere_is_named_when_it_is_opened(ending, tmp_path):
    whole = PACK[ending](tmp_path / f"whole{ending}", few()).read_bytes()
    path = tmp_path / f"part{ending}"
    content = whole.rstrip(b"\0") if ending == ".tar" else whole
    for length in range(0, len(content), 97):
        path.write_bytes(whole[:length])
        assert only_error(path).startswith(str(path))


def test_tar_without_end_mark_is_cut_off_between_two_members(tmp_path):
    path = tar(tmp_path / "set.tar", few())
    *_, last = tar_lists.entries(path)
    os.truncate(path, last.offset - 512)
    assert "is cut off: it ends at byte" in only_error(path)


def test_joined_tars_are_refused_and_not_read_in_part(tmp_path):
    first, second = (tar(tmp_path / f"{name}.tar", few(name)).read_bytes() for name in ("ab", "cd"))
    (tmp_path / "both.tar").write_bytes(first + second)
    assert "goes on after its end mark" in only_error(tmp_path / "both.tar")


def test_every_changed_byte_of_a_tars_header_is_noticed(tmp_path):
    path = tar(tmp_path / "set.tar", few(), tarfile.USTAR_FORMAT)
    whole, (_, second, *_) = path.read_bytes(), tar_lists.entries(path)
    for at in range(second.offset - 512, second.offset, 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        if whole[at] in b" \0" and 148 <= at % 512 < 156:
            continue  # the fill of the checksum's own field
        assert "is damaged: no header at byte" in only_error(path), at


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_every_changed_byte_of_a_zip_is_named_or_harmless(method, tmp_path):
    path = zipped(tmp_path / "set.zip", few(), method)
    whole = path.read_bytes()
    expected = {name: image for name, image in few()}
    noticed = 0
    for at in np.random.default_rng(0).permutation(len(whole))[:300].tolist():
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        try:
            source = open_source(str(path), "train")
        except DataError as error:
            assert "\n" not in str(error)
            noticed += 1
            continue
        for i, name in enumerate(source.file_names()):
            try:
                content, _ = source.read(i)
            except BadPicture as error:
                assert error.where == source.where(i)
                noticed += 1
            else:
                assert content in expected.values(), name  # a changed name or attribute, never changed pictures
    assert noticed > 150


@pytest.mark.parametrize("ending", PACK)
def test_member_that_is_cut_off_after_opening_is_a_bad_picture_with_archive_and_name(ending, tmp_path):
    path = PACK[ending](tmp_path / f"set{ending}", few())
    source = open_source(str(path), "train")
    os.truncate(path, path.stat().st_size // 20 if ending == ".tar" else 40)
    with pytest.raises(BadPicture, match="is cut off") as caught:
        [source.read(i) for i in range(4)]
    assert caught.value.where.startswith(f"{path}:")
    path.unlink()
    with pytest.raises(BadPicture, match="No such file"):
        pickle.loads(pickle.dumps(source)).read(0)


@pytest.mark.parametrize(("mode", "command"), [("gz", "gunzip"), ("bz2", "bunzip2"), ("xz", "unxz")])
@pytest.mark.parametrize("ending", [".tar", ".tar.{}"])
def test_compressed_tar_is_refused_with_the_command_that_unpacks_it(mode, command, ending, tmp_path):
    path = tmp_path / f"set{ending.format(mode)}"
    with tarfile.open(path, f"w:{mode}") as archive:
        archive.addfile(tarfile.TarInfo("a/0.png"))
    assert f"unpack it once: {command} {path.name}" in only_error(path)


def test_folder_of_compressed_tars_is_told_to_unpack_them(tmp_path):
    for name in "ab":
        with tarfile.open(tmp_path / f"{name}.tar.gz", "w:gz") as archive:
            archive.addfile(tarfile.TarInfo("0.png"))
    assert "unpack it once: gunzip a.tar.gz" in only_error(tmp_path)


def test_tar_of_tars_is_told_to_be_unpacked_once(tmp_path):
    path = tar(tmp_path / "ILSVRC2012_img_train.tar", [("n01440764.tar", b"x" * 1024), ("n01443537.tar", b"")])
    assert "holds archives (n01440764.tar, …) and no pictures; unpack it once" in only_error(path)


def test_encrypted_and_strangely_packed_zips_are_refused_by_name(tmp_path):
    path = zipped(tmp_path / "set.zip", few())
    whole = path.read_bytes()
    listed = whole.index(b"PK\x01\x02")
    path.write_bytes(whole[: listed + 8] + b"\x01" + whole[listed + 9 :])
    assert "a/0.png is encrypted; unpack it" in only_error(path)
    zipped(path, few(), zipfile.ZIP_BZIP2)
    assert "a/0.png is packed by bzip2; pack it anew with deflate or store" in only_error(path)


def test_ambiguous_and_empty_archives_are_refused(tmp_path):
    tar(tmp_path / "both" / "cat.tar", few("x"))
    zipped(tmp_path / "both" / "cat.zip", few("x"))
    assert "has both cat.tar and cat.zip; take one of them out" in only_error(tmp_path / "both")
    assert "only one class, 'a'" in only_error(tar(tmp_path / "one.tar", few("a")))
    assert "no pictures in" in only_error(tar(tmp_path / "text.tar", [("a/notes.txt", b"words")]))
    tar(tmp_path / "holes" / "cat.tar", few("x"))
    tar(tmp_path / "holes" / "dog.tar", [])
    assert "holes/dog' holds no pictures; fill or remove it" in only_error(tmp_path / "holes")
    (tmp_path / "no.tar").write_bytes(os.urandom(4096))
    assert only_error(tmp_path / "no.tar") == f"{tmp_path / 'no.tar'}: is no tar"
    (tmp_path / "no.zip").write_bytes(b"words" * 100)
    assert "is no zip, or is damaged or cut off" in only_error(tmp_path / "no.zip")
    assert "did you mean" in only_error(tmp_path / "noo.zip")
    assert "no file 'photos.zip' on this machine" in only_error("photos.zip")


# ------------------------------------------------------------------------------------------------------------- hostile


@pytest.mark.parametrize("ending", PACK)
def test_name_that_leads_out_of_the_archive_is_refused(ending, tmp_path):
    path = PACK[ending](tmp_path / "sub" / f"set{ending}", [*few(), ("a/../../../out.png", png())])
    assert "a/../../../out.png leads out of the archive" in only_error(path)
    assert not (tmp_path / "out.png").exists()


def test_absolute_names_stay_names(tmp_path):
    path = zipped(tmp_path / "set.zip", [(f"/etc/{name}", content) for name, content in few()])
    assert open_source(str(path), "train").file_names()[0] == "a/0.png"


def test_links_and_devices_are_no_pictures(tmp_path, caplog):
    path = tmp_path / "set.tar"
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
    with tarfile.open(path, "w") as archive:
        for kind in kinds:
            facts = tarfile.TarInfo(f"a/{kind.decode()}.png")
            facts.type, facts.linkname, facts.devmajor = kind, "/etc/passwd", 1
            archive.addfile(facts)
        for name, content in few():
            facts = tarfile.TarInfo(name)
            facts.size = len(content)
            archive.addfile(facts, io.BytesIO(content))
    with caplog.at_level(logging.WARNING):
        assert open_source(str(path), "train").file_names() == ["a/0.png", "a/1.png", "b/0.png", "b/1.png"]
    assert "2 links to pictures are left out" in caplog.text
    zip_path = zipped(tmp_path / "set.zip", few())
    with zipfile.ZipFile(zip_path, "a") as archive:
        link = zipfile.ZipInfo("a/link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    assert len(open_source(str(zip_path), "train")) == 4


def test_zip_bomb_is_not_unpacked(tmp_path):
    path, size = tmp_path / "set.zip", 1 << 28
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("a/bomb.png", "w") as file:
            for _ in range(size >> 20):
                file.write(bytes(1 << 20))
        archive.writestr("b/good.png", png(5))
    whole = path.read_bytes()
    listed = whole.index(b"PK\x01\x02")
    for declared, reason in ((5 << 29, "bytes are more than"), (1000, "does not unpack to the 1000 bytes")):
        path.write_bytes(whole[: listed + 24] + declared.to_bytes(4, "little") + whole[listed + 28 :])
        source = open_source(str(path), "train")
        tracemalloc.start()
        try:
            with pytest.raises(BadPicture, match=reason) as caught:
                source.read(0)
            assert tracemalloc.get_traced_memory()[1] < 8 << 20  # of 256 MiB
        finally:
            tracemalloc.stop()
        assert caught.value.where == f"{path}:a/bomb.png"
        assert value_of(source, 1) == 5


@pytest.mark.parametrize("claimed", [10**6, 1 << 33, 1 << 62, (1 << 80) + 1])
def test_header_that_claims_a_huge_size_is_refused_without_reading_it(claimed, tmp_path):
    path = tmp_path / "set.tar"
    for kind in (b"0", b"x", b"L"):
        facts = tarfile.TarInfo("a/0.png")
        facts.type = kind
        header = bytearray(facts.tobuf(tarfile.GNU_FORMAT))
        header[124:136] = b"\x80" + claimed.to_bytes(11, "big")
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        path.write_bytes(bytes(header) + bytes(2048))
        assert any(word in only_error(path) for word in ("is cut off", "has an extended header of"))


def test_sparse_file_in_a_tar_is_refused_by_name(tmp_path):
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        facts = tarfile.TarInfo("a/0.png")
        facts.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "1000000000000"}
        archive.addfile(facts)
    assert "a/0.png is a sparse file; pack it anew" in only_error(path)
    facts = tarfile.TarInfo("a/0.png")
    facts.type = tarfile.GNUTYPE_SPARSE
    path.write_bytes(facts.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    assert "a/0.png is a sparse file" in only_error(path)


def test_names_of_members_can_not_break_an_errors_line(tmp_path):
    path = tar(tmp_path / "set.tar", [("a/x\ny\x1b[2J.png", b"no picture"), ("b/\udcff.png", png())])
    source = open_source(str(path), "train")
    with pytest.raises(BadPicture) as caught:
        source.image(0)
    assert str(caught.value).isprintable()
    assert value_of(source, 1) == 0
    source.where(1).encode()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_mangled_archives_end_in_one_line(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("mangled")
    ending = data.draw(st.sampled_from(list(PACK)))
    path = PACK[ending](folder / f"set{ending}", few())
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at, part = data.draw(st.integers(0, len(content))), data.draw(st.binary(max_size=20))
        content[at : at + data.draw(st.sampled_from([0, len(part), 200]))] = part
    path.write_bytes(content)
    try:
        source = open_source(str(path), "train")
    except DataError as error:
        assert "\n" not in str(error)
    else:
        for i in range(len(source)):
            try:
                source.image(i)
            except DataError as error:
                assert "\n" not in str(error)
    shutil.rmtree(folder)
