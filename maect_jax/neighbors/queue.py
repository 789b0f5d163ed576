"""The support queue: unit-length embeddings of recent pictures, a ring that forgets the oldest.

Source: NNCLR (Dwibedi et al. 2021), section 3.2; self-exclusion by sample id as in MAE-CT's released recipe.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from maect_jax.neighbors.topk import top_k_replicated_bank
from maect_jax.objectives.nnclr import unit

NOBODY = -1  # id and label of a row that no picture has filled yet


@struct.dataclass
class SupportQueue:
    """Ring of Q rows.

    Attributes:
      rows_qe: unit-length embeddings, float32 [queue, width].
      id_q, label_q: int32 [queue], sample id and class of each row, -1 where none.
      pointer: int32 scalar, the next row to be written.
    """

    rows_qe: jax.Array
    id_q: jax.Array
    label_q: jax.Array
    pointer: jax.Array

    @classmethod
    def create(cls, key: jax.Array, size: int, width: int) -> "SupportQueue":
        """Queue of random unit vectors that belong to nobody; they take part in the search until overwritten."""
        ids, labels = jnp.full((size,), NOBODY, jnp.int32), jnp.full((size,), NOBODY, jnp.int32)
        return cls(unit(jax.random.normal(key, (size, width))), ids, labels, jnp.int32(0))


@struct.dataclass
class Neighbors:
    """One neighbour for each query.

    Attributes:
      rows_be: its embedding [batch, width]. index_b, label_b: its row and class, int32 [batch].
      similarity_b: its cosine similarity.
    """

    rows_be: jax.Array
    index_b: jax.Array
    label_b: jax.Array
    similarity_b: jax.Array


def find_neighbors(
    mesh: Mesh, queue: SupportQueue, target_be: jax.Array, id_b: jax.Array, k: int, keys_b: jax.Array | None
) -> Neighbors:
    """A neighbour for each target: the nearest (k = 1), or one of the k nearest picked uniformly.

    Args:
      mesh: devices over which the batch is split.
      target_be: unit-length targets [batch, width].
      id_b: sample ids int32 [batch]; a row with the query's own id is never preferred.
      k: number of nearest rows to pick from.
      keys_b: one random key a query; unused and may be None when k = 1.
    """
    similarity_bk, index_bk = top_k_replicated_bank(mesh, target_be, id_b, queue.rows_qe, queue.id_q, k)
    if k == 1:
        pick_b = jnp.zeros(id_b.shape, jnp.int32)
    else:
        pick_b = jax.vmap(lambda key: jax.random.randint(key, (), 0, k))(keys_b)
    index_b = jnp.take_along_axis(index_bk, pick_b[:, None], axis=1)[:, 0]
    similarity_b = jnp.take_along_axis(similarity_bk, pick_b[:, None], axis=1)[:, 0]
    return Neighbors(queue.rows_qe[index_b], index_b, queue.label_q[index_b], similarity_b)


def enqueue(queue: SupportQueue, target_be: jax.Array, id_b: jax.Array, label_b: jax.Array) -> SupportQueue:
    """The queue after the batch took the place of its oldest rows, in batch order.

    The batch must divide the queue, so that a write never crosses the end of the ring.
    """
    size, batch = queue.rows_qe.shape[0], target_be.shape[0]
    if size % batch:
        raise ValueError(f"a batch of {batch} does not divide the queue of {size} rows")

    def write(ring, new):
        return jax.lax.dynamic_update_slice_in_dim(ring, new.astype(ring.dtype), queue.pointer, axis=0)

    return SupportQueue(
        write(queue.rows_qe, target_be),
        write(queue.id_q, id_b),
        write(queue.label_q, label_b),
        (queue.pointer + batch) % size,
    )


def align(queue: SupportQueue, batch: int) -> SupportQueue:
    """The same ring, writable by batches of this size: turned, oldest row first, if its pointer is no multiple."""
    shift = jnp.where(queue.pointer % batch == 0, 0, queue.pointer)

    def turn(ring):
        return jnp.roll(ring, -shift, axis=0)

    return SupportQueue(turn(queue.rows_qe), turn(queue.id_q), turn(queue.label_q), queue.pointer - shift)


def age_in_updates(queue: SupportQueue, index_b: jax.Array, batch: int) -> jax.Array:
    """How many updates ago each row was written, int32 [batch]; 1 for the rows of the newest batch."""
    size = queue.rows_qe.shape[0]
    return ((queue.pointer - 1 - index_b) % size) // batch + 1
