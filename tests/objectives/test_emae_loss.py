"""EMAE's loss and its gradient against the definition, written out in NumPy with masks and loops over pairs."""

import functools
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maect_jax.objectives import emae
from maect_jax.objectives.mae import pixel_targets
from maect_jax.objectives.masking import parallel_masks
from maect_jax.training.pretraining import self_consistent

IMAGES, VALUES = 3, 5


def draw(parts: int, patches: int, seed: int = 0):
    """Predictions [part, image, patch, value], pictures as patches [image, patch, value], and a shuffled order."""
    rng = np.random.default_rng(seed)
    prediction_kbnp = rng.normal(size=(parts, IMAGES, patches, VALUES))
    patches_bnp = rng.normal(size=(IMAGES, patches, VALUES)) * rng.uniform(0.1, 3, (IMAGES, patches, 1))
    return prediction_kbnp, patches_bnp, np.stack([rng.permutation(patches) for _ in range(IMAGES)])


# ------------------------------------------------------------------------------------------------------ the definition


def hidden(perm: np.ndarray, parts: int, shown: int) -> tuple[np.ndarray, np.ndarray]:
    """Masks in picture order, 1 = hidden and predicted [part, image, patch], and the block of each patch.

    Of every block of the shuffled order the first `shown` patches are predicted.
    """
    images, patches = perm.shape
    size = patches // parts
    mask, block = np.zeros((parts, images, patches)), np.zeros((images, patches), int)
    for i, place in np.ndindex(images, patches):
        patch = perm[i, place]
        block[i, patch] = place // size
        for part in range(parts):
            mask[part, i, patch] = place // size != part and place % size < shown
    return mask, block


def defined(prediction, patches, perm, *, parts, shown, weight, norm, form, space, normalise=True):
    """Loss, reconstruction, disagreement and the gradient with respect to the predictions, in float64."""
    images, count = perm.shape
    mask, block = hidden(perm, parts, shown)
    deviation = np.sqrt(patches.var(axis=-1, ddof=1, keepdims=True) + 1e-6)
    target = (patches - patches.mean(axis=-1, keepdims=True)) / deviation if normalise else patches
    error = (prediction - target) * mask[..., None]
    reconstruction = (error**2).mean(axis=-1).sum() / mask.sum()
    gradient = 2 * error / (mask.sum() * VALUES)
    unit = deviation if space == "pixels" and normalise else np.ones_like(deviation)
    pairs = list(combinations(range(parts), 2))
    apart = 0.0
    for i, j in pairs:
        both = mask[i] * mask[j]
        difference = (prediction[i] - prediction[j]) * unit
        for image in range(images):
            overlap = both[image].sum()
            share = 1 / (len(pairs) * images * overlap)
            apart += share * (both[image] * np.abs(difference[image]).mean(axis=-1)).sum()
            z = overlap / (shown * parts) if norm == "all" else 1.0
            step = weight * z * share / VALUES * both[image][:, None] * np.sign(difference[image]) * unit[image]
            # of two parts the teacher is the one whose own block comes sooner when going back from the patch's block
            back_i, back_j = (block[image] - i) % parts, (block[image] - j) % parts
            i_learns = (back_i > back_j) if form == "one_sided" else np.ones(count, bool)
            j_learns = (back_j > back_i) if form == "one_sided" else np.ones(count, bool)
            gradient[i, image] += step * i_learns[:, None]
            gradient[j, image] -= step * j_learns[:, None]
    z = (parts - 2) / parts if norm == "all" else 1.0
    return reconstruction + weight * z * apart, reconstruction, apart, gradient


@functools.cache
def compiled(parts, patches, share, normalise, settings):
    """The objective of the train step: its masks, and its value, metrics and gradient as a compiled function."""
    masks = parallel_masks(patches, parts, share)
    objective = self_consistent(masks, normalised_pixels=normalise, **dict(settings))
    return masks, jax.jit(jax.value_and_grad(objective, has_aux=True))


def by_step(prediction, patches, perm, *, parts, share=1.0, normalise=True, **settings):
    """What `defined` returns by the objective of the train step; `share` is the decoded share."""
    images, count = perm.shape
    with jax.enable_x64():
        masks, objective = compiled(parts, count, share, normalise, tuple(sorted(settings.items())))
        part, image = np.arange(parts)[None, :, None], np.arange(images)[:, None, None]
        at = part, image, perm[:, masks.places_km[:, masks.keep :]]
        target = pixel_targets(jnp.asarray(patches), normalise)
        (loss, metrics), found = objective(prediction[at], target, patches, perm)
    gradient = np.zeros(prediction.shape)
    gradient[at] = found
    return float(loss), float(metrics["reconstruction_loss"]), float(metrics["disagreement"]), gradient


def agree(found, expected, atol=1e-12):
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


PLAIN = dict(weight=1.0, norm="all", form="symmetric", space="targets")


