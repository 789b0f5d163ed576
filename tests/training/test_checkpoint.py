"""Checkpoints: what is kept, what is restored when the newest is damaged, what is refused."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from maect_jax.errors import CheckpointError
from maect_jax.neighbors.queue import SupportQueue
from maect_jax.parallel.mesh import make_mesh, replicated, state_sharding
from maect_jax.training.checkpoint import Checkpoints, newest_step_folder, read_arrays
from maect_jax.training.state import create_state


def state_at(step: int, width: int = 3):
    params = {"encoder": {"kernel": jnp.arange(2.0 * width).reshape(2, width) + step}}
    state = create_state(params, queue=SupportQueue.create(jax.random.key(0), 8, 4))
    return state.replace(step=jnp.int32(step))


def files_below(folder: epath.Path) -> list[Path]:
    return [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]


def restore(checkpoints: Checkpoints, like):
    mesh = make_mesh(devices=jax.devices()[:1])
    return checkpoints.restore(like, state_sharding(mesh, like))


def equal(a, b) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), a, b)))


@pytest.fixture
def saved(tmp_path) -> Checkpoints:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2, keep_every=4)
    for step in (2, 4, 6, 8, 10):
        checkpoints.save(step, state_at(step), {"stage": "pretrain", "seconds": 1.5})
    checkpoints.wait()
    return checkpoints


def test_the_newest_and_every_nth_are_kept(saved):
    assert saved.steps() == [10, 8, 4]


def test_restored_equals_saved(saved):
    state, meta = restore(saved, state_at(0))
    assert equal(state, state_at(10))
    assert meta == {"stage": "pretrain", "seconds": 1.5, "schema": 1, "step": 10}


def test_a_state_saved_and_then_donated_is_saved_as_it_was(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    state = jax.tree.map(jnp.copy, state_at(3))
    checkpoints.save(3, state, {})
    jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state)
    checkpoints.wait()
    assert equal(restore(checkpoints, state_at(0))[0], state_at(3))


@pytest.mark.parametrize("damage", ["emptied", "removed", "flipped"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(saved, damage):
    for path in files_below(saved.folder / "10" / "state"):
        content = path.read_bytes()
        if damage == "removed":
            path.unlink()
        else:
            path.write_bytes(b"" if damage == "emptied" else bytes(255 - byte for byte in content))
    state, meta = restore(saved, state_at(0))
    assert meta["step"] == 8 and equal(state, state_at(8))


def test_when_none_can_be_read_the_error_names_each(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, state_at(1), {})
    checkpoints.wait()
    for path in files_below(checkpoints.folder / "1" / "state"):
        path.unlink()
    with pytest.raises(CheckpointError, match="checkpoints/1"):
        restore(checkpoints, state_at(0))


def test_another_architecture_is_refused_with_a_table(saved):
    with pytest.raises(CheckpointError) as error:
        restore(saved, state_at(0, width=5))
    assert "params/encoder/kernel: checkpoint ((2, 3), 'float32'), this run ((2, 5), 'float32')" in str(error.value)


def test_parts_are_read_without_knowing_the_architecture(saved):
    folder = newest_step_folder(epath.Path(saved.folder.parent))
    parts = read_arrays(folder, ("params", "queue", "ema"), replicated(make_mesh(devices=jax.devices()[:1])))
    assert equal(parts["params"], state_at(10).params) and parts["ema"] == {}
    assert equal(parts["queue"]["rows_qe"], state_at(10).queue.rows_qe)
