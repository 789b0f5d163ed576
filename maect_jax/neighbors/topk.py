"""Who is near: exact top-k by inner product, computed where the data lies.

Under plain `jit` the compiler gathers the whole [batch, bank] similarity matrix before `lax.top_k`. `shard_map` tells
it that every row's search is local: with a replicated bank no collective is needed at all, with a bank split by rows
each device offers its k best and only those candidates travel.

A device walks its bank in blocks of `BLOCK` rows and keeps the k best so far, so memory does not grow with the bank.
Within a block the selection has two steps: the k groups of neighbouring rows with the greatest maxima, then the k best
of their members. Of equal similarities the lower row index comes first, whatever the blocks, groups and devices.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

OWN = -1.0  # similarity given to a query's own rows: no cosine is lower
BLOCK = 65536  # bank rows that a device compares at a time
TILE = 256  # queries that a device compares at a time
GROUP = 128  # widest group; a bank whose rows a device are a multiple of it is searched fastest


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
      similarity [batch, k] and int32 row index [batch, k], most similar first; ties by lower index.
    """

    axes = mesh.axis_names

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(axes), PartitionSpec(axes), PartitionSpec(), PartitionSpec()),
        out_specs=(PartitionSpec(axes), PartitionSpec(axes)),
    )
    def search(query_be, query_id_b, bank_qe, bank_id_q):
        def compare(query, rows):
            (query_e, own), (row_se, id_s) = query, rows
            return jnp.where(id_s == own, OWN, _similarity(query_e, row_se))

        return _walk(compare, (query_be, query_id_b), (bank_qe, bank_id_q), k)

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
        def compare(query_e, rows):
            row_se, bias_s = rows
            return _similarity(query_e, row_se) + bias_s  # a sum is several times as fast as a choice on the CPU

        similarity_bk, index_bk = _walk(compare, query_be, (bank_qe, jnp.where(valid_q, 0.0, -jnp.inf)), k)
        return similarity_bk, index_bk + jax.lax.axis_index(axes) * bank_qe.shape[0]

    return jax.vmap(partial(_best, k=k))(*search(query_be, bank_qe, valid_q))


def _similarity(query_e: jax.Array, row_se: jax.Array) -> jax.Array:
    return jnp.matmul(query_e, row_se.T, precision=jax.lax.Precision.HIGHEST)


def _walk(compare: Callable, queries, bank, k: int) -> tuple[jax.Array, jax.Array]:
    """The k best rows of a device's bank for each query: similarity [batch, k] and int32 index [batch, k].

    Args:
      compare: (one query, rows of the bank) -> similarity [rows].
      queries, bank: arrays, or tuples of arrays, whose first axes are the queries and the rows.
    """
    rows = jax.tree.leaves(bank)[0].shape[0]
    block = -(-rows // -(-rows // BLOCK))  # as few blocks as BLOCK allows, alike in length
    block = min(rows, max(-(-block // GROUP) * GROUP, k))

    def search(number):
        start = jnp.minimum(number * block, rows - block)  # the last block reaches back to be as long as the others
        part = jax.tree.map(lambda x_q: jax.lax.dynamic_slice_in_dim(x_q, start, block), bank)
        seen_s = start + jnp.arange(block) < number * block

        def of_query(query):
            similarity_s = compare(query, part)
            if rows % block:
                similarity_s += jnp.where(seen_s, -jnp.inf, 0.0)
            similarity_k, index_k = _top_k(similarity_s, k)
            return similarity_k, start + index_k

        return jax.lax.map(of_query, queries, batch_size=TILE)

    def merge(best, number):
        both = zip(best, search(number))  # rows of earlier blocks first, as ties want it
        return jax.vmap(partial(_best, k=k))(*(jnp.concatenate(pair, axis=1) for pair in both)), None

    return jax.lax.scan(merge, search(0), jnp.arange(1, -(-rows // block)))[0]


def _top_k(value_s: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`lax.top_k` of a long row in less time: values [k] and int32 places [k], greatest first, ties by lower place.

    Each of the k best lies in one of the k groups with the greatest maxima: the maximum of any other group has k
    values before it, one in each of these.
    """
    # k groups of the square root of rows / k values hold as many values as there are groups
    width = math.gcd(value_s.size, min(GROUP, 2 ** round(math.log2(value_s.size / k) / 2)))
    if width < 8:
        return jax.lax.top_k(value_s, k)
    group_gs = value_s.reshape(-1, width)
    chosen_k = jnp.sort(jax.lax.top_k(group_gs.max(axis=1), k)[1])  # in the order of rows again
    place_ks = chosen_k[:, None] * width + jnp.arange(width)
    return _best(group_gs[chosen_k].ravel(), place_ks.ravel(), k)


def _best(value_c: jax.Array, index_c: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k greatest of c candidates and their indices; of equal ones the first."""
    value_k, place_k = jax.lax.top_k(value_c, k)
    return value_k, index_c[place_k].astype(jnp.int32)
