"""Rows on the devices and the centres they are nearest to: what every k-means does.

Rows lie centred and in chunks, the chunks split over the devices; a chunk meets the centres of all restarts of a group
in one matrix product, so that the whole of [rows, restarts * clusters] never exists.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from maect_jax.errors import DataError
from maect_jax.evaluation.rows import check_rows, pad_rows, round_up, split
from maect_jax.parallel.mesh import replicated


class Rows(NamedTuple):
    """Centred features [chunks, rows, width], and which rows are no padding [chunks, rows]; padding is zero."""

    features_mrd: jax.Array
    valid_mr: jax.Array

    def flat(self) -> tuple[jax.Array, jax.Array]:
        """[rows, width] and [rows]."""
        return self.features_mrd.reshape(-1, self.features_mrd.shape[2]), self.valid_mr.reshape(-1)


def on_cpu(mesh: Mesh) -> bool:
    """Processors and accelerators are fast at different forms of one and the same sum."""
    return mesh.devices.flat[0].platform == "cpu"


def load_rows(mesh: Mesh, features, clusters: int) -> tuple[Rows, np.ndarray, float]:
    """The rows on the devices, their mean [width], and the mean over the features of their variance.

    Raises:
      DataError: not [rows, width], fewer rows than clusters, or a value that is not finite.
    """
    features, _ = check_rows("clustering", features)
    count = features.shape[0]
    if count < clusters:
        raise DataError(f"clustering features: {count} rows for {clusters} clusters; there must be a row for each")
    finite_n = np.isfinite(features).all(axis=1)
    if not finite_n.all():
        raise DataError(f"clustering features: row {finite_n.argmin()} holds values that are not finite; leave it out")
    # a chunk that stays in a processor's cache, or one that keeps an accelerator busy
    chunk = min(1024 if on_cpu(mesh) else 16384, round_up(-(-count // mesh.size), 8))
    padded = round_up(count, chunk * mesh.size)
    features_mrd = split(mesh, pad_rows(features, padded).reshape(-1, chunk, features.shape[1]))
    valid_mr = split(mesh, (np.arange(padded) < count).reshape(-1, chunk))
    features_mrd, mean_d, variance = _centre(features_mrd, valid_mr, mesh=mesh)
    return Rows(features_mrd, valid_mr), np.asarray(mean_d), float(variance)


@partial(jax.jit, static_argnames="mesh", donate_argnums=0)
def _centre(features_mrd, valid_mr, *, mesh: Mesh):
    """Rows less their mean: squared distances by inner products lose least of their digits near the origin."""
    count = valid_mr.sum()
    mean_d = features_mrd.sum(axis=(0, 1)) / count
    features_mrd = jnp.where(valid_mr[:, :, None], features_mrd - mean_d, 0)
    left_d = features_mrd.sum(axis=(0, 1)) / count  # of the rounding of a long float32 sum
    variance = (jnp.square(features_mrd).sum(axis=(0, 1)) / count - jnp.square(left_d)).mean()
    return features_mrd, *jax.lax.with_sharding_constraint((mean_d, variance), replicated(mesh))


def nearest(x_rd: jax.Array, centres_skd: jax.Array, cpu: bool) -> tuple[jax.Array, jax.Array]:
    """Index and score x.c - |c|^2 / 2 of the nearest centre, [rows, restarts] each; a tie goes to the lowest index."""
    score_rsk = jnp.einsum("rd,skd->rsk", x_rd, centres_skd, precision=jax.lax.Precision.HIGHEST)
    score_rsk -= jnp.square(centres_skd).sum(axis=2) / 2
    score_rs = score_rsk.max(axis=2)
    if not cpu:
        return score_rsk.argmax(axis=2).astype(jnp.int32), score_rs
    # a second plain reduction: the CPU compiler vectorises it as it does not argmax
    number_k = jnp.arange(score_rsk.shape[2], dtype=jnp.float32)
    index_rs = jnp.where(score_rsk == score_rs[:, :, None], number_k, jnp.inf).min(axis=2)
    return index_rs.astype(jnp.int32), score_rs


def members(x_rd: jax.Array, weight_r: jax.Array, index_rs: jax.Array, clusters: int, cpu: bool):
    """Sum and weight of the rows of each cluster, [restarts, clusters, width] and [restarts, clusters]."""
    if cpu:

        def sums(index_r):
            return jax.ops.segment_sum(x_rd, index_r, clusters), jax.ops.segment_sum(weight_r, index_r, clusters)

        return jax.vmap(sums, in_axes=1)(index_rs)
    member_rsk = (index_rs[:, :, None] == jnp.arange(clusters)) * weight_r[:, None, None]
    return jnp.einsum("rsk,rd->skd", member_rsk, x_rd, precision=jax.lax.Precision.HIGHEST), member_rsk.sum(axis=0)


def look_at_rows(mesh: Mesh, rows: Rows, centres_skd: jax.Array):
    """Index and score of each row's nearest centre, [chunks, rows, restarts]; sums and numbers of the members."""
    clusters, cpu = centres_skd.shape[1], on_cpu(mesh)
    axes = PartitionSpec(mesh.axis_names)

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(axes, axes, PartitionSpec()),
        out_specs=(axes, axes, PartitionSpec(), PartitionSpec()),
    )
    def look(features_mrd, valid_mr, centres_skd):
        def body(totals, chunk):
            x_rd, valid_r = chunk
            index_rs, score_rs = nearest(x_rd, centres_skd, cpu)
            found = members(x_rd, valid_r.astype(jnp.float32), index_rs, clusters, cpu)
            return jax.tree.map(jnp.add, totals, found), (index_rs, score_rs)

        zeros = jnp.zeros(centres_skd.shape), jnp.zeros(centres_skd.shape[:2])
        zeros = jax.lax.pcast(zeros, mesh.axis_names, to="varying")
        totals, found = jax.lax.scan(body, zeros, (features_mrd, valid_mr))
        return *found, *jax.lax.psum(totals, mesh.axis_names)

    return look(*rows, centres_skd)


@partial(jax.jit, static_argnames="mesh")
def measure(rows: Rows, centres_skd, *, mesh: Mesh):
    """Nearest centre of each row [restarts, rows], and the inertia of each chunk [restarts, chunks]."""
    axes = PartitionSpec(mesh.axis_names)

    @partial(jax.shard_map, mesh=mesh, in_specs=(axes, axes, PartitionSpec()), out_specs=(axes, axes))
    def measure(features_mrd, valid_mr, centres_skd):
        def look(chunk):
            x_rd, valid_r = chunk
            index_rs = nearest(x_rd, centres_skd, on_cpu(mesh))[0]

            def inertia(restart):
                centres_kd, index_r = restart
                return (jnp.square(x_rd - centres_kd[index_r]).sum(axis=1) * valid_r).sum()

            return index_rs, jax.lax.map(inertia, (centres_skd, index_rs.T))

        return jax.lax.map(look, (features_mrd, valid_mr))

    index_mrs, inertia_ms = measure(*rows, centres_skd)
    found = index_mrs.reshape(-1, index_mrs.shape[2]).T, inertia_ms.T
    return jax.lax.with_sharding_constraint(found, replicated(mesh))
