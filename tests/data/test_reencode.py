"""What becomes of a picture on its way into a record: unchanged, made smaller, or encoded without loss."""

import io

import numpy as np
import pytest
from packs import natural, packed, write_picture
from PIL import Image, ImageOps

from maect_jax.data.packing.pack import pack
from maect_jax.data.packing.plan import Settings
from maect_jax.data.packing.reencode import packed as made
from maect_jax.data.sources.base import ArraySource
from maect_jax.data.sources.open import open_source
from maect_jax.errors import BadPicture, DataError


def pillow_pixels(encoded):
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))))


def through_pillow(image, width, height, quality):
    """What Pillow's resize and Pillow's JPEG (4:2:0) make of an image."""
    file = io.BytesIO()
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    resized.save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return np.asarray(Image.open(file), np.float64)


def test_larger_pictures_are_made_smaller_as_pillow_does_and_others_stay_as_they_are(tmp_path):
    root = tmp_path / "in"
    for name, size in (("wide", (60, 90)), ("tall", (91, 60)), ("small", (32, 200)), ("exact", (40, 70))):
        write_picture(root / f"{name}.jpg", natural(1, *size), quality=95)
    packed(root, tmp_path / "out", short_side=40, quality=95)
    before, after = open_source(str(root), "train"), open_source(str(tmp_path / "out"), "train")
    expected = {"wide.jpg": (40, 60), "tall.jpg": (60, 40), "small.jpg": (32, 200), "exact.jpg": (40, 70)}
    for index, name in enumerate(after.file_names()):
        encoded = after.read(index)[0]
        image = after.image(index)
        assert image.shape[:2] == expected[name]
        if name in ("small.jpg", "exact.jpg"):
            assert encoded == before.read(index)[0]
        else:
            whole = Image.fromarray(before.image(index))
            assert encoded != before.read(index)[0] and Image.open(io.BytesIO(encoded)).format == "JPEG"
            assert abs(image - through_pillow(whole, *image.shape[1::-1], 95)).mean() < 0.1


def test_grey_stays_grey_and_the_cameras_rotation_is_applied_when_a_picture_is_written_anew(tmp_path):
    root = tmp_path / "in"
    write_picture(root / "grey.jpg", natural(1, 60, 80, 1))
    write_picture(root / "grey16.png", (natural(1, 60, 80, 1).astype(np.uint16) * 256))
    exif = Image.Exif()
    exif[0x0112] = 6
    write_picture(root / "turned.jpg", natural(2, 60, 80), quality=95, exif=exif)
    write_picture(root / "turned_small.jpg", natural(3, 20, 30), exif=exif)
    packed(root, tmp_path / "out", short_side=40)
    source = open_source(str(tmp_path / "out"), "train")
    found = {name: source.read(index)[0] for index, name in enumerate(source.file_names())}
    for name in ("grey.jpg", "grey16.png"):
        image = Image.open(io.BytesIO(found[name]))
        assert (image.format, image.mode, image.size) == ("JPEG", "L", (53, 40))
    turned = Image.open(io.BytesIO(found["turned.jpg"]))
    assert turned.size == (40, 53) and 0x0112 not in turned.getexif()
    upright = Image.fromarray(pillow_pixels((root / "turned.jpg").read_bytes()))
    assert abs(np.asarray(turned, np.float64) - through_pillow(upright, 40, 53, 92)).mean() < 0.1
    assert found["turned_small.jpg"] == (root / "turned_small.jpg").read_bytes()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_npy_pictures_keep_their_channels_and_type(tmp_path, dtype):
    scale = 1 if dtype == np.uint8 else 257
    for name, size in (("a", (30, 50)), ("b", (10, 12))):
        image = natural(4, *size, channels=5).astype(dtype) * dtype(scale)
        write = tmp_path / "in" / f"{name}.npy"
        write.parent.mkdir(exist_ok=True)
        np.save(write, image)
    packed(tmp_path / "in", tmp_path / "out", short_side=20)
    source = open_source(str(tmp_path / "out"), "train", channels=5)
    small = np.load(io.BytesIO(source.read(0)[0]), allow_pickle=False)
    assert small.dtype == dtype and small.shape == (20, 33, 5)
    plane = np.load(tmp_path / "in/a.npy")[:, :, 2].astype(np.float32)
    wanted = np.asarray(Image.fromarray(plane).resize((33, 20), Image.Resampling.BICUBIC), np.float64)
    assert abs(small[:, :, 2] / scale - wanted / scale).max() <= 1
    assert source.read(1)[0] == (tmp_path / "in/b.npy").read_bytes()
    assert source.image(0).shape == (20, 33, 5)
    with pytest.raises(DataError, match="set channels to 5"):
        open_source(str(tmp_path / "out"), "train")


def test_a_set_that_holds_pixels_is_packed_without_loss(tmp_path):
    for channels in (1, 3, 4):
        images = np.stack([natural(i, 9, 7, channels) for i in range(6)])
        source = ArraySource("memory", images, np.arange(6) % 2, ("even", "odd"))
        pack("memory", {"train": source}, tmp_path / str(channels), Settings())
        found = open_source(str(tmp_path / str(channels)), "train", channels=channels)
        np.testing.assert_array_equal(np.stack([found.image(i) for i in range(6)]), images)
        assert found.classes == ("even", "odd") and found.labels.tolist() == [0, 1] * 3


def test_a_strip_that_no_jpeg_can_hold_is_a_bad_picture():
    strip = np.zeros((2, 140_000, 3), np.uint8)
    assert made(strip, "strip", None, 92).channels == 3
    with pytest.raises(BadPicture, match="140000x2 pixels are too long for a JPEG; cut it"):
        made(strip, "strip", 1, 92)
