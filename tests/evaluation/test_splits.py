"""Low-shot splits: drawn ones are balanced, nested and fixed by (labels, seed, data); lists are read as published."""

import hashlib
from fractions import Fraction
from math import floor

import numpy as np
import pytest

from maect_jax.errors import ConfigError, DataError
from maect_jax.evaluation import splits

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(12), np.arange(6, 18)))  # class c has 6 + c rows


@pytest.mark.parametrize("per_class", [1, 2, 5, 6])
def test_every_class_has_as_many_rows(per_class):
    rows = splits.generate(LABELS, per_class, seed=0, data_hash="a")
    assert rows.dtype == np.int64
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(np.bincount(LABELS[rows]), np.full(12, per_class))


def test_smaller_splits_lie_in_larger_ones():
    one, two, five = (set(splits.generate(LABELS, n, 3, "a").tolist()) for n in (1, 2, 5))
    assert one < two < five


def test_a_split_is_a_function_of_labels_seed_and_data():
    rows = splits.generate(LABELS, 2, 0, "a")
    np.testing.assert_array_equal(splits.generate(LABELS.tolist(), 2, 0, "a"), rows)
    assert set(splits.generate(LABELS, 2, 1, "a").tolist()) != set(rows.tolist())
    assert set(splits.generate(LABELS, 2, 0, "b").tolist()) != set(rows.tolist())
    assert splits.list_hash(rows) != splits.list_hash(splits.generate(LABELS, 2, 1, "a"))


def test_rows_are_those_with_the_smallest_counters():
    """The recipe, written once more; it must never change, or numbers of two versions would not compare."""
    key = int.from_bytes(hashlib.sha256(b"low-shot/7/abc").digest()[:16], "little")
    number = np.random.Philox(key=key).random_raw(LABELS.size).tolist()
    of_class = [sorted(np.flatnonzero(c == LABELS).tolist(), key=number.__getitem__) for c in range(12)]
    expected = sorted(row for rows in of_class for row in rows[:3])
    assert splits.generate(LABELS, 3, 7, "abc").tolist() == expected


def test_every_row_is_drawn_about_equally_often():
    labels = np.repeat(np.arange(4), 10)
    times = np.zeros(40)
    for seed in range(500):
        times[splits.generate(labels, 3, seed, "a")] += 1
    assert abs(times - 150).max() < 5 * np.sqrt(500 * 0.3 * 0.7)


def test_rows_without_label_are_never_taken():
    labels = np.where(np.arange(LABELS.size) % 7 == 0, -1, LABELS)
    for rows in (splits.generate(labels, 4, 0, "a"), splits.generate_share(labels, 0.5, 0, "a")):
        assert (labels[rows] >= 0).all()
    assert splits.generate_share(labels, 1.0, 0, "a").size == (labels >= 0).sum()


def test_a_class_with_too_few_rows_is_named():
    with pytest.raises(DataError, match=r"8 pictures per class asked for, but class 0 has 6, 2 of 12 classes"):
        splits.generate(LABELS, 8, 0, "a")
    with pytest.raises(ConfigError, match="0 pictures per class"):
        splits.generate(LABELS, 0, 0, "a")
    with pytest.raises(DataError, match=r"labels float64 of shape \(3,\)"):
        splits.generate(np.zeros(3), 1, 0, "a")
    with pytest.raises(DataError, match="some >= 0"):
        splits.generate(np.array([-1, -1]), 1, 0, "a")


@pytest.mark.parametrize("share", ["1/100", "1/10", "1/4", "2/3", "1"])
def test_shares_follow_the_largest_remainders(share):
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(5), [130, 97, 250, 41, 7]))
    share, count = Fraction(share), np.bincount(labels).tolist()
    taken = [max(floor(share * n), 1) for n in count]
    lost = sorted(range(5), key=lambda c: taken[c] - share * count[c])
    for c in lost[: max(round(share * labels.size) - sum(taken), 0)]:
        taken[c] += 1
    rows = splits.generate_share(labels, float(share), 0, "a")
    np.testing.assert_array_equal(np.bincount(labels[rows]), taken)


