"""Conversions between our trees and published layouts: exact both ways, and nothing is silently left out."""

import jax
import numpy as np
import pytest

from maect_jax.errors import CheckpointError
from maect_jax.exchange.layouts import LAYOUTS, from_layout, to_layout
from small import head_tree, mae_tree


def random_like(create) -> dict:
    """Random values (whole numbers for integers) in the shapes of the tree that `create` would return."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: (9 * rng.standard_normal(x.shape)).astype(x.dtype), jax.eval_shape(create))


@pytest.fixture(scope="module")
def tiny():
    """Tree of a small masked autoencoder with random leaves, and its patch and grid."""
    cfg = dict(img_size=16, patch_size=4, dim=24, depth=3, heads=2, decoder_dim=16, decoder_depth=2, decoder_heads=2)
    return random_like(lambda: mae_tree(cfg)), {"patch": 4, "grid": 4}


@pytest.fixture(scope="module")
def head():
    """Tree of a small head with random leaves."""
    return random_like(lambda: head_tree(24, 12, 8, 20, 6))


def same(a: dict, b: dict) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_then_import_gives_every_bit_back(layout, tiny, head):
    tree, geometry = tiny
    if layout.startswith("maect_head"):
        tree = {name: part for name, part in head.items() if layout.endswith("3") or name != "target"}
    elif not layout.endswith(("full", "pretraining")):
        tree = {"encoder": tree["encoder"]}
    assert same(from_layout(to_layout(tree, layout, **geometry), layout), tree)


def test_hugging_face_query_key_value_are_the_thirds_of_the_official_matrix(tiny):
    tree, geometry = tiny
    official = to_layout(tree, "mae_official_full", **geometry)
    split = to_layout(tree, "hf4_pretraining", **geometry)
    for kind in ("weight", "bias"):
        parts = [split[f"vit.encoder.layer.1.attention.attention.{n}.{kind}"] for n in ("query", "key", "value")]
        np.testing.assert_array_equal(np.concatenate(parts), official[f"blocks.1.attn.qkv.{kind}"])


def test_patch_kernel_is_a_convolution(tiny):
    """Our matrix on (row, column, channel) vectors gives what the exported (out, channel, row, column) kernel gives."""
    tree, geometry = tiny
    kernel = to_layout(tree, "mae_official_full", **geometry)["patch_embed.proj.weight"]
    patch_chw = np.random.default_rng(1).standard_normal((3, 4, 4))  # float64, so that only the order can differ
    ours = patch_chw.transpose(1, 2, 0).reshape(-1) @ tree["encoder"]["patch_embed"]["kernel"]
    np.testing.assert_allclose(ours, (kernel * patch_chw).sum((1, 2, 3)), rtol=1e-10)


def test_all_missing_and_unexpected_tensors_are_listed(tiny):
    tree, geometry = tiny
    tensors = to_layout(tree, "mae_official_full", **geometry)
    del tensors["blocks.1.norm1.bias"], tensors["decoder_norm.weight"]
    tensors["head.weight"] = np.zeros((10, 24))
    with pytest.raises(CheckpointError) as error:
        from_layout(tensors, "mae_official_full")
    for text in ("missing: blocks.1.norm1.bias, decoder_norm.weight", "unexpected: head.weight"):
        assert text in str(error.value)


def test_all_misshaped_tensors_are_listed(tiny):
    tree, geometry = tiny
    tensors = to_layout(tree, "mae_official_full", **geometry)
    tensors["blocks.2.mlp.fc1.weight"] = np.zeros((96, 25), np.float32)
    tensors["decoder_pred.bias"] = np.zeros((48, 1), np.float32)
    with pytest.raises(CheckpointError) as error:
        from_layout(tensors, "mae_official_full")
    assert "blocks.2.mlp.fc1.weight: (96, 25), expected (96, 24)" in str(error.value)
    assert "decoder_pred.bias: (48, 1), expected (48,)" in str(error.value)


@pytest.mark.parametrize("name", ["pos_embed", "decoder_pos_embed"])
def test_a_position_table_that_is_not_the_fixed_one_is_refused(name, tiny):
    tree, geometry = tiny
    tensors = to_layout(tree, "mae_official_full", **geometry)
    tensors[name] = tensors[name] + np.float32(1e-3)
    with pytest.raises(CheckpointError, match=f"{name} differs"):
        from_layout(tensors, "mae_official_full")


def test_a_table_without_its_class_row_is_not_taken_for_one_with_it(tiny):
    tree, geometry = tiny
    tensors = to_layout({"encoder": tree["encoder"]}, "maect_encoder", **geometry)
    with pytest.raises(CheckpointError, match="square grid"):
        from_layout(tensors, "mae_official_encoder")


def test_a_tree_with_more_or_less_than_the_layout_is_refused(tiny):
    tree, geometry = tiny
    with pytest.raises(CheckpointError, match=r"unexpected: decoder\.blocks"):
        to_layout(tree, "timm_mae", **geometry)
    with pytest.raises(CheckpointError, match=r"missing: decoder\.blocks"):
        to_layout({"encoder": tree["encoder"]}, "mae_official_full", **geometry)
