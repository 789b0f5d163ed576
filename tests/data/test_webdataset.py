"""WebDataset: how shards are told from archives of classes, labels, class names, splits, patterns, and refusals."""

import json
import logging

import numpy as np
import pytest
from forms import tar
from test_archives import only_error, png, value_of

from maect_jax.data.sources import index_cache, webdataset
from maect_jax.data.sources.archives import ArchiveSource
from maect_jax.data.sources.open import open_source


def shard(path, samples, label="cls"):
    """A shard of (key, value, label or None)."""
    members = []
    for key, value, number in samples:
        members.append((f"{key}.png", png(value)))
        if number is not None:
            text = f"{number}" if label == "cls" else json.dumps({"label": number, "url": "x"})
            members.append((f"{key}.{label}", text.encode()))
    return tar(path, members)


def three_shards(folder, prefix="train", label="cls", labelled=True):
    """Shards of 3, 1 and 2 pictures, of which each has its place as its value and that modulo 3 as its label."""
    at = 0
    for number, count in enumerate((3, 1, 2)):
        values = range(at, at + count)
        samples = [(f"k{9 - value}", value, value % 3 if labelled else None) for value in values]
        shard(folder / f"{prefix}-{number:06}.tar", samples, label)
        at += count
    return folder


@pytest.mark.parametrize("label", ["cls", "json"])
def test_ids_follow_the_shards_and_the_order_in_each(label, tmp_path):
    source = open_source(str(three_shards(tmp_path, label=label)), "train")
    assert isinstance(source, ArchiveSource)
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert source.classes == ("0", "1", "2")
    assert [value_of(source, i) for i in range(6)] == list(range(6))
    assert source.where(3) == f"{tmp_path}/train-000001.tar:k6.png"
    assert source.file_names()[3] == "train-000001/k6.png"


def test_class_names_are_the_lines_of_classes_txt(tmp_path):
    three_shards(tmp_path / "train")
    three_shards(tmp_path / "val", "val")
    (tmp_path / "classes.txt").write_text("cat\ndog\nbird\n\n")
    train, test = (open_source(str(tmp_path), split) for split in ("train", "test"))
    assert train.classes == test.classes == ("cat", "dog", "bird")
    assert test.labels.tolist() == [0, 1, 2, 0, 1, 2]
    given = open_source(str(tmp_path / "val"), "test", classes=("bird", "cat", "dog"))
    assert (given.labels.tolist(), given.classes) == ([1, 2, 0, 1, 2, 0], ("bird", "cat", "dog"))


@pytest.mark.parametrize("text", ["", "cat\ncat\ndog", "cat\n\ndog"])
def test_class_names_that_can_not_be_are_refused(text, tmp_path):
    three_shards(tmp_path)
    (tmp_path / "classes.txt").write_text(text)
    assert "classes.txt: needs one name a class, each once" in only_error(tmp_path)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("layout", ["folders", "names"])
def test_splits_are_folders_or_how_names_begin(layout, labelled, tmp_path):
    for prefix, split in (("train", "train"), ("val", "validation")):
        three_shards(tmp_path / (split if layout == "folders" else ""), prefix, labelled=labelled)
    shard(tmp_path / "extra-000000.tar", [("x", 9, 0 if labelled else None)])  # left out
    train = open_source(str(tmp_path), "train")
    assert len(train) == 6
    assert train.classes == (("0", "1", "2") if labelled else ())
    if labelled:
        test = open_source(str(tmp_path), "test")
        assert (len(test), test.classes) == (6, train.classes)
        assert "val" in test.where(0)
    else:
        assert "have no labels, and can not be tested with" in only_error(tmp_path, "test")


