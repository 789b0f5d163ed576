"""Decoding: every form of picture gives the pixels that Pillow gives, upright, as 8-bit grey or RGB."""

import io
import struct

import numpy as np
import pytest
from corpus import encoded, jpegs, npy, npy_claiming, others, photo, png, tiff16, with_orientation
from PIL import Image, ImageOps

from maect_jax.data.host.decode import decode, open_picture
from maect_jax.data.sources.open import open_source
from maect_jax.errors import BadPicture, DataError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's own; `others` drops them in a run

JPEGS, OTHERS = jpegs(), others()
MODES = {1: "L", 3: "RGB"}


def by_pillow(file, channels):
    with Image.open(io.BytesIO(file)) as image:
        pixels = np.asarray(ImageOps.exif_transpose(image).convert(MODES[channels]))
    return pixels.reshape(*pixels.shape[:2], channels)


@pytest.mark.parametrize("channels", MODES)
@pytest.mark.parametrize("form", [*JPEGS, *OTHERS])
def test_every_form_gives_the_pixels_of_pillow(form, channels):
    file = (JPEGS | OTHERS)[form]
    picture = open_picture(file, channels, form)
    pixels = picture.pixels()
    np.testing.assert_array_equal(pixels, by_pillow(file, channels))
    assert pixels.dtype == np.uint8
    assert (picture.height, picture.width) == pixels.shape[:2]


def test_libjpeg_turbo_decodes_all_but_odd_samplings():
    by_hand = {form for form, file in JPEGS.items() if open_picture(file, 3, form).kind != "jpeg"}
    assert by_hand == {form for form in JPEGS if form.startswith("sampling")}


LOSSLESS = {
    "PNG": ("", " 16 bit", " 16 bit alpha", " interlaced", " animated", " alpha", " transparent colour"),
    "TIFF": ("", " LZW", " deflate", " pages", " 16 bit"),
    "WebP": (" lossless", " alpha"),
    "BMP": ("",),
    "PPM": ("",),
}


@pytest.mark.parametrize("form", [form + kind for form, kinds in LOSSLESS.items() for kind in kinds])
def test_what_keeps_every_pixel_gives_every_pixel_of_the_first_picture(form):
    np.testing.assert_array_equal(decode(OTHERS[form], 3, form), photo(29, 43, 1))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_becomes_grey_or_rgb_as_pillow_converts(mode):
    image = Image.fromarray(photo(6, 8, 3))
    image = image.convert("L") if mode == "I;16" else image.convert(mode)
    file = encoded(Image.fromarray(np.asarray(image).astype(np.uint16) << 8) if mode == "I;16" else image, "TIFF")
    for channels, target in MODES.items():
        expected = np.asarray(image.convert(target)).reshape(6, 8, channels)
        np.testing.assert_array_equal(decode(file, channels, mode), expected)


@pytest.mark.parametrize("form", ["GIF animated", "WebP animated"])
def test_of_an_animation_the_first_picture_is_taken(form):
    first = decode(OTHERS[form], 3, form).astype(int)
    errors = [np.abs(first - photo(29, 43, seed)).mean() for seed in (1, 2, 3)]
    assert errors[0] < 16 < 30 < min(errors[1:])


