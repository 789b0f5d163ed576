"""Random erasing, mixup, cutmix and soft labels: distributions, exact mixtures, and what they may depend on."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import special, stats
from timm.data import mixup
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing

from maect_jax.data.device.mixing import mixup_cutmix, random_erasing, smooth_labels, soft_cross_entropy
from maect_jax.parallel.mesh import batch_sharding, make_mesh

SPLIT = batch_sharding(make_mesh())  # over eight devices

# -------------------------------------------------------------------------------------------------------------- erasing


def boxes_of(changed_bhw: np.ndarray) -> np.ndarray:
    """Height and width of the bounding box of each picture's changed pixels, all of which must be changed; [b, 2]."""
    sides = []
    for changed in changed_bhw:
        rows, columns = np.nonzero(changed.any(1))[0], np.nonzero(changed.any(0))[0]
        h, w = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert changed.sum() == h * w
        sides.append((h, w))
    return np.asarray(sides)


def timm_boxes(n: int, height: int, width: int) -> np.ndarray:
    """Boxes that timm's random erasing cuts out of n pictures; [n, 2]."""
    random.seed(0)
    blank = torch.full((n, 1, height, width), 77.0)
    return boxes_of((RandomErasing(1.0, mode="pixel", device="cpu")(blank) != 77.0).numpy()[:, 0])


N, HEIGHT, WIDTH = 2048, 32, 24  # one shape for all of these tests: it compiles once


@pytest.fixture(scope="module")
def erased():
    """Keys of 2048 pictures of one value, and what is left of them where each loses a box; [2048, 32, 24, 3]."""
    keys = jax.random.split(jax.random.key(0), N)
    return keys, np.asarray(random_erasing(keys, jnp.full((N, HEIGHT, WIDTH, 3), 77.0), 1.0))


def test_boxes_have_the_sizes_of_timms(erased):
    sides, expected = boxes_of((erased[1] != 77.0)[..., 0]), timm_boxes(4000, HEIGHT, WIDTH)
    for of in (lambda x: x[:, 0] * x[:, 1] / (HEIGHT * WIDTH), lambda x: np.log(x[:, 0] / x[:, 1])):
        assert stats.ks_2samp(of(sides), of(expected)).pvalue > 1e-3
    assert (sides.prod(1) / (HEIGHT * WIDTH)).mean() == pytest.approx(0.171, abs=0.015)


def test_boxes_lie_anywhere_in_the_picture(erased):
    often = (erased[1] != 77.0)[..., 0].mean(0)
    np.testing.assert_allclose(often, often[::-1, ::-1], atol=0.06)
    assert often[0, 0] > 0 and often[-1, -1] > 0 and often[HEIGHT // 2, WIDTH // 2] > 2 * often[0, 0]


def test_noise_is_standard_normal_and_drawn_for_each_value(erased):
    noise = erased[1][:64][erased[1][:64, ..., 0] != 77.0]
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    np.testing.assert_allclose(np.corrcoef(noise.T), np.eye(3), atol=0.04)
    assert np.unique(noise).size > 0.99 * noise.size


def test_a_quarter_of_the_pictures_lose_a_box_and_keep_the_rest():
    x = np.random.default_rng(3).standard_normal((N, HEIGHT, WIDTH, 3)).astype(np.float32)
    keys = jax.random.split(jax.random.key(3), N)
    changed = np.asarray(random_erasing(keys, x, 0.25)) != x
    hit = changed.any((1, 2, 3))
    assert hit.mean() == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / N) ** 0.5)
    assert np.all(changed.any(-1) == changed.all(-1)) and changed.mean((1, 2, 3)).max() < 0.4
    np.testing.assert_array_equal(random_erasing(keys, x, 0.0), x)


def test_a_picture_depends_on_its_key_alone(erased):
    keys, found = erased
    others = np.random.default_rng(4).permutation(N)
    x = np.full((N, HEIGHT, WIDTH, 3), 77.0, np.float32)
    x[::2] = 5.0  # other pictures beside it, in another order
    again = np.asarray(random_erasing(keys[others], x, 1.0))
    np.testing.assert_array_equal(again[1::2], found[others][1::2])