def test_shares_have_the_asked_for_size_and_are_nested():
    labels = np.random.default_rng(1).integers(0, 20, 6000)
    one, ten = (splits.generate_share(labels, share, 0, "a") for share in (0.01, 0.1))
    assert (one.size, ten.size) == (60, 600)
    assert set(one.tolist()) < set(ten.tolist())
    for rows, share in ((one, 0.01), (ten, 0.1)):
        assert abs(np.bincount(labels[rows]) - share * np.bincount(labels)).max() < 1
    assert set(splits.generate(labels, 1, 0, "a").tolist()) <= set(one.tolist())


def test_a_share_leaves_no_class_out():
    labels = np.repeat([0, 1, 2], [1000, 3, 1])
    np.testing.assert_array_equal(np.bincount(labels[splits.generate_share(labels, 0.01, 0, "a")]), [10, 1, 1])
    for share in (0, 1.5):
        with pytest.raises(ConfigError, match="a share of"):
            splits.generate_share(labels, share, 0, "a")


NAMES = [f"n0{c}/n0{c}_{i}.JPEG" for c in range(3) for i in range(4)]


@pytest.mark.parametrize(
    "line", ["n01_2.JPEG", "n01/n01_2.JPEG", "n01_2.png", "n01_2", "  n01_2.JPEG  # why", "n01_2\r"]
)
def test_lists_are_matched_by_base_name(tmp_path, line):
    path = tmp_path / "5shot-1.txt"
    path.write_text(f"# three pictures\n\nn02_3.JPEG\n{line}\nn00/n00_0.JPEG\n")
    rows = splits.read_list(path, NAMES)
    assert rows.dtype == np.int64
    assert rows.tolist() == [0, 6, 11]
    np.testing.assert_array_equal(splits.read_list(str(path), [name.split("/")[1] for name in NAMES]), rows)


def test_lists_that_do_not_fit_say_how(tmp_path):
    path = tmp_path / "list.txt"
    with pytest.raises(DataError, match=r"no file '.*list\.txt'"):
        splits.read_list(path, NAMES)
    path.write_text("\n# nothing\n")
    with pytest.raises(DataError, match="names no picture"):
        splits.read_list(path, NAMES)
    path.write_text("n00_0.JPEG\nn01_1.JPEG\nn00/n00_0.JPEG\n")
    with pytest.raises(DataError, match=r"lists more than once 1 of 3 pictures: n00_0$"):
        splits.read_list(path, NAMES)
    path.write_text("n00_0.JPEG\n" + "".join(f"x{i}.JPEG\n" for i in range(8)))
    with pytest.raises(DataError, match=r"the data set has not 8 of 9 pictures: x0, x1, x2, x3, x4, …"):
        splits.read_list(path, NAMES)
    path.write_text("1.jpg\n")
    with pytest.raises(DataError, match=r"has several of 1 of 1 pictures: 1$"):
        splits.read_list(path, ["cat/1.jpg", "dog/1.jpg"])


def test_a_hash_is_that_of_the_sorted_set():
    expected = hashlib.sha256(b"n00_0\nn00_1\nn02_3").hexdigest()
    assert splits.list_hash(["n02_3.JPEG", "n00/n00_0.JPEG", "n00_1"]) == expected
    assert splits.list_hash(np.array([10, 9, 2])) == hashlib.sha256(b"2\n9\n10").hexdigest()


def test_scores_are_means_over_splits():
    label = np.array([0, 1, 2, 0])
    prediction = np.array([[0, 1, 2, 1], [0, 1, 0, 1], [0, 0, 2, 0]])
    scores = splits.score_splits(prediction, label, {}, {})
    assert scores.accuracies == [0.75, 0.5, 0.75]
    assert scores.accuracy == pytest.approx(2 / 3)
    assert scores.std == pytest.approx(np.sqrt(2) / 12)
    assert scores.correct.dtype == np.float32
    np.testing.assert_allclose(scores.correct, [1, 2 / 3, 2 / 3, 1 / 3], rtol=1e-6)
    assert scores.correct.mean() == pytest.approx(scores.accuracy)
