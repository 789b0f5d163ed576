"""Grids hold their pictures whole and in order; charts are text that no page can take for markup."""

import io
import math

import numpy as np
import pytest
from PIL import Image

from maect_jax.report import charts, figures


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_grids_hold_the_pictures_in_order(channels):
    pictures = np.random.default_rng(0).integers(0, 255, (3, 2, 32, 32, channels), dtype=np.uint8)
    shown = pictures[..., :3] if channels >= 3 else pictures[..., :1].repeat(3, -1)
    original, masked, reconstructed = pictures
    grid = figures.reconstruction_grid(original, masked, reconstructed, min_side=32)
    assert grid.shape == (2 * 35 + 3, 3 * 35 + 3, 3) and (grid[:3] == 255).all()
    for column, part in enumerate((1, 2, 0)):
        for row in range(2):
            cell = grid[3 + 35 * row : 35 + 35 * row, 3 + 35 * column : 35 + 35 * column]
            np.testing.assert_array_equal(cell, shown[part, row])


def test_neighbor_grid_frames_right_green_and_wrong_red():
    pictures = np.random.default_rng(0).integers(0, 255, (2, 3, 32, 32, 3), dtype=np.uint8)
    grid = figures.neighbor_grid(pictures[:, 0], pictures[:, 1:], np.array([4, 7]), np.array([[4, 5], [6, 7]]))
    tile = 64 + 2 * 3 + 3  # 32 pixels enlarged by the whole factor 2, frame, gap
    assert grid.shape == (2 * tile + 3, 3 * tile + 3, 3)
    white = figures.BACKGROUND
    expected = [[white, figures.SAME_CLASS, figures.OTHER_CLASS], [white, figures.OTHER_CLASS, figures.SAME_CLASS]]
    for row in range(2):
        for column in range(3):
            cell = grid[3 + tile * row : tile * (row + 1), 3 + tile * column : tile * (column + 1)]
            frame = np.concatenate([cell[:3].reshape(-1, 3), cell[-3:].reshape(-1, 3), cell[:, :3].reshape(-1, 3)])
            assert (frame == expected[row][column]).all()
            np.testing.assert_array_equal(cell[3:-3:2, 3:-3:2], pictures[row, column])
            np.testing.assert_array_equal(cell[4:-3:2, 4:-3:2], pictures[row, column])
    assert figures.SAME_CLASS[1] == max(figures.SAME_CLASS) and figures.OTHER_CLASS[0] == max(figures.OTHER_CLASS)


def test_png_is_read_back_by_pillow(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    (tmp_path / "grey.png").write_bytes(figures.to_png(grey))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "grey.png")), grey.repeat(3, -1))


@pytest.mark.parametrize(
    "call",
    [
        lambda: figures.to_png(np.zeros((4, 4, 3), np.float32)),
        lambda: figures.to_png(np.zeros((2, 4, 4, 3), np.uint8)),
        lambda: figures.reconstruction_grid(*np.zeros((2, 1, 4, 4, 3), np.uint8), np.zeros((2, 4, 4, 3), np.uint8)),
        lambda: figures.neighbor_grid(
            *(np.zeros(shape, np.uint8) for shape in ((2, 4, 4, 3), (2, 5, 4, 4, 3), 2, (2, 4)))
        ),
        lambda: charts.curve({"a": ([1, 2], [1.0])}, "t", "x", "y"),
        lambda: charts.curve({"a": ([1], [math.nan])}, "t", "x", "y"),
    ],
)
def test_wrong_shapes_are_named(call):
    with pytest.raises(ValueError, match=r"\[|no series"):
        call()


def test_curve_is_deterministic_takes_no_text_for_markup_and_bounds_its_size():
    series = {"_<b>$x^": (range(50_000), np.sin(np.arange(50_000) / 999)), "b": ([3], [0.5])}
    svg = charts.curve(series, "A <i> & $\\frac", "x", "y")
    assert svg == charts.curve(series, "A <i> & $\\frac", "x", "y")
    assert svg.startswith("<svg") and "_&lt;b&gt;$x^</text>" in svg and "<i>" not in svg and "<b>" not in svg
    assert len(svg) < 60_000 and "date" not in svg.lower() and "currentColor" in svg


def test_series_are_ordered_and_a_repeated_step_counts_once():
    lines = [{"stage": "tune", "step": step, "loss": loss} for step, loss in ((0, 5.0), (8, 4.0), (4, 3.0), (8, 2.0))]
    assert charts.metric_series([*lines, {"loss": 1.0}]) == {"loss": {"tune": ([0, 4, 8], [5.0, 3.0, 2.0])}}


def test_numbers_too_large_for_a_float_are_no_points():
    assert charts.metric_series([{"stage": "tune", "step": 10**400, "loss": 1.0}, {"step": 1, "loss": 10**400}]) == {}


def test_jpeg_of_a_smooth_picture_is_near_it():
    ramp = np.add.outer(np.arange(80), np.arange(80)).astype(np.uint8)[..., None].repeat(3, -1)
    shown = np.asarray(Image.open(io.BytesIO(figures.to_jpeg(ramp))), np.int64)
    assert abs(shown - ramp).max() <= 6
    assert figures.data_address(figures.to_jpeg(ramp)).startswith("data:image/jpeg;base64,")
    assert figures.data_address(figures.to_png(ramp)).startswith("data:image/png;base64,")
