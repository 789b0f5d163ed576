"""Files that are no picture, or not all of one: an error of one line that says which and what, and nothing else."""

import functools
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from corpus import encoded, jpegs, npy, others, photo, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from maect_jax.data.host.decode import MAX_BYTES, decode, open_picture
from maect_jax.data.sources.open import open_source
from maect_jax.errors import BadPicture

# pytest puts the filters of warnings back for each test; that a run prints none is tested in a process of its own
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")

REFUSED = refused()
FORMS = (
    {f"JPEG {name}": file for name, file in jpegs().items() if len(file) < 5000} | others() | {".npy": npy(photo(9, 7))}
)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_no_picture_is_refused_in_one_line_that_says_what_it_is(name, channels):
    file, said = REFUSED[name]
    if name.startswith(".npy") and channels == 1 and "colours" not in name:
        channels = 3
    with pytest.raises(BadPicture, match=r"^a folder/x\.jpg: ") as caught:
        decode(file, channels, "a folder/x.jpg")
    message = str(caught.value)
    assert re.search(said, message), message
    assert "\n" not in message and len(message) < 350 and "object at 0x" not in message
    assert message.endswith(", or take it out")


def test_file_of_too_many_bytes_is_refused():
    with pytest.raises(BadPicture, match=r"x\.jpg: more than 268435456 bytes; scale the picture down"):
        decode(b"\xff\xd8\xff" + bytes(MAX_BYTES), 3, "x.jpg")


def outcome(file, channels=3):
    """The pixels, or None when the file is refused as it should be. Anything else is raised."""
    try:
        picture = open_picture(file, channels, "x.jpg")
        pixels = picture.pixels()
    except BadPicture as error:
        assert error.where == "x.jpg" and error.reason and "\n" not in str(error)
        return None
    assert pixels.dtype == np.uint8 and pixels.shape == (picture.height, picture.width, channels)
    return pixels


