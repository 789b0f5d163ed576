"""Parquet files of pictures: which columns are taken, splits, reading by row group, and what is said of damage."""

import json
import logging
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_archives import only_error, png, value_of

from maect_jax.data.sources import parquet, parquet_columns
from maect_jax.data.sources.open import open_source
from maect_jax.data.sources.parquet import ParquetSource
from maect_jax.errors import BadPicture, DataError

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def images(count, start=0, kind=STRUCT):
    """A column whose pictures have the value of their row."""
    encoded = [png(start + i) for i in range(count)]
    values = encoded if kind != STRUCT else [{"bytes": e, "path": f"{start + i}.png"} for i, e in enumerate(encoded)]
    return pa.array(values, kind)


def write(path, columns, features=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, **options)
    return path


def class_label(*names):
    return {"_type": "ClassLabel", "names": list(names)}


def hugging_face(folder, splits=("train", "test"), labels=(0, 1, 1, 0, 1)):
    """Two files a split, in row groups of 2."""
    for split in splits:
        for i in range(2):
            columns = {"image": images(len(labels), 10 * i), "label": list(labels)}
            features = {"label": class_label("cat", "dog")}
            write(folder / f"data/{split}-{i:05}-of-00002.parquet", columns, features, row_group_size=2)
    return folder


def test_files_of_a_split_are_read_in_order(tmp_path):
    train, test = (open_source(str(hugging_face(tmp_path)), split) for split in ("train", "test"))
    assert isinstance(train, ParquetSource)
    assert train.classes == test.classes == ("cat", "dog")
    assert train.labels.tolist() == test.labels.tolist() == [0, 1, 1, 0, 1] * 2
    assert [value_of(train, i) for i in range(10)] == [*range(5), *range(10, 15)]
    assert [train.read(i)[1] for i in range(10)] == [0, 1, 1, 0, 1] * 2
    assert train.where(7) == f"{tmp_path}/data/train-00001-of-00002.parquet:row 2"
    assert train.file_names()[5:] == [f"{i}.png" for i in range(10, 15)]


def test_splits_are_folders_names_or_one_file(tmp_path):
    columns = {"image": images(3), "label": [0, 1, 0]}
    for split in ("train", "validation"):
        write(tmp_path / "folders" / split / "0.parquet", columns)
    assert len(open_source(str(tmp_path / "folders"), "test")) == 3
    path = write(tmp_path / "one" / "few.parquet", columns)
    for name in (path, path.parent, f"{path.parent}/*.parquet"):
        assert len(open_source(str(name), "train")) == 3
        assert "test" in only_error(name, "test")
        assert open_source(str(name), "test", classes=("0", "1", "2")).labels.tolist() == [0, 1, 0]
    assert "has *.parquet, but no test split" in only_error(path.parent, "test")


def test_test_split_of_hidden_labels_gives_way_to_validation(tmp_path):
    hugging_face(tmp_path, ("train", "validation"))
    hugging_face(tmp_path, ("test",), labels=(-1, -1))
    assert "validation-00000" in open_source(str(tmp_path), "test").where(0)
    for path in (tmp_path / "data").glob("validation*"):
        path.unlink()
    assert "have no labels, and can not be tested with" in only_error(tmp_path, "test")


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"image": pa.binary(), "mask": pa.binary()}, "image"),
        ({"thumbnail": pa.binary(), "image": STRUCT}, "image"),
        ({"img": STRUCT, "mask": STRUCT}, "img"),
        ({"content": pa.large_binary()}, "content"),
    ],
)
def test_column_of_pictures_is_found_by_type_and_then_by_name(columns, expected, tmp_path):
    arrays = {name: images(2, 50 if name == expected else 90, kind) for name, kind in columns.items()}
    source = open_source(str(write(tmp_path / "x.parquet", arrays)), "train")
    assert [value_of(source, i) for i in range(2)] == [50, 51]
    assert (source.classes, source.labels.tolist()) == ((), [-1, -1])
    assert len(set(source.file_names())) == 2


def test_several_columns_that_may_be_the_pictures_are_refused(tmp_path):
    path = write(tmp_path / "x.parquet", {"left": images(2, kind=pa.binary()), "right": images(2, kind=pa.binary())})
    assert "has the columns left, right of bytes; call that of pictures 'image'" in only_error(path)
    features = {"right": {"_type": "Image"}}
    write(path, {"left": images(2, kind=pa.binary()), "right": images(2, 7, kind=pa.binary())}, features)
    assert value_of(open_source(str(path), "train"), 0) == 7
    write(path, {"url": ["a", "b"], "label": [0, 1]})
    assert "has no column of encoded pictures" in only_error(path)