def test_numbers_of_a_test_split_are_those_of_training(tmp_path):
    three_shards(tmp_path)
    shard(tmp_path / "test-000000.tar", [("a", 0, 1), ("b", 1, 0)])
    assert open_source(str(tmp_path), "test").classes == ("0", "1", "2")
    shard(tmp_path / "test-000000.tar", [("a", 0, 1), ("b", 1, 7)])
    assert "class '7' of" in only_error(tmp_path, "test")
    assert "has numbers for labels, the training set has names, such as 'cat'" in only_error(
        tmp_path, "test", classes=("cat", "dog")
    )


def test_training_shards_are_not_their_own_test_set(tmp_path):
    three_shards(tmp_path / "named")
    assert "has train-*.tar, but no test split" in only_error(tmp_path / "named", "test")
    three_shards(tmp_path / "plain", "pictures")
    assert "has *.tar, but no test split" in only_error(tmp_path / "plain", "test")
    three_shards(tmp_path / "tests", "val")
    assert "has val-*.tar, but no train split" in only_error(tmp_path / "tests")


@pytest.mark.parametrize("pattern", ["train-{000000..000002}.tar", "train-*.tar", "train-00000[012].tar"])
def test_pattern_names_the_shards(pattern, tmp_path):
    three_shards(tmp_path)
    three_shards(tmp_path, "val")
    source = open_source(f"{tmp_path}/{pattern}", "train")
    assert [value_of(source, i) for i in range(6)] == list(range(6))
    assert "may be the training pictures themselves" in only_error(f"{tmp_path}/{pattern}", "test")
    assert len(open_source(f"{tmp_path}/{pattern.replace('train', 'val')}", "test")) == 6


def test_pattern_that_finds_too_little_or_too_much_is_refused(tmp_path):
    three_shards(tmp_path)
    assert f"no file '{tmp_path}/train-000003.tar'" in only_error(f"{tmp_path}/train-{{000000..000005}}.tar")
    assert "no file" in only_error(f"{tmp_path}/trian-*.tar")
    assert "stands for 1 to 100000 files" in only_error(f"{tmp_path}/{{0..999999999}}.tar")
    assert "stands for 1 to 100000 files" in only_error(f"{tmp_path}/{{5..2}}.tar")
    (tmp_path / "a.png").write_bytes(png())
    assert "a pattern is for .tar (WebDataset) or .parquet files" in only_error(f"{tmp_path}/*.png")


def test_tar_beside_the_folders_of_splits_does_not_matter(tmp_path):
    three_shards(tmp_path / "train")
    tar(tmp_path / "scripts.tar", [("make.py", b"")])
    assert open_source(str(tmp_path), "train").labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_one_shard_is_a_set(tmp_path):
    path = shard(tmp_path / "few.tar", [("a", 0, 0), ("b", 1, 1)])
    source = open_source(str(path), "train")
    assert (source.labels.tolist(), source.classes) == ([0, 1], ("0", "1"))


def test_shards_without_labels_are_told_from_archives_of_classes(tmp_path):
    def classes(name):
        return open_source(str(tmp_path / name), "train").classes

    three_shards(tmp_path / "shards", "photos", labelled=False)
    assert classes("shards") == ()
    for stem in ("00000", "00001"):  # as the folders of GTSRB are called
        tar(tmp_path / "classes" / f"{stem}.tar", [("1.png", png())])
        tar(tmp_path / "captions" / f"{stem}.tar", [("1.png", png()), ("1.txt", b"a cat")])
        tar(tmp_path / "notes" / f"n{stem}.tar", [("1.png", png()), ("1.json", b'{"shapes": []}')])
    assert classes("classes") == ("00000", "00001")
    assert classes("captions") == ()
    assert classes("notes") == ("n00000", "n00001")