@pytest.mark.parametrize("form", [form for form in FORMS if form != "PPM in digits"])  # 2 may be the first of 252
def test_file_that_is_cut_off_is_refused_or_has_all_its_pixels(form):
    file, whole = FORMS[form], decode(FORMS[form], 3, form)
    cuts = {*range(0, len(file), max(1, len(file) // 60)), *range(max(0, len(file) - 12), len(file))}
    refusals = 0
    for cut in cuts:
        pixels = outcome(file[:cut])
        refusals += pixels is None
        if pixels is not None:
            np.testing.assert_array_equal(pixels, whole)
    assert refusals > 0.2 * len(cuts)  # the further pictures of an animation, or EXIF after the pixels, may be missing


@pytest.mark.parametrize("form", ["JPEG 4:2:0", "JPEG 4:2:0, progressive", "JPEG CMYK", "JPEG grey", "PNG", ".npy"])
def test_every_prefix_without_the_last_pixel_is_refused(form):
    file = FORMS[form]
    end = file.rindex(b"IEND") - 5 if form == "PNG" else len(file) - (2 if form.startswith("JPEG") else 0)
    assert all(outcome(file[:cut]) is None for cut in range(0, end, 7 if len(file) > 1000 else 1))


def flipped(file, seed):
    damaged, random = bytearray(file), np.random.RandomState(seed)
    for _ in range(random.randint(1, 4)):
        damaged[random.randint(len(file)) if seed % 2 else random.randint(min(len(file), 700))] ^= 1 << random.randint(
            8
        )
    return bytes(damaged)


@pytest.mark.parametrize("form", FORMS)
def test_flipped_bits_are_refused_or_give_a_picture_and_nothing_else(form):
    for seed in range(60):
        outcome(flipped(FORMS[form], seed), 1 if seed % 3 == 0 and form != ".npy" else 3)


@pytest.mark.parametrize("form", [form for form in FORMS if form.startswith("PNG") and "orientation" not in form])
def test_flipped_bit_of_a_png_never_gives_other_pixels(form):
    file, whole = FORMS[form], decode(FORMS[form], 3, form)
    refusals = 0
    for bit in range(0, 8 * len(file), max(1, 8 * len(file) // 250)):
        damaged = bytearray(file)
        damaged[bit // 8] ^= 1 << bit % 8
        pixels = outcome(bytes(damaged))
        refusals += pixels is None
        if pixels is not None:
            np.testing.assert_array_equal(pixels, whole)
    assert refusals > 70


def test_damage_within_a_jpeg_that_libjpeg_notices_is_refused_where_pillow_is_silent():
    file = bytearray(encoded(photo(120, 160), "JPEG", quality=90, restart_marker_blocks=4))
    middle = file.index(b"\xff\xda") + 600
    file[middle : middle + 40] = bytes(40)
    assert Image.open(io.BytesIO(bytes(file))).convert("RGB").size == (160, 120)
    assert outcome(bytes(file)) is None


HEADS = [
    FORMS[form][:n] for form in ("JPEG 4:2:0", "PNG", "GIF", "WebP", "BMP", "TIFF", "PPM", ".npy") for n in (8, 30)
]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(head=st.sampled_from(HEADS), rest=st.binary(max_size=300), channels=st.sampled_from([1, 3]))
def test_anything_after_the_first_bytes_of_a_picture_is_a_picture_or_refused(head, rest, channels):
    outcome(head + rest, channels if not head.startswith(b"\x93") else 3)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_files_with_parts_changed_moved_or_missing_are_pictures_or_refused(data):
    file = bytearray(FORMS[data.draw(st.sampled_from(sorted(set(FORMS) - {".npy"})))])
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(file)))
        end = data.draw(st.integers(start, min(len(file), start + 64)))
        file[start:end] = data.draw(st.one_of(st.binary(max_size=16), st.just(file[:16]), st.just(b"\xff" * 4)))
    outcome(bytes(file), data.draw(st.sampled_from([1, 3])))


# Compressed TIFFs are left out: libtiff prints a line of its own for a damaged one, which Pillow lets it do.
PROCESS = """
import logging, resource, sys
import numpy as np
from corpus import jpegs, others, refused
from test_bad_pictures import FORMS, flipped, outcome

logging.basicConfig()  # as a run has it
pictures = refusals = 0
files = [file for file, _ in refused().values()]
whole = [file for form, file in FORMS.items() if form not in ("TIFF LZW", "TIFF deflate", "TIFF JPEG")]
files += [flipped(file, seed) for file in whole for seed in range(8)]
files += [file[: len(file) * part // 5] for file in whole for part in range(1, 6)]
for file in files:
    for channels in (1, 3):
        if file.startswith(b"\\x93NUMPY") and channels == 1:
            continue
        if outcome(file, channels) is None:
            refusals += 1
        else:
            pictures += 1
print(pictures, refusals, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_bad_pictures_cost_neither_the_process_nor_its_memory_and_nothing_is_printed():
    here = Path(__file__).resolve().parent
    paths = os.pathsep.join([str(here.parents[1]), str(here), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", PROCESS], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")
    pictures, refusals, mebibytes = map(int, result.stdout.split())
    assert pictures > 200 and refusals > 500
    assert mebibytes < 1024


@functools.cache
def good():
    return encoded(photo(12, 16), "PNG")


@pytest.fixture
def folder(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.jpg").write_bytes(good())
    return tmp_path


def test_picture_that_becomes_a_folder_or_goes_away_is_named(folder):
    source = open_source(str(folder), "train")
    (folder / "b.jpg").unlink()
    with pytest.raises(BadPicture, match=r"b\.jpg: not a readable picture \(no such file\)"):
        source.image(1)
    (folder / "b.jpg").mkdir()
    with pytest.raises(BadPicture, match=r"b\.jpg: not a readable picture \(.*[Ii]s a directory"):
        source.image(1)
    assert source.image(0).shape == source.image(2).shape == (12, 16, 3)


def test_folder_named_like_a_picture_is_none(folder):
    (folder / "d.jpg").mkdir()
    assert open_source(str(folder), "train").file_names() == ["a.jpg", "b.jpg", "c.jpg"]


def test_file_that_may_not_be_read_is_named(folder):
    source = open_source(str(folder), "train")
    (folder / "b.jpg").chmod(0)
    root = os.geteuid() == 0
    if root:  # who may read everything
        os.seteuid(65534)
    try:
        with pytest.raises(BadPicture, match=r"b\.jpg: not a readable picture \(.*[Pp]ermission denied"):
            source.image(1)
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes among its files")
def test_pipe_or_device_named_like_a_picture_is_refused_and_not_waited_for(folder):
    source = open_source(str(folder), "train")
    for path, make in ((folder / "b.jpg", os.mkfifo), (folder / "c.jpg", lambda path: path.symlink_to("/dev/zero"))):
        path.unlink()
        make(path)
        with pytest.raises(BadPicture, match=r"\.jpg: not a readable picture \(it is a pipe or a device\)"):
            source.image(source.file_names().index(path.name))


def test_file_that_is_longer_than_any_picture_is_not_read_to_its_end(folder):
    with open(folder / "b.jpg", "ab") as file:
        file.truncate(1 << 40)  # takes no room
    with pytest.raises(BadPicture, match=r"b\.jpg: more than 268435456 bytes"):
        open_source(str(folder), "train").image(1)
