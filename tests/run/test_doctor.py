"""`python -m maect_jax doctor` on pictures made here, as its users start it."""

import json

import numpy as np
import pytest
from PIL import Image

from runs import TINY, maect, make_pictures


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """40 JPEGs of 500x375."""
    root = tmp_path_factory.mktemp("photos")
    for i in range(40):
        rng = np.random.default_rng(i)
        small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        small.resize((500, 375), Image.Resampling.BICUBIC).save(root / f"{i:02}.jpg", quality=92)
    return root


def test_a_streamed_set_is_measured_in_all_its_parts(photos):
    process = maect("doctor", f"--config={TINY}", f"--config.data.train={photos}", "--config.data.resident_gib=0",
                    "--seconds=3", "--accelerator=h200", "--devices=8", "--json")  # fmt: skip
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout)
    feeds = found["feeds"]
    assert not feeds["resident"] and (feeds["workers"], feeds["short_side"]) == (0, 375)
    assert feeds["one_size"] == [375, 500]
    for rate in ("pipeline", "other_pipeline", "read", "decode"):
        assert feeds[rate] > 1, rate
    assert feeds["read"] > feeds["decode"]
    assert feeds["bytes_each"] == pytest.approx(np.mean([p.stat().st_size for p in photos.iterdir()]))
    assert found["packed_gain"] > 1.2
    assert (found["accelerator"]["name"], found["accelerator"]["count"]) == ("h200", 8)
    assert found["advice"][0].startswith("too slow")
    assert not list(photos.parent.glob("bad_images*"))


def test_a_resident_set_is_enough_and_the_table_is_readable(tmp_path):
    pictures = make_pictures(tmp_path / "pictures")
    process = maect("doctor", f"--config={TINY}", f"--config.data.train={pictures}", "--seconds=1")
    assert process.returncode == 0, process.stderr
    assert "batches on the device, the devices hold the set" in process.stdout
    assert "TFLOP/s in a matrix product here" in process.stdout
    assert "enough: the whole set lies on the devices" in process.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.data.trian=x"], "config.data.trian: no such setting"),
        (["--config.data.train=/nowhere"], "no folder '/nowhere'"),
        (["--seconds=0"], "--seconds 0.0: must be positive"),
        (["--config.stages=evaluate"], "none of them is trained"),
        (["extra"], "'extra' is not understood"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    process = maect("doctor", f"--config={TINY}", "--config.data.train=digits", *arguments)
    assert process.returncode in (2, 3) and message in process.stderr
    assert "Traceback" not in process.stderr