def test_key_ends_at_the_first_dot_of_the_file_name(tmp_path):
    members = [("v1.0/a.png", png(1)), ("v1.0/a.seg.png", png(2)), ("v1.0/a.cls", b"1"), ("v1.0/a.emb.npy", b"")]
    tar(tmp_path / "train-000000.tar", [*members, ("v1.1/a.seg.png", png(3)), ("v1.1/a.cls", b" 0\n")])
    source = open_source(str(tmp_path), "train")
    assert source.labels.tolist() == [1, 0]
    assert [value_of(source, i) for i in range(2)] == [1, 3]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", png()), ("a.cls", b"0"), ("a.png", png())], "a.png is there twice"),
        ([("a.png", png()), ("a.cls", b"0"), ("a.cls", b"0")], "a.cls is there twice"),
        ([("a.png", png()), ("a.jpg", png()), ("a.cls", b"0")], "a has several pictures (png, jpg)"),
        ([("a.png", png()), ("a.cls", b"cat")], "a.cls: 'cat' is no class; write its number"),
        ([("a.png", png()), ("a.cls", b"-1")], "a.cls: '-1' is no class"),
        ([("a.png", png()), ("a.cls", b"")], "a.cls: '' is no class"),
        ([("a.png", png()), ("a.cls", b"1" * 5000)], "is no class"),
        ([("a.png", png()), ("a.cls", b"\n\x1b[2J")], "is no class"),
        ([("a.png", png()), ("a.cls", b"999999999"), ("b.png", png()), ("b.cls", b"0")], "number the classes 0, 1, 2"),
        ([("a.png", png()), ("a.cls", b"0"), ("b.png", png())], "b.png has no label and others have"),
        ([("a.png", png()), ("a.cls", b"0"), ("b.png", png()), ("b.cls", b"0")], "only one class"),
        ([("a.txt", b"x"), ("a.json", b"{}")], "no pictures in the 1 shards"),
    ],
)
def test_what_can_not_be_is_refused_with_shard_and_member(members, message, tmp_path):
    tar(tmp_path / "train-000000.tar", members)
    assert message in only_error(tmp_path)


def test_label_beyond_the_named_classes_is_refused(tmp_path):
    three_shards(tmp_path)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert "names 2 classes, but has the label 2" in only_error(tmp_path)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "{", "[1]", '{"label": "cat"}', '{"label": true}', '{"label": -3}', '{"label": 1e3}', '"x"']
)
def test_json_without_a_number_is_no_label(text, tmp_path):
    samples = [(f"{i}.{ending}", content) for i in range(2) for ending, content in (("png", png()), ("json", text))]
    members = [(name, content if isinstance(content, bytes) else content.encode()) for name, content in samples]
    tar(tmp_path / "train-000000.tar", members)
    source = open_source(str(tmp_path), "train")
    assert (source.labels.tolist(), source.classes) == ([-1, -1], ())


def test_json_with_a_huge_number_is_no_label_and_no_crash(tmp_path):
    huge = b'{"label": ' + b"9" * 100_000 + b"}"
    tar(tmp_path / "train-000000.tar", [("a.png", png()), ("a.json", huge)])
    assert open_source(str(tmp_path), "train").classes == ()


def test_label_without_a_picture_is_left_out_with_a_word(tmp_path, caplog):
    tar(
        tmp_path / "train-000000.tar",
        [("a.png", png()), ("a.cls", b"0"), ("b.cls", b"1"), ("c.png", png(1)), ("c.cls", b"1")],
    )
    with caplog.at_level(logging.WARNING):
        assert open_source(str(tmp_path), "train").labels.tolist() == [0, 1]
    assert "have a label and no picture" in caplog.text


def test_shard_that_is_cut_off_is_named(tmp_path):
    three_shards(tmp_path)
    path = tmp_path / "train-000002.tar"
    path.write_bytes(path.read_bytes()[:1700])
    assert only_error(tmp_path).startswith(f"{path}: is cut off")


def test_labels_of_large_shards_are_read_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index_cache, "LARGE", 1)
    first = open_source(str(three_shards(tmp_path / "set")), "train")
    monkeypatch.setattr(webdataset, "_shard_table", lambda path: pytest.fail("read again"))
    again = open_source(str(tmp_path / "set"), "train")
    np.testing.assert_array_equal(again.labels, first.labels)
    assert again.file_names() == first.file_names()
