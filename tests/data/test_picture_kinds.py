"""Which endings are taken for pictures, and what is said of pictures whose kind is not read."""

import io
import logging
import os

import numpy as np
import pytest
from forms import tar, zipped
from PIL import Image

from maect_jax.data.sources import index_cache
from maect_jax.data.sources.layout import UNREAD
from maect_jax.data.sources.open import open_source
from maect_jax.errors import DataError


def encoded(kind="PNG", value=0):
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (value, 90, 30)).save(file, kind)
    return file.getvalue()


def folder(path, members):
    for name, content in members:
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return path


def class_tars(path, members):
    for top in sorted({name.split("/")[0] for name, _ in members}):
        tar(path / f"{top}.tar", [(n.partition("/")[2], c) for n, c in members if n.startswith(f"{top}/")])
    return path


WRITE = {
    "folder": folder,
    "tar per class": class_tars,
    "tar": lambda path, members: tar(path.with_suffix(".tar"), members),
    "zip": lambda path, members: zipped(path.with_suffix(".zip"), members),
}
READ = [(f"{name}/{i}.png", encoded(value=i)) for name in "ab" for i in range(2)]
# In two folders of the same class, with what systems leave beside pictures and what is no picture at all
NOT_READ = [("b/IMG_2.HEIC", b"2"), ("a/deep/IMG_1.heic", b"1"), ("a/3.avif", b"3")]
OTHERS = [("a/._0.heic", b""), ("a/.hidden.jxl", b""), ("a/notes.txt", b"no picture")]


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if "kind is not read" in record.getMessage()]


@pytest.mark.parametrize("form", WRITE)
def test_jfif_is_read_as_the_jpeg_it_is(form, tmp_path):
    jpegs = [(f"{name}/0{ending}", encoded("JPEG", 200)) for name, ending in (("a", ".jfif"), ("b", ".JFIF"))]
    source = open_source(str(WRITE[form](tmp_path / "set", jpegs)), "train")
    assert source.file_names() == ["a/0.jfif", "b/0.JFIF"]
    with Image.open(io.BytesIO(jpegs[0][1])) as image:
        np.testing.assert_array_equal(source.image(1), np.asarray(image))


def test_jfif_is_the_picture_of_a_webdataset_sample(tmp_path):
    samples = [(f"{i}.{field}", c) for i in range(2) for field, c in (("jfif", encoded("JPEG")), ("cls", b"%d" % i))]
    tar(tmp_path / "train-000000.tar", samples)
    assert open_source(str(tmp_path), "train").labels.tolist() == [0, 1]


@pytest.mark.parametrize("form", WRITE)
def test_pictures_of_kinds_that_are_not_read_are_left_out_with_one_warning(form, tmp_path, caplog):
    path = WRITE[form](tmp_path / "set", READ + NOT_READ + OTHERS)
    source = open_source(str(path), "train")
    assert source.file_names() == [name for name, _ in READ]
    assert [int(source.image(i)[0, 0, 0]) for i in range(4)] == [0, 1, 0, 1]
    (said,) = warnings(caplog)
    assert said.startswith(f"data.train: 3 pictures of {path} are left out")
    assert "the first is a/3.avif; convert them to JPEG" in said


@pytest.mark.parametrize("ending", UNREAD)
def test_every_ending_that_is_not_read_is_warned_of(ending, tmp_path, caplog):
    open_source(str(folder(tmp_path, [*READ, (f"a/1{ending}", b"")])), "train")
    (said,) = warnings(caplog)
    assert f"1 pictures of {tmp_path} " in said and f"the first is a/1{ending};" in said


@pytest.mark.parametrize("form", WRITE)
def test_nothing_is_said_where_all_pictures_are_read(form, tmp_path, caplog):
    open_source(str(WRITE[form](tmp_path / "set", READ + OTHERS)), "train")
    assert warnings(caplog) == []


@pytest.mark.parametrize("form", ["folder", "tar", "zip"])
def test_only_pictures_of_the_split_are_counted(form, tmp_path, caplog):
    members = [(f"{split}/{name}", content) for split in ("train", "val") for name, content in READ]
    path = WRITE[form](tmp_path / "set", [*members, ("val/a/x.heic", b"")])
    open_source(str(path), "train")
    assert warnings(caplog) == []
    open_source(str(path), "test")
    (said,) = warnings(caplog)
    assert said.startswith("data.test: 1 pictures")


def test_pictures_in_a_flat_folder_are_counted(tmp_path, caplog):
    assert (
        len(open_source(str(folder(tmp_path, [("1.png", encoded()), ("2.heic", b""), ("3.nef", b"")])), "train")) == 1
    )
    (said,) = warnings(caplog)
    assert "2 pictures" in said and "the first is 2.heic;" in said


@pytest.mark.parametrize("form", WRITE)
def test_where_there_is_nothing_else_the_warning_comes_before_the_error(form, tmp_path, caplog):
    with pytest.raises(DataError, match="no pictures"):
        open_source(str(WRITE[form](tmp_path / "set", NOT_READ)), "train")
    assert len(warnings(caplog)) == 1


def test_list_of_a_large_tar_that_was_kept_warns_again(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(index_cache, "LARGE", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tar(tmp_path / "set.tar", READ + NOT_READ)
    first = open_source(str(path), "train")
    assert len(os.listdir(next((tmp_path / "cache").rglob("index")))) == 1
    with monkeypatch.context() as patch:
        patch.setattr("maect_jax.data.sources.members._tar_table", lambda path: pytest.fail("read again"))
        again = open_source(str(path), "train")
    assert again.file_names() == first.file_names() == [name for name, _ in READ]
    assert [again.read(i) for i in range(4)] == [first.read(i) for i in range(4)]
    assert len(set(warnings(caplog))) == 1 and len(warnings(caplog)) == 2


def test_names_that_are_no_text_are_warned_of_in_one_line(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    path = tar(tmp_path / "set.tar", [*READ, ("a/1\n2.heic", b"")])
    open_source(str(path), "train")
    (said,) = warnings(caplog)
    assert "\n" not in said and r"1\n2.heic" in said
