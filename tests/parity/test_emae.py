"""EMAE's loss on recorded predictions, and its real train step on a recorded model, against the reference."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golden import arrays, below
from maect_jax.exchange.mapping import from_layout, to_layout
from maect_jax.objectives import emae
from maect_jax.objectives.masking import parallel_masks, random_mask
from maect_jax.training import optimizer, pretraining
from maect_jax.training.optimizer import Group
from maect_jax.training.pretraining import make_pretrain_step, reconstruction_only, self_consistent
from maect_jax.training.state import create_state
from maect_jax.training.steps import Clock
from small import cast, channels_last, mae_of

K = 4


def test_the_recorded_masks_are_ours():
    """Recorded in picture order; ours are places in the shuffled order."""
    for reference in (arrays("emae"), below(arrays("emae"), "model/")):
        perm = reference["perm"]
        masks = parallel_masks(perm.shape[1], K)
        mask = np.ones((K, *perm.shape))
        for part, row in enumerate(masks.places_km):
            np.put_along_axis(mask[part], perm[:, row[: masks.keep]], 0, axis=1)
        np.testing.assert_array_equal(mask, reference["mask"])


# ---------------------------------------------------------------------------------------------- recorded predictions


def in_blocks(perm: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What stands where in our order [image, block, predicting part, patch in block]: part, image and patch.

    The first to predict a block is the part whose own block comes before it, then the one before that.
    """
    images, patches = perm.shape
    part, image, patch = np.zeros((3, images, K, K - 1, patches // K), int)
    for i, c, o, s in np.ndindex(part.shape):
        part[i, c, o, s], image[i, c, o, s] = (c - 1 - o) % K, i
        patch[i, c, o, s] = perm[i, c * (patches // K) + s]
    return part, image, patch


@pytest.mark.parametrize(("dtype", "atol"), [("float64", 1e-12), ("float32", 1e-6)])
def test_losses_of_recorded_predictions_and_their_gradients(dtype, atol):
    reference = arrays("emae")
    at = in_blocks(reference["perm"])

    def check(loss, value, gradient):
        found, by_ours = jax.value_and_grad(loss)(jnp.asarray(reference["pred"][at], dtype))
        assert found.dtype == dtype
        np.testing.assert_allclose(found, reference[value], rtol=0, atol=atol)
        by_theirs = np.zeros(reference["pred"].shape)  # no gradient where a part sees the patch
        by_theirs[at] = by_ours
        np.testing.assert_allclose(by_theirs, reference[gradient], rtol=0, atol=atol)
        return found

    with jax.enable_x64(dtype == "float64"):
        target_bcsp = jnp.asarray(reference["targets"][at[1][:, :, 0], at[2][:, :, 0]], dtype)
        check(lambda x: emae.reconstruction(x, target_bcsp), "loss_whole", "grad_whole")
        for norm in ("all", "overlap"):
            z = emae.norm_factor(norm, K)
            cons = check(lambda x, z=z: z * emae.disagreement(x), f"loss_cons_{norm}", f"grad_cons_{norm}")
            np.testing.assert_allclose(2 * cons, reference[f"loss_cons_{norm}_sgpair"], rtol=0, atol=atol)


@pytest.mark.parametrize("norm", ["all", "overlap"])
@pytest.mark.parametrize(("dtype", "atol"), [("float64", 1e-12), ("float32", 1e-6)])
def test_the_objective_of_the_step_on_recorded_predictions(norm, dtype, atol):
    """From predictions in the model's order [image, part, predicted patch, value], by the objective as training has it.

    Part k predicts the patches behind its own block in the shuffled order, in a circle.
    """
    reference = arrays("emae")
    perm = reference["perm"]
    images, patches = perm.shape
    block = patches // K
    image, part, place = np.indices((images, K, patches - block))
    at = part, image, perm[image, ((part + 1) * block + place) % patches]
    with jax.enable_x64(dtype == "float64"):
        objective = self_consistent(
            parallel_masks(patches, K), weight=1.0, norm=norm, form="symmetric", space="targets", normalised_pixels=True
        )
        targets = jnp.asarray(reference["targets"], dtype)
        (loss, metrics), by_ours = jax.value_and_grad(objective, has_aux=True)(
            jnp.asarray(reference["pred"][at], dtype), targets, targets, jnp.asarray(perm)
        )
    gradient = np.zeros(reference["pred"].shape)
    gradient[at] = by_ours
    np.testing.assert_allclose(gradient, reference[f"grad_total_{norm}"], rtol=0, atol=atol)
    expected = reference["loss_whole"] + reference[f"loss_cons_{norm}"]
    np.testing.assert_allclose(loss, expected, rtol=0, atol=2 * atol)
    np.testing.assert_allclose(metrics["reconstruction_loss"], reference["loss_whole"], rtol=0, atol=atol)
    np.testing.assert_allclose(metrics["disagreement"], reference["loss_cons_overlap"], rtol=0, atol=atol)


# --------------------------------------------------------------------------------------------------- recorded model


@dataclass
class Update:
    """One update by the real step: its metrics, and the gradient in the published layout."""

    metrics: dict
    gradient: dict


def updates(monkeypatch, masks, objective, noises, dtype="float32") -> list[Update]:
    """One update for each noise [pictures, patches], each of the recorded weights on the recorded pictures."""
    rows = jnp.concatenate([jnp.asarray(noise) for noise in noises])
    monkeypatch.setattr(pretraining, "sample_keys", lambda seed, purpose, epoch, ids, view: rows[ids])
    monkeypatch.setattr(pretraining, "mask_noise", lambda rows, patches: rows)
    reference, found = arrays("mae"), []
    with jax.enable_x64(dtype == "float64"):
        group = Group(1e-3, 0.0)
        step = jax.jit(
            make_pretrain_step(
                mae_of(below(reference, "cfg/"), dtype=jnp.dtype(dtype)),
                lambda batch, epoch: batch["image"][None],
                clock=Clock(1, 0, 1, seed=0),
                groups={"encoder": group, "decoder": group},
                masks=masks,
                objective=objective,
                normalise_pixels=True,
            )
        )
        first = create_state(cast(from_layout(below(reference, "w/"), "mae_official_full"), dtype))
        images = channels_last(reference["images"]).astype(dtype)
        for number in range(len(noises)):
            ids = jnp.arange(len(images)) + number * len(images)
            state, metrics, _ = step(first, {"image": images, "id": ids})
            # the first moment after one update is a tenth of the gradient
            gradient = jax.tree.map(lambda m: np.asarray(m) / (1 - optimizer.BETAS[0]), state.moments.mu)
            found.append(Update(jax.device_get(metrics), to_layout(gradient, "mae_official_full", patch=8, grid=4)))
    return found


def objective_of(masks, weight, norm="all"):
    return self_consistent(masks, weight=weight, norm=norm, form="symmetric", space="targets", normalised_pixels=True)


def check_gradient(found: Update, whole: float, overlap: float):
    """`whole` times the gradient of the reconstruction plus `overlap` times that of the mean over the overlap."""
    reference = below(arrays("emae"), "model/")
    names = below(reference, "grad_whole/").keys()
    assert len(names) == 12
    for name in names:
        expected = whole * reference[f"grad_whole/{name}"] + overlap * reference[f"grad_cons_overlap/{name}"]
        np.testing.assert_allclose(found.gradient[name], expected, rtol=0, atol=5e-7, err_msg=name)


def test_reconstruction_alone_and_predictions_of_all_parts(monkeypatch):
    reference = below(arrays("emae"), "model/")
    masks = parallel_masks(16, K)
    objective = objective_of(masks, 0.0)

    def telling(prediction_bkmp, *rest):
        loss, metrics = objective(prediction_bkmp, *rest)
        return loss, metrics | {"prediction": prediction_bkmp}

    (found,) = updates(monkeypatch, masks, telling, [reference["noise"]])
    check_gradient(found, 1, 0)
    np.testing.assert_allclose(found.metrics["loss"], reference["loss_whole"], rtol=0, atol=2e-6)
    np.testing.assert_allclose(found.metrics["gradient_norm"], reference["grad_whole_norm"], rtol=0, atol=5e-6)
    np.testing.assert_allclose(found.metrics["reconstruction_loss"], reference["loss_whole"], rtol=0, atol=2e-6)
    # told although it has no weight
    np.testing.assert_allclose(found.metrics["disagreement"], reference["loss_cons_overlap"], rtol=0, atol=2e-6)
    for i, part, place in np.ndindex(4, K, 12):
        patch = reference["perm"][i, (4 * (part + 1) + place) % 16]
        expected = reference["pred"][part, i, patch]
        np.testing.assert_allclose(found.metrics["prediction"][i, part, place], expected, rtol=0, atol=1e-5)


def test_agreement_alone(monkeypatch):
    reference = below(arrays("emae"), "model/")
    masks = parallel_masks(16, K)
    both = objective_of(masks, 1.0, "overlap")

    def objective(*arguments):
        _, metrics = both(*arguments)
        return metrics["disagreement"], metrics

    (found,) = updates(monkeypatch, masks, objective, [reference["noise"]])
    check_gradient(found, 0, 1)
    np.testing.assert_allclose(found.metrics["loss"], reference["loss_cons_overlap"], rtol=0, atol=2e-6)
    np.testing.assert_allclose(found.metrics["gradient_norm"], reference["grad_cons_overlap_norm"], rtol=0, atol=5e-6)


def test_reconstruction_and_agreement_in_double_precision(monkeypatch):
    """At K = 4 all patches of a picture are twice those hidden from both parts."""
    reference = below(arrays("emae"), "model/")
    masks = parallel_masks(16, K)
    (found,) = updates(monkeypatch, masks, objective_of(masks, 1.0), [reference["noise"]], "float64")
    check_gradient(found, 1, 0.5)
    expected = reference["loss_whole_f64"] + reference["loss_cons_all_f64"]
    np.testing.assert_allclose(found.metrics["loss"], expected, rtol=0, atol=1e-10)
    ratio = reference["loss_cons_overlap_f64"] / np.sqrt(reference["loss_whole_f64"])
    np.testing.assert_allclose(found.metrics["disagreement_ratio"], ratio, rtol=1e-9)


def test_the_reconstruction_is_the_mean_of_four_masked_autoencoders(monkeypatch):
    reference = below(arrays("emae"), "model/")
    masks = random_mask(16, 0.75)
    found = updates(monkeypatch, masks, reconstruction_only(masks), reference["part_noise"])
    losses = [update.metrics["loss"] for update in found]
    np.testing.assert_allclose(losses, reference["loss_parts"], rtol=0, atol=2e-6)
    np.testing.assert_allclose(np.mean(losses), reference["loss_whole"], rtol=0, atol=2e-6)
    for name, expected in below(reference, "grad_whole/").items():
        mean = np.mean([update.gradient[name] for update in found], axis=0)
        np.testing.assert_allclose(mean, expected, rtol=0, atol=5e-7, err_msg=name)
