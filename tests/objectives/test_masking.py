"""Masks: one a picture, view and epoch, whatever else is in the batch."""

import jax.numpy as jnp
import numpy as np
import pytest

from maect_jax.objectives.mae import pixel_targets
from maect_jax.objectives.masking import mask_noise, shuffle
from maect_jax.randomness import PURPOSES, sample_keys, stage_seed

PATCHES = 196


def orders(ids, seed=1, epoch=0, view=0, purpose="mask"):
    keys = sample_keys(seed, purpose, jnp.int32(epoch), jnp.asarray(ids, jnp.int32), view)
    return np.asarray(shuffle(mask_noise(keys, PATCHES)))


def share_kept_in_common(a, b):
    keep = PATCHES // 4
    return np.mean([len(set(x[:keep]) & set(y[:keep])) / keep for x, y in zip(a, b)])


def test_every_row_is_a_permutation_by_ascending_noise():
    noise = jnp.asarray([[0.3, 0.1, 0.2], [0.0, 0.5, 0.25]])
    np.testing.assert_array_equal(shuffle(noise), [[1, 2, 0], [0, 2, 1]])
    assert np.all(np.sort(orders(range(4))) == np.arange(PATCHES))


def test_pictures_of_a_batch_have_different_masks():
    found = orders(range(32))
    assert share_kept_in_common(found[:-1], found[1:]) == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize("change", [{"view": 1}, {"epoch": 1}, {"seed": 2}, {"purpose": "crop"}])
def test_views_epochs_seeds_and_purposes_have_different_masks(change):
    assert share_kept_in_common(orders(range(32)), orders(range(32), **change)) == pytest.approx(0.25, abs=0.05)


def test_a_mask_does_not_depend_on_the_rest_of_the_batch():
    whole = orders([7, 3, 123456, 0])
    np.testing.assert_array_equal(orders([123456])[0], whole[2])
    np.testing.assert_array_equal(orders([0, 7]), whole[[3, 0]])


def test_stages_of_a_run_draw_from_separate_streams():
    assert (
        len({stage_seed(seed, stage) for seed in range(3) for stage in ("pretrain", "control", "head", "tune")}) == 12
    )
    assert len(set(PURPOSES)) == len(PURPOSES)


def test_every_patch_is_equally_likely_to_be_kept():
    kept = np.bincount(orders(range(2000))[:, : PATCHES // 4].ravel(), minlength=PATCHES) / 2000
    assert np.abs(kept - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 2000)


def test_a_constant_patch_has_target_zero_and_not_infinity():
    flat = jnp.full((1, 1, 12), 3.0)
    np.testing.assert_array_equal(pixel_targets(flat, True), np.zeros((1, 1, 12)))