@pytest.mark.parametrize(("parts", "patches"), [(3, 9), (4, 16), (7, 49)])
@pytest.mark.parametrize("form", emae.FORMS)
@pytest.mark.parametrize("norm", emae.NORMS)
def test_loss_and_gradient_follow_the_definition(parts, patches, norm, form):
    data = draw(parts, patches)
    settings = PLAIN | dict(weight=0.7, norm=norm, form=form)
    agree(by_step(*data, parts=parts, **settings), defined(*data, parts=parts, shown=patches // parts, **settings))


@pytest.mark.parametrize("form", emae.FORMS)
@pytest.mark.parametrize("normalise", [True, False])
def test_in_pixels_each_patch_counts_with_its_deviation(normalise, form):
    data = draw(4, 16)
    settings = PLAIN | dict(space="pixels", form=form, normalise=normalise)
    agree(by_step(*data, parts=4, **settings), defined(*data, parts=4, shown=4, **settings))


@pytest.mark.parametrize("weight", [0.0, 0.1, 10.0])
def test_the_weight_multiplies_the_agreement_only(weight):
    data = draw(4, 16)
    settings = PLAIN | dict(weight=weight)
    agree(by_step(*data, parts=4, **settings), defined(*data, parts=4, shown=4, **settings), 1e-11)


@pytest.mark.parametrize(("parts", "patches", "share", "shown"), [(4, 64, 0.5, 8), (3, 36, 0.25, 3), (7, 49, 0.1, 1)])
@pytest.mark.parametrize("norm", emae.NORMS)
def test_a_share_of_the_predictions_has_the_loss_of_that_share(parts, patches, share, shown, norm):
    """What divides by all patches of a picture divides by those that are predicted from some part."""
    data = draw(parts, patches)
    settings = PLAIN | dict(norm=norm, space="pixels")
    agree(by_step(*data, parts=parts, share=share, **settings), defined(*data, parts=parts, shown=shown, **settings))


def test_two_parts_reconstruct_and_have_nothing_to_agree_about():
    data = draw(2, 16)
    mask, _ = hidden(data[2], 2, 8)
    loss, reconstruction, apart, gradient = by_step(*data, parts=2, **PLAIN)
    mean, deviation = data[1].mean(axis=-1, keepdims=True), data[1].std(axis=-1, ddof=1, keepdims=True)
    error = (data[0] - (data[1] - mean) / deviation) * mask[..., None]
    np.testing.assert_allclose(reconstruction, (error**2).sum() / mask.sum() / VALUES, rtol=1e-4)
    assert loss == reconstruction and apart == 0 and np.isfinite(gradient).all()


# ---------------------------------------------------------------------------------------------------------- identities


def test_stopping_the_gradient_on_either_side_in_turn_doubles_the_value_and_not_the_gradient():
    x_bcosp = jnp.asarray(np.random.default_rng(1).normal(size=(IMAGES, 4, 3, 4, VALUES)), jnp.float32)
    stop = jax.lax.stop_gradient

    def in_turn(x):
        pairs = [(x[:, :, i], x[:, :, j]) for i, j in combinations(range(3), 2)]
        return sum((jnp.abs(stop(a) - b) + jnp.abs(a - stop(b))).mean() for a, b in pairs) / len(pairs)

    value, gradient = jax.value_and_grad(emae.disagreement)(x_bcosp)
    twice, same = jax.value_and_grad(in_turn)(x_bcosp)
    np.testing.assert_allclose(twice, 2 * value, rtol=1e-6)
    np.testing.assert_allclose(same, gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("parts", "patches"), [(3, 9), (4, 16), (7, 49)])
def test_in_the_one_sided_form_every_part_learns_in_half_of_its_pairs(parts, patches):
    """One part predicts 1 and the others 0: over a picture it is moved by as many pairs as it learns in.

    Each part is in K - 1 of the K (K - 1) / 2 pairs, so that the symmetric form moves it by 2 / K.
    """
    _, pictures, perm = draw(parts, patches)
    for part in range(parts):
        prediction = np.zeros((parts, IMAGES, patches, VALUES))
        prediction[part] = 1
        for form, moved in (("symmetric", 2 / parts), ("one_sided", 1 / parts)):
            settings = PLAIN | dict(norm="overlap", form=form)
            both, whole = (
                by_step(prediction, pictures, perm, parts=parts, **settings | dict(weight=weight))[3]
                for weight in (1.0, 0.0)
            )
            np.testing.assert_allclose((both - whole)[part].sum(), moved, rtol=1e-9)


def test_differences_of_half_precision_predictions_are_summed_in_single_precision():
    """10^5 equal differences: in bfloat16 a sum of ones stays at 256."""
    x_bcosp = jnp.concatenate([jnp.zeros((1, 3, 1, 100, 400)), jnp.ones((1, 3, 1, 100, 400))], axis=2)
    found = emae.disagreement(x_bcosp.astype(jnp.bfloat16))
    whole = emae.reconstruction(x_bcosp.astype(jnp.bfloat16), jnp.zeros((1, 3, 100, 400)))
    assert found.dtype == whole.dtype == jnp.float32
    assert float(found) == 1 and float(whole) == 0.5


def test_parts_that_agree_exactly_are_not_moved():
    agreed = jnp.ones((1, 4, 3, 4, 5))
    assert not np.any(jax.grad(emae.disagreement)(agreed))
