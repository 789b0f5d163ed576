"""NNCLR's loss and the support queue against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golden import arrays
from maect_jax.neighbors.queue import SupportQueue, enqueue, find_neighbors
from maect_jax.neighbors.topk import top_k_replicated_bank
from maect_jax.objectives.nnclr import nnclr_loss, one_sided_loss
from maect_jax.parallel.mesh import batch_sharding, make_mesh, replicated


def test_loss_and_its_gradients():
    reference = arrays("nnclr_loss")
    tau = float(reference["tau"])
    p0, p1, nn0, nn1 = (jnp.asarray(reference[name]) for name in ("p0", "p1", "nn0", "nn1"))
    both = jax.value_and_grad(lambda p, nn: nnclr_loss(p, nn, tau), argnums=(0, 1))
    loss, (gradients, to_neighbors) = both((p0, p1), (nn0, nn1))
    np.testing.assert_allclose(loss, reference["loss"], rtol=0, atol=2e-6)
    np.testing.assert_allclose(one_sided_loss(p0, nn1, tau), reference["loss_p0_nn1"], rtol=0, atol=2e-6)
    np.testing.assert_allclose(one_sided_loss(p1, nn0, tau), reference["loss_p1_nn0"], rtol=0, atol=2e-6)
    np.testing.assert_allclose(gradients[0], reference["grad_p0"], rtol=0, atol=5e-8)
    np.testing.assert_allclose(gradients[1], reference["grad_p1"], rtol=0, atol=5e-8)
    assert not any(np.any(g) for g in to_neighbors)


def test_loss_in_float64():
    reference = arrays("nnclr_loss")
    with jax.enable_x64(True):
        pairs = [tuple(jnp.asarray(reference[f"{x}{v}"], jnp.float64) for v in (0, 1)) for x in ("p", "nn")]
        loss = nnclr_loss(*pairs, float(reference["tau"]))
    np.testing.assert_allclose(loss, reference["loss_f64"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("devices", [1, 8])
def test_fourteen_steps_of_the_queue(devices):
    reference = arrays("queue")
    mesh = make_mesh(devices=jax.devices()[:devices])
    k = int(reference["cfg/topk"])
    start = SupportQueue(
        jnp.asarray(reference["queue_init"]),
        jnp.asarray(reference["queue_id_init"], jnp.int32),
        jnp.asarray(reference["queue_y_init"], jnp.int32),
        jnp.asarray(reference["ptr_init"], jnp.int32),
    )
    queue = jax.device_put(start, replicated(mesh))

    @jax.jit
    def step(queue, t0, t1, ids, labels):
        nearest = [find_neighbors(mesh, queue, t, ids, 1, None) for t in (t0, t1)]
        top = [top_k_replicated_bank(mesh, t, ids, queue.rows_qe, queue.id_q, k)[1] for t in (t0, t1)]
        accuracy = (nearest[0].label_b == labels).mean()
        return enqueue(queue, t0, ids, labels), nearest, top, accuracy

    for s in range(int(reference["cfg/steps"])):
        batch = [jnp.asarray(reference[name][s]) for name in ("t0", "t1", "ids", "y")]
        batch = [x if x.ndim == 2 else x.astype(jnp.int32) for x in batch]
        queue, nearest, top, accuracy = step(queue, *jax.device_put(batch, batch_sharding(mesh)))
        for view in (0, 1):
            np.testing.assert_array_equal(nearest[view].index_b, reference[f"nn_idx{view}"][s])
            np.testing.assert_array_equal(np.sort(top[view]), np.sort(reference[f"topk_idx{view}"][s]))
        np.testing.assert_allclose(accuracy, reference["nn_accuracy"][s], atol=1e-6)
        np.testing.assert_array_equal(queue.rows_qe, reference["queue_after"][s])
        np.testing.assert_array_equal(queue.id_q, reference["queue_id_after"][s])
        np.testing.assert_array_equal(queue.label_q, reference["queue_y_after"][s])
        assert queue.pointer == reference["ptr_after"][s]
