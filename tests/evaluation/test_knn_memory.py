"""k-NN at the size of ImageNet: what the compiled search would hold, from shapes alone."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from maect_jax.evaluation import knn
from maect_jax.parallel.mesh import make_mesh

BANK, QUERIES, WIDTH, CLASSES = 1_281_167, 50_000, 1024, 1000
GB = 1e9


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(devices=jax.devices())


def shapes(mesh, chunk: int):
    """Arguments of the search as abstract arrays, and the padded length of the bank."""
    rows = knn.padded_rows(BANK, mesh.size, 200)

    def array(shape, spec, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    whole, split = PartitionSpec(), PartitionSpec(mesh.axis_names)
    statistics = array((WIDTH,), whole), array((WIDTH,), whole)
    return (array((chunk, WIDTH), whole), array((rows, WIDTH), split), array((rows,), split, bool), *statistics), rows


def test_search_of_all_of_imagenet_holds_a_tile_of_similarities_and_gathers_only_candidates(mesh):
    arguments, rows = shapes(mesh, knn.CHUNK)
    assert QUERIES > knn.CHUNK and rows - BANK < 8 * 128
    compiled = knn._nearest.lower(*arguments, mesh=mesh, k=200).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 1.0 * GB  # on each device
    assert memory.argument_size_in_bytes < 1.05 * (rows * WIDTH * 4 / mesh.size) + 0.1 * GB  # a share of the bank
    sizes = [np.prod([int(n) for n in found.split(",")]) for found in re.findall(r"\[([\d,]+)\]", compiled.as_text())]
    assert max(sizes) == rows // mesh.size * WIDTH  # no array is longer than a device's share of the bank
    assert str(rows) not in compiled.as_text()  # and none has the whole bank as an axis


def test_votes_for_a_thousand_classes_are_counted_without_an_array_of_neighbours_by_classes(mesh):
    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    near = array(knn.CHUNK, 200), array(knn.CHUNK, 200, dtype=jnp.int32)
    protocols = ((10, 0.07), (200, 0.07))
    lowered = knn._vote.lower(array(BANK, dtype=jnp.int32), *near, mesh=mesh, protocols=protocols, classes=CLASSES)
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 0.1 * GB