def test_eight_devices_erase_the_same(erased):
    placed = jax.device_put((erased[0][:64], np.full((64, HEIGHT, WIDTH, 3), 77.0, np.float32)), SPLIT)
    np.testing.assert_array_equal(random_erasing(*placed, 1.0), erased[1][:64])


# ----------------------------------------------------------------------------------------------------- mixup and cutmix


@pytest.fixture(scope="module")
def batch():
    """Eight pictures [8, 20, 16, 3] and one-hot targets [8, 8]: a target tells who is in the mixture."""
    rng = np.random.default_rng(5)
    return rng.standard_normal((8, 20, 16, 3)).astype(np.float32), np.eye(8, dtype=np.float32)


def shares(targets_bc: np.ndarray) -> float:
    """The kept share, which must be the same for every picture."""
    kept = np.diag(targets_bc)
    np.testing.assert_allclose(np.diag(targets_bc[:, ::-1]), 1 - kept, atol=1e-6)
    assert np.ptp(kept) < 1e-6
    return float(kept[0])


def test_mixup_is_the_convex_sum_with_the_batch_in_reverse_order(batch):
    images = batch[0]
    for seed in range(5):
        mixed, mixed_targets = (np.asarray(x) for x in mixup_cutmix(jax.random.key(seed), *batch, 0.8, 0.0))
        kept = shares(mixed_targets)
        np.testing.assert_allclose(mixed, kept * images + (1 - kept) * images[::-1], atol=1e-5)
        np.testing.assert_allclose(mixed_targets.sum(1), 1, atol=1e-6)


def test_cutmix_pastes_one_box_and_counts_its_pixels(batch):
    images = batch[0]
    areas = []
    for seed in range(40):
        mixed, mixed_targets = (np.asarray(x) for x in mixup_cutmix(jax.random.key(seed), *batch, 0.0, 1.0))
        pasted = (mixed == images[::-1]).all(-1)
        assert np.all(pasted ^ (mixed == images).all(-1)) and np.all(pasted == pasted[0])
        if pasted[0].any():
            boxes_of(pasted[:1])
        assert shares(mixed_targets) == pytest.approx(1 - pasted[0].mean(), abs=1e-6)
        areas.append(pasted[0].mean())
    assert len(set(areas)) > 20 and 0.1 < np.mean(areas) < 0.5


@pytest.fixture(scope="module")
def drawn():
    """Kept shares of 8000 batches of two pictures of 64 x 64: mixup's, and cutmix's, which are whole in pixels."""

    def kept(key):
        return mixup_cutmix(key, jnp.zeros((2, 64, 64, 1)), jnp.eye(2))[1][0, 0]

    share = np.asarray(jax.jit(jax.vmap(kept))(jax.random.split(jax.random.key(6), 8000)), np.float64)
    whole = np.abs(share * 64**2 - np.round(share * 64**2)) < 1e-3
    return share[~whole], share[whole]


def test_half_of_the_batches_take_mixup_with_a_beta_share(drawn):
    mixup, cutmix = drawn
    assert cutmix.size / (mixup.size + cutmix.size) == pytest.approx(0.5, abs=0.025)
    assert stats.kstest(mixup, stats.beta(0.8, 0.8).cdf).pvalue > 1e-3


def timm_shares(n: int, mixup: float, cutmix: float) -> np.ndarray:
    """Kept shares of n batches of two pictures of 64 x 64 that timm mixes."""
    np.random.seed(0)
    mixer, batch = Mixup(mixup, cutmix, num_classes=2), torch.zeros(2, 1, 64, 64)
    return np.asarray([mixer._mix_batch(batch) for _ in range(n)])


def test_the_others_take_cutmix_with_the_share_outside_the_box(drawn):
    expected = timm_shares(6000, 0.0, 1.0)
    assert stats.ks_2samp(drawn[1], expected).pvalue > 1e-3
    assert drawn[1].mean() == pytest.approx(expected.mean(), abs=0.02)


def test_shares_of_both_together_are_distributed_as_timms(drawn):
    assert stats.ks_2samp(np.concatenate(drawn), timm_shares(6000, 0.8, 1.0)).pvalue > 1e-3