@pytest.mark.parametrize(
    ("columns", "features", "labels", "classes"),
    [
        ({"label": [2, 0, 1]}, None, [2, 0, 1], ("0", "1", "2")),
        ({"label": pa.array([2, 0, 1], pa.uint8())}, {"label": class_label("a", "b", "c")}, [2, 0, 1], ("a", "b", "c")),
        ({"label": ["dog", "cat", "dog"]}, None, [1, 0, 1], ("cat", "dog")),
        ({"id": [5, 6, 7], "fine": [1, 0, 1]}, {"fine": class_label("x", "y")}, [1, 0, 1], ("x", "y")),
        ({"id": [5, 6, 7], "target": [1, 0, 1]}, None, [1, 0, 1], ("0", "1")),
        ({"id": [5, 6, 7], "name": ["p", "q", "r"]}, None, [-1, -1, -1], ()),
        ({"label": [[1], [0, 1], []]}, None, [-1, -1, -1], ()),
        ({"label": [1, 0, 1]}, ["not", "features"], [1, 0, 1], ("0", "1")),
    ],
)
def test_labels_and_class_names(columns, features, labels, classes, tmp_path):
    source = open_source(str(write(tmp_path / "x.parquet", {"image": images(3)} | columns, features)), "train")
    assert (source.labels.tolist(), source.classes) == (labels, classes)


def test_words_of_a_test_split_take_the_numbers_of_training(tmp_path):
    write(tmp_path / "train-0.parquet", {"image": images(3), "label": ["bird", "cat", "dog"]})
    write(tmp_path / "test-0.parquet", {"image": images(2), "label": ["dog", "cat"]})
    test = open_source(str(tmp_path), "test")
    assert (test.labels.tolist(), test.classes) == ([2, 1], ("bird", "cat", "dog"))
    write(tmp_path / "test-0.parquet", {"image": images(2), "label": ["dog", "cow"]})
    assert "class 'cow' of" in only_error(tmp_path, "test")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, None, 1], "row 1 has no 'label' and others have"),
        ([0, 1, -1], "row 2 has no label and others have"),
        ([0, 0, 0], "only one class"),
        ([0, 1, 10**9], "number the classes 0, 1, 2"),
    ],
)
def test_labels_that_can_not_be_are_refused_with_their_row(labels, message, tmp_path):
    path = write(tmp_path / "x.parquet", {"image": images(3), "label": labels})
    assert message in only_error(path)


def test_files_of_different_columns_are_refused_by_name(tmp_path):
    write(tmp_path / "train-0.parquet", {"image": images(2), "label": [0, 1]})
    path = write(tmp_path / "train-1.parquet", {"image": images(2)})
    assert f"{path}: has no column 'label', which other files have" in only_error(tmp_path)
    write(path, {"image": images(2), "label": ["a", "b"]})
    assert f"{path}: 'label' is string, not int64" in only_error(tmp_path)


def test_table_beside_class_folders_is_about_the_pictures(tmp_path):
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "0.png").write_bytes(png())
    write(tmp_path / "metadata.parquet", {"image": images(1), "label": [0]})
    assert open_source(str(tmp_path), "train").classes == ("a", "b")


def test_picture_without_bytes_is_bad_and_named(tmp_path):
    rows = pa.array([{"bytes": png(), "path": "a"}, {"bytes": None, "path": "b"}, None], STRUCT)
    source = open_source(str(write(tmp_path / "x.parquet", {"image": rows})), "train")
    source.read(0)
    for row in (1, 2):
        with pytest.raises(BadPicture, match=f"x.parquet:row {row}: holds no bytes of a picture"):
            source.read(row)


# ------------------------------------------------------------------------------------------------------------- reading


def test_threads_read_the_right_pictures_and_few_groups_are_kept(tmp_path, monkeypatch):
    path = write(tmp_path / "x.parquet", {"image": images(60)}, row_group_size=3)
    monkeypatch.setattr(parquet, "KEPT_BYTES", 5 * 3 * len(png()))
    source = pickle.loads(pickle.dumps(open_source(str(path), "train")))
    ids = np.random.default_rng(0).integers(0, 60, 600).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: value_of(source, i), ids)) == ids
    assert 2 <= len(source._kept._kept) <= 5


