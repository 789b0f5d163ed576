"""ImageNet as everybody gets it: two official archives, prepared by TFDS's own builder through our command."""

import io
import json
import shutil
import sys
import tarfile

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from imagenet_tars import CMYK, PNG, TRAIN, VALIDATION_LABELS, picture, validation_name, write_archives
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image
from tensorflow_datasets.core import shuffle
from tensorflow_datasets.core.download import downloader

from maect_jax.commands import command_line
from maect_jax.data.batches.training import training_batches
from maect_jax.data.packing.without_tensorflow import NeedsTensorFlow, standing_in
from maect_jax.data.sources.open import open_source


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """The data_dir in which the miniature is prepared, by way of files on disk as sets of more than 1 GB are."""
    folder = tmp_path_factory.mktemp("imagenet")
    write_archives(folder / "downloads" / "manual")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 0)
        assert run("imagenet2012", folder) == 0
    return folder


def run(name, data_dir, *more):
    return command_line.main(["data", "prepare", name, "--data-dir", str(data_dir), *more])


def message(capfd, name, data_dir, *more):
    """What the command says when it fails because of the data: one line."""
    capfd.readouterr()
    assert run(name, data_dir, *more) == 3
    kind, line = capfd.readouterr().err.strip().splitlines()
    assert kind == "data error:"
    return line.strip()


def rgb(encoded):
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def test_training_split_is_the_class_archives(imagenet):
    train = open_source("imagenet2012", "train", data_dir=str(imagenet))
    expected = {name: index for index, names in TRAIN.values() for name in names}
    assert dict(zip(train.file_names(), train.labels.tolist())) == expected
    assert len(train) == len(expected) == 12
    assert len(train.classes) == 1000
    assert [train.classes[index] for index, _ in TRAIN.values()] == list(TRAIN)
    for i, name in enumerate(train.file_names()):
        if name not in (CMYK, PNG):
            assert train.read(i) == (picture(name), expected[name])


def test_picture_in_cmyk_and_png_named_jpeg_are_rgb_jpegs_as_tfds_makes_them(imagenet):
    train = open_source("imagenet2012", "train", data_dir=str(imagenet))
    for name in (CMYK, PNG):
        index = train.file_names().index(name)
        with Image.open(io.BytesIO(train.read(index)[0])) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
        error = np.abs(train.image(index).astype(int) - rgb(picture(name)))
        assert error.mean() < 1 and error.max() <= 12  # quality 100, colours at half the resolution


def test_test_split_is_the_validation_archive_with_the_labels_of_the_devkit(imagenet):
    test = open_source("imagenet2012", "test", data_dir=str(imagenet))
    assert test.split == "validation"
    expected = {validation_name(number): label for number, label in enumerate(VALIDATION_LABELS, 1)}
    assert dict(zip(test.file_names(), test.labels.tolist())) == expected
    for i, name in enumerate(test.file_names()):
        np.testing.assert_array_equal(test.image(i), rgb(picture(name)))


def test_training_batches_hold_every_picture_in_every_epoch(imagenet):
    train = open_source("imagenet2012", "train", data_dir=str(imagenet))
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("data",)), PartitionSpec("data"))
    size = {"views": 2, "image_size": 32, "crop_scale": (0.5, 1.0), "resident_limit": 0}
    stream = training_batches(train, batch=4, seed=0, start_step=0, sharding=sharding, **size)
    for _ in range(2):
        batches = [jax.device_get(next(stream)) for _ in range(3)]
        ids = np.concatenate([batch["id"] for batch in batches])
        assert sorted(ids.tolist()) == list(range(12))
        np.testing.assert_array_equal(np.concatenate([batch["label"] for batch in batches]), train.labels[ids])
        for batch in batches:
            assert batch["image"].shape == (4, 2, 32, 32, 3)
            for row, i in enumerate(batch["id"]):  # crops of slow waves have the colours of the picture
                whole = train.image(int(i))
                low, high = batch["image"][row].min((0, 1, 2)), batch["image"][row].max((0, 1, 2))
                assert (low + 3.0 >= whole.min((0, 1))).all() and (high - 3.0 <= whole.max((0, 1))).all()
    stream.close()


def test_command_prepares_without_tensorflow_and_says_what_there_is(imagenet, tmp_path, capfd):
    assert run("imagenet2012", tmp_path, "--manual-dir", str(imagenet / "downloads" / "manual")) == 0
    assert "tensorflow" not in sys.modules
    at = tmp_path / "imagenet2012" / "5.1.0"
    said = capfd.readouterr().out.splitlines()[-1]
    assert said == f"imagenet2012/5.1.0 in {at}: train 12, validation 6"
    for file in (imagenet / "imagenet2012" / "5.1.0").glob("*array_record*"):  # that one went over files on disk
        assert (at / file.name).read_bytes() == file.read_bytes()


