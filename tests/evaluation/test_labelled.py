"""Which rows a protocol with few labels may use: a set that is itself a split, an official list, or generated ones."""

from types import SimpleNamespace

import numpy as np
import pytest

from maect_jax.errors import ConfigError
from maect_jax.evaluation import labelled
from maect_jax.evaluation.features import Features

LABELS = np.repeat(np.arange(3), 20)


def task(name="pets", lists=""):
    n = len(LABELS)
    files = [f"class{label}/{label}_{i:03}.png" for i, label in enumerate(LABELS)]
    features = Features({}, LABELS, np.arange(n), np.zeros((n, 2), np.uint32), 1)
    said = []
    return SimpleNamespace(
        train=type("Named", (), {"name": name, "file_names": lambda self: files, "__len__": lambda self: n})(),
        weights=SimpleNamespace(pooling="cls", stage="tune"),
        settings=SimpleNamespace(lists=str(lists)),
        features_of=lambda *_: features,
        classes=("a", "b", "c"),
        say=said.append,
        said=said,
    )


@pytest.mark.parametrize("name", ["imagenet2012_subset/1pct", "imagenet2012_subset/1pct:5.1.0"])
def test_a_set_that_is_one_per_cent_is_taken_whole_and_stands_for_no_other_share(name):
    assert labelled.share(task(name), "1pct").rows.tolist() == list(range(60))
    assert labelled.share(task(name), "10pct") is None and labelled.share(task(name), "100pct") is None


def test_a_few_shot_set_is_the_only_split_of_its_size():
    (split,) = labelled.shots(task("imagenet2012_fewshot/5shot"), 5)
    assert split.origin == "whole set" and len(split.rows) == 60
    assert labelled.shots(task("imagenet2012_fewshot/5shot"), 1) == []


def test_generated_splits_are_three_balanced_and_nested():
    one, five = labelled.shots(task(), 1), labelled.shots(task(), 5)
    assert len(one) == len(five) == 3
    for small, large in zip(one, five):
        assert np.bincount(LABELS[large.rows]).tolist() == [5, 5, 5]
        assert set(small.rows) < set(large.rows)
    assert len({split.record["hash"] for split in five}) == 3


def test_what_a_class_is_too_small_for_is_left_out_and_said():
    few = task()
    assert labelled.shots(few, 21) == []
    assert "21 per class is left out: class 'a' has 20 training pictures" in few.said[0]


def test_official_lists_are_taken_and_all_of_them_are_needed(tmp_path):
    for i in (1, 2, 3):
        rows = [i, 20 + i, 40 + i]
        (tmp_path / f"1shot-{i}.txt").write_text("\n".join(f"{LABELS[row]}_{row:03}.JPEG" for row in rows))
    found = labelled.shots(task(lists=tmp_path), 1)
    assert [split.rows.tolist() for split in found] == [[i, 20 + i, 40 + i] for i in (1, 2, 3)]
    assert [split.origin for split in found] == [f"list 1shot-{i}.txt" for i in (1, 2, 3)]
    with pytest.raises(ConfigError, match=r"lacks 2shot-1\.txt, 2shot-2\.txt, 2shot-3\.txt"):
        labelled.shots(task(lists=tmp_path), 2)