def test_a_row_group_is_read_once_for_pictures_in_order(tmp_path, monkeypatch):
    path = write(tmp_path / "x.parquet", {"image": images(20)}, row_group_size=5)
    source, read = open_source(str(path), "train"), []
    monkeypatch.setattr(parquet, "_read_group", lambda *a, f=parquet._read_group: (read.append(a[0].number), f(*a))[1])
    assert [value_of(source, i) for i in range(20)] == list(range(20))
    assert read == [0, 1, 2, 3]


def test_large_row_groups_are_warned_of_once_with_the_mend(tmp_path, monkeypatch, caplog):
    for i in range(3):
        write(tmp_path / f"train-{i}.parquet", {"image": images(20)}, row_group_size=10)
    with caplog.at_level(logging.WARNING):
        open_source(str(tmp_path), "train")
        assert not caplog.records
        monkeypatch.setattr(parquet, "SLOW_BYTES", 100)
        monkeypatch.setattr(parquet, "KEPT_BYTES", 1000)
        source = open_source(str(tmp_path), "train")
        [source.read(i) for i in range(60)]
        open_source(str(tmp_path), "train")
    assert len(caplog.records) == 1
    assert f"`python -m maect_jax data pack {tmp_path} DST`" in caplog.text


# -------------------------------------------------------------------------------------------------------------- damage


def test_file_that_is_cut_off_or_none_is_named_when_it_is_opened(tmp_path):
    whole = write(tmp_path / "whole.parquet", {"image": images(6)}).read_bytes()
    path = tmp_path / "x" / "train-0.parquet"
    path.parent.mkdir()
    for length in range(0, len(whole), 61):
        path.write_bytes(whole[:length])
        assert only_error(path.parent).startswith(f"{path}: is no Parquet file, or is damaged or cut off")


def test_changed_byte_of_a_checked_page_is_a_bad_picture_or_harmless(tmp_path):
    columns = {"image": images(12), "label": [0, 1, 2] * 4}
    path = write(tmp_path / "x.parquet", columns, row_group_size=3, write_page_checksum=True)
    whole, expected = path.read_bytes(), [png(i) for i in range(12)]
    end = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")  # the footer has no checksum
    bad = 0
    for at in np.random.default_rng(0).integers(4, end, 200).tolist():
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        try:
            source = open_source(str(path), "train")
        except DataError as error:
            assert str(path) in str(error)
            continue
        for i in range(len(source)):
            try:
                assert source.read(i)[0] == expected[i]
            except BadPicture as error:
                assert error.where == f"{path}:row {i}"
                bad += 1
    assert bad > 100


def test_changed_bytes_of_a_footer_end_in_one_line(tmp_path):
    path = write(tmp_path / "x.parquet", {"image": images(12), "label": [0, 1, 2] * 4}, row_group_size=3)
    whole = path.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    for at in np.random.default_rng(1).integers(footer, len(whole), 250).tolist():
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        try:
            source = open_source(str(path), "train")
            source.file_names()
            for i in range(len(source)):
                source.image(i)
        except DataError as error:
            assert "\n" not in str(error)


def test_few_bytes_that_unpack_to_gigabytes_are_not_unpacked(tmp_path, monkeypatch):
    one = b"\0" * (1 << 19)
    large = pa.DictionaryArray.from_arrays(pa.array([0] * 8000, pa.int8()), pa.array([one]))  # 4 GB as pictures
    noise = pa.array(list(np.random.default_rng(0).bytes(8000)), pa.int64())  # or there are fewer bytes than rows
    columns = {"image": large, "noise": noise}
    path = write(tmp_path / "x.parquet", columns, compression="zstd", store_schema=False, use_dictionary=["image"])
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 1 << 25)
    source = open_source(str(path), "train")
    before = pa.default_memory_pool().max_memory()
    with pytest.raises(BadPicture, match=r"x.parquet:row 5: its row group can not be read \(it unpacks to more than"):
        source.read(5)
    assert pa.default_memory_pool().max_memory() - before < 1 << 28


def test_row_group_that_is_too_large_is_refused_with_the_mend(tmp_path, monkeypatch):
    path = write(tmp_path / "x.parquet", {"image": images(50)})
    monkeypatch.setattr(parquet_columns, "MAX_GROUP_BYTES", 1000)
    assert "bytes in one row group; write it with row_group_size=100" in only_error(path)


def test_more_rows_than_bytes_are_refused(tmp_path):
    nothing = pa.nulls(200_000, pa.binary())
    path = write(tmp_path / "x.parquet", {"image": nothing, "label": pa.array(np.zeros(200_000, np.int8))})
    assert path.stat().st_size < 200_000
    assert "claims more rows than it has bytes" in only_error(path)