def test_prepared_set_is_left_as_it_is(imagenet, capfd):
    before = {path: path.stat().st_mtime_ns for path in (imagenet / "imagenet2012").rglob("*")}
    assert run("imagenet2012", imagenet) == 0
    assert "train 12, validation 6" in capfd.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (imagenet / "imagenet2012").rglob("*")} == before


# ---------------------------------------------------------------------------------------------------- what is missing


@pytest.mark.parametrize("missing", [("train",), ("val",), ("train", "val")])
def test_missing_archive_is_named_with_its_place_and_where_to_get_it(imagenet, tmp_path, capfd, missing):
    manual = tmp_path / "downloads" / "manual"
    shutil.copytree(imagenet / "downloads" / "manual", manual)
    for part in missing:
        (manual / f"ILSVRC2012_img_{part}.tar").unlink()
    text = message(capfd, "imagenet2012", tmp_path)
    absent = " and no ".join(f"ILSVRC2012_img_{part}.tar" for part in missing)
    assert (
        f"{manual} has no {absent}; get what is missing from https://image-net.org/download.php (login needed)" in text
    )
    assert not (tmp_path / "imagenet2012").exists()


@pytest.mark.parametrize("bytes_less", ["end blocks", 1, 700, 10240, 30000])
def test_archive_that_is_cut_off_is_named(imagenet, tmp_path, capfd, bytes_less):
    manual = tmp_path / "manual"
    shutil.copytree(imagenet / "downloads" / "manual", manual)
    train = manual / "ILSVRC2012_img_train.tar"
    with tarfile.open(train) as tar:  # where the end is marked; what comes after that is padding
        last = tar.getmembers()[-1]
    end = last.offset_data + last.size
    train.write_bytes(train.read_bytes()[: end if bytes_less == "end blocks" else end - bytes_less])
    text = message(capfd, "imagenet2012", tmp_path, "--manual-dir", str(manual))
    assert f"{train} is cut off at byte {train.stat().st_size}; download it again" in text


def test_archive_of_something_else_fails_in_one_line(imagenet, tmp_path, capfd):
    manual = tmp_path / "manual"
    shutil.copytree(imagenet / "downloads" / "manual", manual)
    (manual / "ILSVRC2012_img_val.tar").write_bytes(b"<html>" + bytes(10234))
    text = message(capfd, "imagenet2012", tmp_path, "--manual-dir", str(manual))
    assert f"{manual / 'ILSVRC2012_img_val.tar'} is no tar archive" in text
    nothing = io.BytesIO()
    with tarfile.open(fileobj=nothing, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("n01440764.tar"), io.BytesIO())
    (manual / "ILSVRC2012_img_train.tar").write_bytes(nothing.getvalue())
    shutil.copy(imagenet / "downloads" / "manual" / "ILSVRC2012_img_val.tar", manual)
    text = message(capfd, "imagenet2012", tmp_path, "--manual-dir", str(manual))
    assert "TFDS could not prepare 'imagenet2012': ReadError" in text
    assert not list((tmp_path / "imagenet2012").glob("*/*.array_record*"))


def test_name_that_tfds_does_not_know_comes_with_a_suggestion(tmp_path, capfd):
    assert "did you mean 'imagenet2012'?" in message(capfd, "imagenet20122", tmp_path)
    assert "did you mean 'imagenet2012_subset/1pct'?" in message(capfd, "imagenet2012_subset/1pc", tmp_path)


def test_set_in_another_format_is_named(imagenet, tmp_path, capfd):
    shutil.copytree(imagenet / "imagenet2012", tmp_path / "imagenet2012")
    info = tmp_path / "imagenet2012" / "5.1.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    assert f"{info.parent} is there already, in the tfrecord format" in message(capfd, "imagenet2012", tmp_path)


def test_download_that_fails_says_where_to_put_the_file(imagenet, tmp_path, capfd, monkeypatch):
    for proxy in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(downloader, "MAX_RETRIES", 0)
    manual = imagenet / "downloads" / "manual"
    text = message(capfd, "imagenet2012_subset/1pct", tmp_path, "--manual-dir", str(manual))
    assert "can not be downloaded" in text and "1percent.txt" in text and str(manual) in text


# ------------------------------------------------------------------------------------------- parts and other labels


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """What TFDS would download, by the end of its address."""
    files = {}

    def download(self, url):
        (content,) = (content for end, content in files.items() if url.endswith(end))
        path = tmp_path / "downloaded"
        path.write_text(content)
        return path

    monkeypatch.setattr(tfds.download.DownloadManager, "download", download)
    return files


