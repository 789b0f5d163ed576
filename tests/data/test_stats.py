"""data stats: counts, sizes, mean and standard deviation, and duplicates, against NumPy over all pixels at once."""

import json
import tracemalloc

import numpy as np
import pytest
from packs import natural, packed, write_folder, write_picture

from maect_jax.data.packing.splits import open_splits
from maect_jax.data.packing.stats import channel_sums, form_of, statistics


def moments(source):
    pixels = np.concatenate([source.image(i).reshape(-1, source.channels) for i in range(len(source))]) / 255.0
    return pixels.mean(0, np.float64), pixels.std(0, dtype=np.float64)


def stats(root, workers=0, **options):
    sources = open_splits(str(root), **options)
    found = statistics(sources, workers)
    assert json.loads(json.dumps(found)) == found
    return sources, found


def uneven(root):
    """Pictures of many sizes, so that a mean of means would be another number."""
    for number in range(12):
        label = "cat" if number % 3 else "dog"
        write_picture(root / "train" / label / f"{number:02}.png", natural(number, 5 + 7 * number, 40 - 3 * number))
    write_picture(root / "val/cat/0.png", natural(50, 9, 11))
    write_picture(root / "val/dog/1.png", natural(51, 10, 12))
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_mean_and_std_are_numpys_over_all_pixels(tmp_path, workers):
    sources, found = stats(uneven(tmp_path / "in"), workers)
    for split, source in sources.items():
        mean, std = moments(source)
        np.testing.assert_allclose(found["splits"][split]["mean"], mean, rtol=1e-12)
        np.testing.assert_allclose(found["splits"][split]["std"], std, rtol=1e-12)
    by_picture = np.mean([sources["train"].image(i).mean((0, 1)) for i in range(12)], 0) / 255
    assert abs(by_picture - found["splits"]["train"]["mean"]).max() > 1e-3


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_any_number_of_channels_is_counted_and_sixteen_bits_are_told(tmp_path, channels, dtype):
    rng = np.random.default_rng(channels)
    (tmp_path / "in").mkdir()
    for number in range(5):
        image = rng.integers(0, np.iinfo(dtype).max + 1, (6 + number, 9, channels), dtype)
        np.save(tmp_path / "in" / f"{number}.npy", image if channels > 1 else image[:, :, 0])
    sources, found = stats(tmp_path / "in", channels=channels)
    mean, std = moments(sources["train"])
    found = found["splits"]["train"]
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-12)
    np.testing.assert_allclose(found["std"], std, rtol=1e-12)
    assert found["sixteen_bit"] == (5 if dtype == np.uint16 else 0)
    assert found["forms"] == {f"npy {np.dtype(dtype).name}": 5} and found["unlabelled"] == 5


def test_sums_are_exact_for_the_brightest_and_longest_picture():
    image = np.full((70_001, 2, 3), 255, np.uint8)
    image[-1, -1] = (1, 2, 3)
    values = image.reshape(-1, 3).astype(np.int64)
    np.testing.assert_array_equal(channel_sums(image), [values.sum(0), (values**2).sum(0)])


def test_the_squares_of_a_large_picture_need_little_memory():
    image = np.full((4096, 2048, 3), 200, np.uint8)
    tracemalloc.start()
    try:
        sums = channel_sums(image)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sums.tolist() == [[200 << 23] * 3, [40_000 << 23] * 3]
    assert most < image.nbytes  # all squares at once are twice as much


def test_pictures_a_class_sizes_bytes_and_forms_are_counted(tmp_path):
    root = write_folder(tmp_path / "in")
    write_picture(root / "train/cat/wide.png", natural(90, 10, 300))
    write_picture(root / "train/cat/grey.png", natural(91, 12, 13, 1))
    _, found = stats(root)
    train = found["splits"]["train"]
    assert train["pictures"] == 14 and train["classes"] == {"cat": 8, "dog": 6} and train["empty_classes"] == []
    assert train["unlabelled"] == 0 and train["sixteen_bit"] == 0 and train["channels"] == 3
    assert train["height"] == {"min": 10, "median": 24, "max": 24} and train["width"]["max"] == 300
    sizes = [path.stat().st_size for path in (root / "train").rglob("*.*")]
    assert train["bytes"] == {"min": min(sizes), "median": np.median(sizes), "max": max(sizes), "sum": sum(sizes)}
    assert train["forms"] == {"JPEG RGB": 12, "PNG RGB": 1, "PNG L": 1}


def test_classes_without_a_picture_in_the_test_split_are_named(tmp_path):
    root = write_folder(tmp_path / "in")
    for path in (root / "val/dog").iterdir():
        path.unlink()
    _, found = stats(root)
    assert found["splits"]["test"]["empty_classes"] == ["dog"] and found["splits"]["train"]["empty_classes"] == []


def test_sixteen_bit_pictures_are_told_by_their_form(tmp_path):
    image = natural(1, 8, 9, 1)
    write_picture(tmp_path / "deep.png", image.astype(np.uint16) * 256)
    write_picture(tmp_path / "flat.png", image)
    assert form_of((tmp_path / "flat.png").read_bytes()) == ("PNG L", False)
    form, deep = form_of((tmp_path / "deep.png").read_bytes())
    assert form.startswith("PNG I") and deep


def test_duplicates_are_found_by_their_pixels_within_and_between_splits(tmp_path):
    root = write_folder(tmp_path / "in", ending="png")
    twice = natural(1)  # train/cat/000.png
    write_picture(root / "train/dog/again.bmp", twice)  # another file, the same pixels
    write_picture(root / "train/dog/once_more.png", twice, compress_level=1)
    write_picture(root / "val/cat/leak.png", twice)
    write_picture(root / "val/dog/leak2.png", natural(2))  # train/cat/001.png
    _, found = stats(root)
    assert found["duplicate_counts"] == {"train": 2, "test": 0, "between": 2}
    groups = [{entry["path"] for entry in group} for group in found["duplicates"]]
    names = ("train/cat/000.png", "train/dog/again.bmp", "train/dog/once_more.png", "val/cat/leak.png")
    assert {str(root / name) for name in names} in groups
    assert {str(root / name) for name in ("train/cat/001.png", "val/dog/leak2.png")} in groups and len(groups) == 2
    labels = {entry["path"]: (entry["split"], entry["label"]) for group in found["duplicates"] for entry in group}
    assert labels[str(root / "val/cat/leak.png")] == ("test", 0)
    assert labels[str(root / "train/dog/again.bmp")] == ("train", 1)


def test_equal_bytes_of_pixels_in_another_shape_are_no_duplicate(tmp_path):
    image = natural(1, 6, 8)
    write_picture(tmp_path / "in/a.png", image)
    write_picture(tmp_path / "in/b.png", image.reshape(8, 6, 3))
    assert stats(tmp_path / "in")[1]["duplicates"] == []


def test_bad_pictures_are_listed_and_count_for_nothing(tmp_path):
    root = uneven(tmp_path / "in")
    _, before = stats(root)
    (root / "train/cat/zz.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    _, after = stats(root)
    train = after["splits"]["train"]
    assert train["mean"] == before["splits"]["train"]["mean"] and train["pictures"] == 13
    assert [bad["path"] for bad in train["bad"]] == [str(root / "train/cat/zz.png")]
    assert sum(train["classes"].values()) == sum(train["forms"].values()) == 12


def test_a_packed_set_has_the_numbers_of_its_source(tmp_path):
    root = uneven(tmp_path / "in")
    packed(root, tmp_path / "out")
    before, after = (stats(folder)[1]["splits"] for folder in (root, tmp_path / "out"))
    assert before == after
