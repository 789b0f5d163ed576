"""The same real pictures in every form that is read give the same pixels, labels, classes and training batches."""

import io
import pickle

import jax
import numpy as np
import pytest
from forms import LABELLED as WRITTEN
from forms import UNLABELLED, class_numbers, write_folder
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from packs import packed
from PIL import Image
from real_pictures import ARCHIVES, SIDES, first_pictures
from tfds_sets import write_tfds

from maect_jax.data.batches.training import training_batches
from maect_jax.data.sources.open import open_source
from maect_jax.data.sources.subset import SubsetSource

CLASSES, EACH = 6, 10
BATCH = 8


def write_packed(root, pictures):
    packed(write_folder(root / "pictures", pictures), root / "records")
    return str(root / "records")


LABELLED = WRITTEN | {"packed records": write_packed}


@pytest.fixture(scope="module", params=ARCHIVES)
def pictures(request):
    found = first_pictures(request.param, CLASSES, EACH)
    assert len(found) == CLASSES * EACH
    return found, SIDES[request.param]


@pytest.fixture(scope="module")
def sharding():
    mesh = jax.sharding.Mesh(
        np.array(jax.devices()[:1]).reshape(1, 1), ("replica", "fsdp"), axis_types=(AxisType.Auto,) * 2
    )
    return NamedSharding(mesh, PartitionSpec(("replica", "fsdp")))


@pytest.fixture(scope="module")
def from_folder(pictures, sharding, tmp_path_factory):
    """The batches of the pictures in a folder, with which those of the other forms are compared."""
    path = LABELLED["folder"](tmp_path_factory.mktemp("folder") / "set", pictures[0])
    return batches(open_source(path, "train"), sharding)


def batches(source, sharding):
    loader = training_batches(
        source,
        **{"batch": BATCH, "seed": 3, "start_step": 2, "views": 2, "image_size": 24},
        crop_scale=(0.2, 1.0),
        sharding=sharding,
        resident_limit=0,
    )
    try:
        return [jax.tree.map(np.asarray, next(loader)) for _ in range(7)]  # on into the second epoch
    finally:
        loader.close()


@pytest.mark.parametrize("form", [*LABELLED, *UNLABELLED])
def test_every_form_gives_the_same_pictures_and_batches(form, pictures, sharding, from_folder, tmp_path):
    encoded, side = pictures
    source = open_source((LABELLED | UNLABELLED)[form](tmp_path / "set", encoded), "train")
    numbers = class_numbers(encoded)
    labels = [numbers[class_name] for class_name, _, _ in encoded] if form in LABELLED else [-1] * len(encoded)
    assert source.classes == (tuple(numbers) if form in LABELLED else ())
    assert source.labels.dtype == np.int32
    assert source.labels.tolist() == labels
    assert len({source.where(i) for i in range(len(source))}) == len(set(source.file_names())) == len(encoded)
    travelled = pickle.loads(pickle.dumps(source))
    for i, (_, _, content) in enumerate(encoded):
        with Image.open(io.BytesIO(content)) as image:
            expected = np.asarray(image.convert("RGB"))
        for each in (source, travelled):
            pixels, label = each.sample(i)
            np.testing.assert_array_equal(pixels, expected)
            assert label == labels[i]
        assert source.size(i) == (side, side)
    for ours, theirs in zip(batches(travelled, sharding), from_folder, strict=True):
        np.testing.assert_array_equal(ours["id"], theirs["id"])
        np.testing.assert_array_equal(ours["image"], theirs["image"])
        if form in LABELLED:
            np.testing.assert_array_equal(ours["label"], theirs["label"])


def test_tfds_gives_the_same_pictures_and_in_the_same_order_the_same_batches(
    pictures, sharding, from_folder, tmp_path, monkeypatch
):
    encoded, side = pictures
    source = open_source(write_tfds(tmp_path, encoded, monkeypatch), "train", data_dir=str(tmp_path))
    numbers = class_numbers(encoded)
    names = [f"{class_name}/{name}" for class_name, name, _ in encoded]
    assert source.classes == tuple(numbers)
    assert sorted(source.file_names()) == sorted(names)
    assert source.file_names() != names  # TFDS shuffles
    rows = {name: row for row, name in enumerate(source.file_names())}
    as_folder = pickle.loads(pickle.dumps(SubsetSource(source, [rows[name] for name in names])))
    assert as_folder.labels.tolist() == [numbers[class_name] for class_name, _, _ in encoded]
    for i, (class_name, _, content) in enumerate(encoded):
        with Image.open(io.BytesIO(content)) as image:
            expected = np.asarray(image.convert("RGB"))
        pixels, label = as_folder.sample(i)
        np.testing.assert_array_equal(pixels, expected)
        assert as_folder.read(i) == (content, numbers[class_name])
        assert label == numbers[class_name]
        assert as_folder.size(i) == (side, side)
    for ours, theirs in zip(batches(as_folder, sharding), from_folder, strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("form", [*LABELLED, *UNLABELLED])
def test_fingerprint_and_digest_tell_other_pictures(form, pictures, tmp_path):
    write = (LABELLED | UNLABELLED)[form]
    path = write(tmp_path / "set", pictures[0])
    first, again = open_source(path, "train"), open_source(path, "train")
    assert (first.fingerprint(), first.digest()) == (again.fingerprint(), again.digest())
    fewer = open_source(write(tmp_path / "fewer", pictures[0][1:]), "train")
    assert first.fingerprint() != fewer.fingerprint()
    assert first.digest() != fewer.digest()


@pytest.mark.parametrize("form", LABELLED)
def test_names_are_those_of_the_folder_where_the_form_has_them(form, pictures, tmp_path):
    source = open_source(LABELLED[form](tmp_path / "set", pictures[0]), "train")
    files = [f"{class_name}/{name}" for class_name, name, _ in pictures[0]]
    if form == "WebDataset":
        files = [f"train-{i // 25:06}/{i:06}.{name[-3:]}" for i, (_, name, _) in enumerate(pictures[0])]
    elif form == "Parquet":
        files = [name.replace("/", "-") for name in files]
    assert source.file_names() == files