def test_share_of_the_training_set_is_that_of_the_list(imagenet, tmp_path, downloads):
    chosen = ["n01440764_36.JPEG", CMYK, "n15075141_54.JPEG"]
    downloads["1percent.txt"] = "\n".join([*chosen, "n01440764_99999.JPEG"])
    assert run("imagenet2012_subset/1pct", tmp_path, "--manual-dir", str(imagenet / "downloads" / "manual")) == 0
    share = open_source("imagenet2012_subset/1pct", "train", data_dir=str(tmp_path))
    assert dict(zip(share.file_names(), share.labels.tolist())) == dict(zip(chosen, (0, 59, 999)))
    assert len(open_source("imagenet2012_subset/1pct", "test", data_dir=str(tmp_path))) == len(VALIDATION_LABELS)


def test_reassessed_labels_need_the_validation_archive_alone(imagenet, tmp_path, downloads):
    sets = [[1], [], [230, 231], [809], [516], [57]]
    downloads["real.json"] = json.dumps(sets + [[]] * (50_000 - len(sets)))
    manual = tmp_path / "manual"
    manual.mkdir()
    shutil.copy(imagenet / "downloads" / "manual" / "ILSVRC2012_img_val.tar", manual)
    assert run("imagenet2012_real", tmp_path, "--manual-dir", str(manual)) == 0
    real = open_source("imagenet2012_real", "test", data_dir=str(tmp_path))
    found = {name: several.tolist() for name, several in zip(real.file_names(), real.label_sets())}
    assert found == {validation_name(number): labels for number, labels in enumerate(sets, 1)}


# ------------------------------------------------------------------------------------------------------ TensorFlow


class Arrays(tfds.core.GeneratorBasedBuilder):
    """A set that has pixels, which TFDS encodes."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(shape=(None, None, 3)), "grey": tfds.features.Image(shape=(7, 9, 1))}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        rng = np.random.default_rng(0)
        for i in range(3):
            yield (
                i,
                {
                    "image": rng.integers(0, 256, (5, 6, 3), np.uint8),
                    "grey": rng.integers(0, 256, (7, 9, 1), np.uint8),
                },
            )


class Resized(Arrays):
    """A set that asks for more of TensorFlow than files and encoding."""

    VERSION = tfds.core.Version("1.0.0")

    def _generate_examples(self):
        from tensorflow_datasets.core.utils.lazy_imports_utils import tensorflow as tf

        for key, example in super()._generate_examples():
            yield key, example | {"image": tf.image.resize(example["image"], (4, 4))}


class Imports(Arrays):
    VERSION = tfds.core.Version("1.0.0")

    def _generate_examples(self):
        import tensorflow.io  # noqa: F401

        yield from super()._generate_examples()


class Spoken(Arrays):
    VERSION = tfds.core.Version("1.0.0")

    def _generate_examples(self):
        import a_package_that_nobody_has  # noqa: F401

        yield from super()._generate_examples()


def test_set_of_arrays_is_encoded_without_loss(tmp_path):
    assert run("arrays", tmp_path) == 0
    source = open_source("arrays", "train", data_dir=str(tmp_path))
    rng, expected = np.random.default_rng(0), set()
    for _ in range(3):
        expected.add(rng.integers(0, 256, (5, 6, 3), np.uint8).tobytes())
        rng.integers(0, 256, (7, 9, 1), np.uint8)
    assert {source.image(i).tobytes() for i in range(3)} == expected


@pytest.mark.parametrize(("name", "asked_for"), [("resized", "tf.image.resize"), ("imports", "tensorflow")])
def test_set_that_needs_tensorflow_says_what_to_install(tmp_path, capfd, name, asked_for):
    text = message(capfd, name, tmp_path)
    assert f"TFDS '{name}' needs TensorFlow to be prepared (it asks for {asked_for})" in text
    assert '`pip install "tensorflow' in text and ">=2." in text and "for this one step" in text
    assert f"`python -m maect_jax data prepare {name} --data-dir {tmp_path}`" in text
    assert not (tmp_path / name / "1.0.0").exists()


def test_set_that_needs_another_package_names_it(tmp_path, capfd):
    assert "needs the package 'a_package_that_nobody_has' to be prepared" in message(capfd, "spoken", tmp_path)


def test_nothing_stands_in_for_tensorflow_outside():
    from tensorflow_datasets.core.utils.lazy_imports_utils import tensorflow as tf

    with standing_in():
        assert tf.io.gfile.exists("/")
        with pytest.raises(NeedsTensorFlow, match=r"tf\.data"):
            tf.data  # noqa: B018
    with pytest.raises(ImportError):
        tf.io  # noqa: B018
    assert "tensorflow" not in sys.modules