# EXIF 2.3, tag 0x0112: what has to be done to the stored pixels to see the picture upright
UPRIGHT = {
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: np.fliplr(np.rot90(x, -1)),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.fliplr(np.rot90(x, 1)),
    8: lambda x: np.rot90(x, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_pictures_come_out_as_the_camera_was_held(orientation):
    image = photo(21, 34)
    for kind in ("JPEG", "PNG", "TIFF"):
        stored = decode(encoded(image, kind), 3, kind)
        picture = open_picture(encoded(image, kind, exif=with_orientation(orientation)), 3, kind)
        expected = UPRIGHT[orientation](stored)
        assert (picture.height, picture.width) == expected.shape[:2]
        np.testing.assert_array_equal(picture.pixels(), expected)


def inserted(jpeg, *segments):
    """A JPEG with APP1 (or other) segments after its first one."""
    at = 4 + int.from_bytes(jpeg[4:6], "big")
    parts = b"".join(struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content for marker, content in segments)
    return jpeg[:at] + parts + jpeg[at:]


def exif_block(*tags, order="<"):
    """An EXIF segment with these (tag, type, count, value as bytes of four)."""
    tags = b"".join(struct.pack(order + "HHI", *tag[:3]) + tag[3] for tag in tags)
    count = struct.pack(order + "H", len(tags) // 12)
    head = b"II*\0" if order == "<" else b"MM\0*"
    return b"Exif\0\0" + head + struct.pack(order + "I", 8) + count + tags + bytes(4)


SIX = exif_block((0x0112, 3, 1, b"\6\0\0\0"))
XMP = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="8"/></x:xmpmeta>'


@pytest.mark.parametrize(
    ("segments", "orientation"),
    [
        ([(0xE1, SIX)], 6),
        ([(0xE2, b"ICC_PROFILE\0\1\1" + bytes(9000)), (0xFE, b"comment"), (0xE1, SIX)], 6),
        ([(0xE1, exif_block((0x0112, 3, 1, b"\0\6\0\0"), order=">"))], 6),
        ([(0xE1, exif_block((0x0112, 4, 1, b"\6\0\0\0")))], 6),
        ([(0xE1, exif_block((0x010F, 2, 4, b"abc\0"), (0x0112, 3, 1, b"\3\0\0\0")))], 3),
        ([(0xE1, XMP)], 8),
        ([(0xE1, XMP), (0xE1, SIX)], 6),
        ([(0xE1, SIX[:20]), (0xE1, b"Exif\0\0" + SIX[20:])], 6),
        ([(0xE1, exif_block((0x0112, 3, 1, b"\0\0\0\0")))], 1),
        ([(0xE1, exif_block((0x0112, 3, 1, b"\x09\0\0\0")))], 1),
        ([(0xE1, exif_block((0x0112, 2, 2, b"6\0\0\0")))], 1),
        ([(0xE2, SIX)], 1),
        ([], 1),
    ],
)
def test_orientation_of_a_jpeg_is_found_where_pillow_finds_it(segments, orientation):
    file = inserted(JPEGS["4:2:0"], *segments)
    assert open_picture(file, 3, "x").orientation == orientation
    np.testing.assert_array_equal(decode(file, 3, "x"), by_pillow(file, 3))


@pytest.mark.parametrize(
    "broken", [b"Exif\0\0", b"Exif\0\0no TIFF header", SIX[:17], SIX[:-9], b"Exif\0\0MM*\0" + SIX[10:]]
)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_block_does_not_cost_the_picture(form, broken):
    image = Image.fromarray(photo(20, 30))
    file = encoded(image, form, exif=broken)
    expected = np.asarray(Image.open(io.BytesIO(encoded(image, form))).convert("RGB"))
    np.testing.assert_array_equal(decode(file, 3, "x"), expected)


def test_thumbnail_in_the_exif_block_is_not_the_picture():
    thumbnail = encoded(photo(8, 8, 5), "JPEG")
    block = with_orientation(6)
    block.get_ifd(1)[0x0103] = 6
    file = inserted(JPEGS["4:2:0"], (0xE1, block.tobytes() + thumbnail))
    picture = open_picture(file, 3, "x")
    assert (picture.height, picture.width, picture.orientation) == (67, 45, 6)
    np.testing.assert_array_equal(picture.pixels(), by_pillow(file, 3))


def test_sixteen_bit_grey_is_divided_not_clipped():
    values = np.array([[0, 255, 256, 0x7FFF, 0xFFFF]], np.uint16)
    files = {
        "PNG": png(values),
        "TIFF": encoded(Image.fromarray(values), "TIFF"),
        "TIFF, great end first": encoded(Image.frombytes("I;16B", (5, 1), values.astype(">u2").tobytes()), "TIFF"),
        "PGM": b"P5 5 1 65535\n" + values.astype(">u2").tobytes(),
        ".npy": npy(values),
        ".npy, great end first": npy(values.astype(">u2")),
    }
    for form, file in files.items():
        assert decode(file, 1, form)[0, :, 0].tolist() == [0, 0, 1, 127, 255], form
        if not form.startswith(".npy"):
            assert decode(file, 3, form)[0].tolist() == [[v] * 3 for v in (0, 0, 1, 127, 255)], form


def test_sixteen_bit_colours_keep_their_upper_half():
    image = np.random.RandomState(0).randint(0, 1 << 16, (5, 7, 3)).astype(np.uint16)
    for file in (png(image), png(image, interlaced=True), tiff16(image)):
        np.testing.assert_array_equal(decode(file, 3, "x"), image >> 8)


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1), (4, 6, 2), (4, 6, 3), (4, 6, 5), (4, 6, 13)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_npy_pictures_may_have_any_number_of_channels(shape, dtype):
    channels = (*shape, 1)[2]
    expected = (np.arange(np.prod(shape)) % 256).astype(np.uint8).reshape(4, 6, channels)
    array = (expected.astype(dtype) * (256 if dtype == np.uint16 else 1)).reshape(shape)
    version_2 = io.BytesIO()
    np.lib.format.write_array(version_2, array, version=(2, 0))
    for file in (npy(array), npy(np.asfortranarray(array)), version_2.getvalue()):
        picture = open_picture(file, channels, "x")
        assert (picture.height, picture.width) == (4, 6)
        np.testing.assert_array_equal(picture.pixels(), expected)


def test_npy_header_of_another_writer_is_read():
    header = "{'shape':(2,3),'descr':'<u1','fortran_order':False}\n"
    assert decode(npy_claiming(header, bytes(range(6))), 1, "x").ravel().tolist() == list(range(6))


def test_number_of_channels_is_an_error_of_the_set_not_of_one_picture():
    with pytest.raises(DataError, match=r"a\.npy: 5 channels, not 3; set channels to 5") as caught:
        decode(npy(np.zeros((4, 6, 5), np.uint8)), 3, "a.npy")
    assert not isinstance(caught.value, BadPicture)
    with pytest.raises(DataError, match=r"a\.png: a picture file gives 1 or 3 channels, not 4") as caught:
        decode(OTHERS["PNG alpha"], 4, "a.png")
    assert not isinstance(caught.value, BadPicture)


def test_pixels_are_taken_as_they_are():
    image = np.zeros((3, 4, 7), np.uint8)
    assert decode(image, 7, "x") is image


@pytest.mark.parametrize("reduction", [2, 4, 8])
@pytest.mark.parametrize("form", ["4:2:0", "grey", "CMYK", "arithmetic coding"])
def test_reduced_jpeg_has_the_rounded_up_size_and_the_means_of_the_whole(form, reduction):
    whole = decode(JPEGS[form], 3, form)
    reduced = open_picture(JPEGS[form], 3, form).stored(reduction)
    assert reduced.shape == (-(-whole.shape[0] // reduction), -(-whole.shape[1] // reduction), 3)
    if whole.shape[0] >= 4 * reduction:
        height, width = (side // reduction for side in whole.shape[:2])
        blocks = whole[: height * reduction, : width * reduction].reshape(height, reduction, width, reduction, 3)
        assert np.abs(reduced[:height, :width] - blocks.mean((1, 3))).mean() < 8


def test_form_is_told_by_the_content_not_by_the_name(tmp_path):
    files = {"a.png": JPEGS["4:4:4"], "b.jpg": OTHERS["PNG"], "c.gif": OTHERS["WebP"], "d.JPEG": OTHERS["BMP"]}
    files |= {"e.tif": OTHERS["GIF"], "f.jpg": npy(photo(5, 6)), "g.npy": OTHERS["TIFF"]}
    for name, file in files.items():
        (tmp_path / name).write_bytes(file)
    source = open_source(str(tmp_path), "train")
    assert source.file_names() == list(files)
    for index, (name, file) in enumerate(files.items()):
        expected = photo(5, 6) if name == "f.jpg" else by_pillow(file, 3)
        np.testing.assert_array_equal(source.image(index), expected)
        assert source.size(index) == expected.shape[:2]