@pytest.mark.parametrize("cutmix", [False, True])
def test_pictures_and_smoothed_targets_are_timms_for_the_same_share_and_box(batch, cutmix, monkeypatch):
    images, labels = batch[0], np.arange(8)
    targets = smooth_labels(jnp.asarray(labels), 8, 0.1)
    alphas = (0.0, 1.0) if cutmix else (0.8, 0.0)
    mixed, mixed_targets = mixup_cutmix(jax.random.key(2), images, targets, *alphas)
    one_hot = mixup_cutmix(jax.random.key(2), *batch, *alphas)[1]
    share = shares(np.asarray(one_hot))
    pasted = (np.asarray(mixed) == images[::-1]).all((0, 3))
    rows, columns = np.nonzero(pasted)
    assert rows.any() == cutmix
    box = (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) if cutmix else None
    mixer = Mixup(*alphas, label_smoothing=0.1, num_classes=8)
    monkeypatch.setattr(mixer, "_params_per_batch", lambda: (share, cutmix))
    monkeypatch.setattr(mixup, "cutmix_bbox_and_lam", lambda *_, **__: (box, share))
    expected, expected_targets = mixer(torch.tensor(np.moveaxis(images, 3, 1)), torch.tensor(labels))
    np.testing.assert_allclose(np.moveaxis(np.asarray(mixed), 3, 1), expected, atol=1e-6)
    np.testing.assert_allclose(mixed_targets, expected_targets, atol=1e-6)


def test_without_both_nothing_is_mixed(batch):
    mixed, targets = mixup_cutmix(jax.random.key(0), *batch, 0.0, 0.0)
    np.testing.assert_array_equal(mixed, batch[0])
    np.testing.assert_array_equal(targets, batch[1])


def test_eight_devices_mix_the_same_and_gather_no_batch(batch):
    placed = jax.device_put(batch, SPLIT)
    assert "all-gather" not in mixup_cutmix.lower(jax.random.key(8), *placed).compile().as_text()
    for seed in range(6):
        alone, split = (mixup_cutmix(jax.random.key(seed), *data) for data in (batch, placed))
        for one, eight in zip(alone, split):
            np.testing.assert_allclose(eight, one, atol=1e-6)


def test_equal_shapes_are_compiled_once(batch, erased, caplog):
    first, second = jax.random.split(jax.random.key(9))
    mixup_cutmix(first, *batch)
    with jax.log_compiles():
        mixup_cutmix(second, *batch)
        random_erasing(erased[0], erased[1], 0.7)
        assert "mixup_cutmix" not in caplog.text and "random_erasing" not in caplog.text
        mixup_cutmix(second, batch[0][:2], batch[1][:2], 0.0, 0.0)
    assert "mixup_cutmix" in caplog.text, "a program of another shape is told"


# --------------------------------------------------------------------------------------------------------------- labels


def test_smoothing_spreads_evenly_over_all_classes():
    targets = np.asarray(smooth_labels(jnp.asarray([3, 0, 9]), 10, 0.1))
    expected = np.full((3, 10), 0.01)
    expected[[0, 1, 2], [3, 0, 9]] = 0.91
    np.testing.assert_allclose(targets, expected, atol=1e-7)
    np.testing.assert_allclose(np.asarray(smooth_labels(jnp.arange(5), 1000, 0.1)).sum(1), 1, atol=1e-5)
    np.testing.assert_array_equal(smooth_labels(jnp.arange(5), 5, 0.0), np.eye(5))


def test_smoothing_and_loss_are_torchs():
    rng = np.random.default_rng(11)
    logits, labels = 5 * rng.standard_normal((6, 12)).astype(np.float32), rng.integers(0, 12, 6)
    found = soft_cross_entropy(logits, smooth_labels(jnp.asarray(labels), 12, 0.1))
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits, dtype=torch.float64), torch.tensor(labels), label_smoothing=0.1, reduction="none"
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_soft_loss_is_the_sum_over_the_mixture_in_float32():
    rng = np.random.default_rng(12)
    logits, targets = rng.standard_normal((5, 7)) * 30, rng.dirichlet(np.ones(7), 5)
    low = jnp.asarray(logits, jnp.bfloat16)
    x = np.asarray(low, np.float64)
    expected = -targets * (x - special.logsumexp(x, axis=1, keepdims=True))
    found = soft_cross_entropy(low, jnp.asarray(targets, jnp.float32))
    assert found.dtype == jnp.float32 and found.shape == (5,)
    np.testing.assert_allclose(found, expected.sum(1), rtol=1e-5)
