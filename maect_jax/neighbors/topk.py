"""Who is near: exact top-k by inner product, computed where the data lies.

Under plain `jit` the compiler gathers the whole [batch, queue] similarity matrix before `lax.top_k`. `shard_map` tells
it that every row's search is local: with a replicated bank no collective is needed at all, with a bank split by rows
each device offers its k best and only those candidates travel.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

OWN = -1.0  # similarity given to a query's own rows: no cosine is lower


def _similarity(query_be: jax.Array, bank_qe: jax.Array) -> jax.Array:
    return jnp.matmul(query_be, bank_qe.T, precision=jax.lax.Precision.HIGHEST)


def top_k_replicated_bank(
    mesh: Mesh, query_be: jax.Array, query_id_b: jax.Array, bank_qe: jax.Array, bank_id_q: jax.Array, k: int
) -> tuple[jax.Array, jax.Array]:
    """The k nearest bank rows of each query; queries split over the devices, the bank on each of them.

    Args:
      query_be: unit-length queries [batch, width]; the mesh's devices must divide the batch.
      query_id_b: int32 [batch]; rows of the bank with the query's own id score -1 (NNCLR self-exclusion).
      bank_qe, bank_id_q: unit-length rows [queue, width] and their int32 ids.
      k: 1 <= k <= queue.

    Returns:
      similarity [batch, k] and int32 row index [batch, k], most similar first.
    """

    axes = mesh.axis_names

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(axes), PartitionSpec(axes), PartitionSpec(), PartitionSpec()),
        out_specs=(PartitionSpec(axes), PartitionSpec(axes)),
    )
    def search(query_be, query_id_b, bank_qe, bank_id_q):
        similarity_bq = _similarity(query_be, bank_qe)
        similarity_bq = jnp.where(query_id_b[:, None] == bank_id_q[None, :], OWN, similarity_bq)
        if k == 1:  # an arg-max costs a fraction of a sort
            index_b1 = jnp.argmax(similarity_bq, axis=1, keepdims=True).astype(jnp.int32)
            return jnp.take_along_axis(similarity_bq, index_b1, axis=1), index_b1
        similarity_bk, index_bk = jax.lax.top_k(similarity_bq, k)
        return similarity_bk, index_bk.astype(jnp.int32)

    return search(query_be, query_id_b, bank_qe, bank_id_q)


def top_k_sharded_bank(
    mesh: Mesh, query_be: jax.Array, bank_qe: jax.Array, valid_q: jax.Array, k: int
) -> tuple[jax.Array, jax.Array]:
    """The k nearest bank rows of each query; the bank split by rows over the devices, the queries on each of them.

    Args:
      query_be: queries [batch, width], replicated.
      bank_qe: rows [bank, width]; the mesh's devices must divide the bank (pad it and mark the padding).
      valid_q: bool [bank], False for padding rows, which are never returned while k <= number of valid rows.
      k: 1 <= k <= bank rows a device.

    Returns:
      similarity [batch, k] and int32 index into the whole bank [batch, k], most similar first; ties by lower index.
    """

    axes = mesh.axis_names

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(axes), PartitionSpec(axes)),
        out_specs=(PartitionSpec(None, axes), PartitionSpec(None, axes)),
    )
    def search(query_be, bank_qe, valid_q):
        similarity_bq = jnp.where(valid_q[None, :], _similarity(query_be, bank_qe), -jnp.inf)
        similarity_bk, index_bk = jax.lax.top_k(similarity_bq, k)
        return similarity_bk, index_bk + jax.lax.axis_index(axes) * bank_qe.shape[0]

    candidates_bc, index_bc = search(query_be, bank_qe, valid_q)
    similarity_bk, place_bk = jax.lax.top_k(candidates_bc, k)
    return similarity_bk, jnp.take_along_axis(index_bc, place_bk, axis=1).astype(jnp.int32)
