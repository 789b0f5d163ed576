"""Conversions between our trees and published layouts: exact both ways, and nothing is silently left out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maect_jax.errors import CheckpointError
from maect_jax.exchange.layouts import ENCODERS, LAYOUTS, WITHOUT_CLASS_ROW
from maect_jax.exchange.mapping import from_layout, to_layout
from small import head_tree, mae_tree


def random_like(create) -> dict:
    """Random values (whole numbers for integers) in the shapes of the tree that `create` would return."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: (9 * rng.standard_normal(x.shape)).astype(x.dtype), jax.eval_shape(create))


def fitting(tree: dict, layout: str) -> dict:
    """The parts of a tree that a layout has rows for."""
    paths = [row.path for row in LAYOUTS[layout] if row.path]
    kept = {name: part for name, part in tree.items() if name in {path.split(".")[0] for path in paths}}
    if "encoder" in kept and "encoder.norm.scale" not in paths:
        kept["encoder"] = {name: part for name, part in kept["encoder"].items() if name != "norm"}
    return kept


def whole_tree() -> dict:
    """Every part there is of a small model: masked autoencoder, classifier, NNCLR head, linear probe."""
    cfg = dict(img_size=16, patch_size=4, dim=24, depth=3, heads=2, decoder_dim=16, decoder_depth=2, decoder_heads=2)
    affine = {"scale": jnp.zeros(24), "bias": jnp.zeros(24)}
    linear = {"kernel": jnp.zeros((24, 5)), "bias": jnp.zeros(5)}
    statistics = {"mean": jnp.zeros(24), "var": jnp.zeros(24)}
    parts = {"fc_norm": affine, "head": linear, "pooler": linear, "probe": statistics | linear}
    return mae_tree(cfg) | head_tree(24, 12, 8, 20, 6) | parts


@pytest.fixture(scope="module")
def tiny():
    """Tree of small models with random leaves, and their patch and grid."""
    return random_like(whole_tree), {"patch": 4, "grid": 4}


def same(a: dict, b: dict) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_then_import_gives_every_bit_back(layout, tiny):
    tree, geometry = tiny
    part = fitting(tree, layout)
    assert same(from_layout(to_layout(part, layout, **geometry), layout), part)


@pytest.mark.parametrize("layout", ENCODERS)
def test_learned_positions_come_back_with_every_bit(layout, tiny):
    tree, geometry = tiny
    part = fitting(tree, layout)
    table = np.random.default_rng(2).standard_normal((1, 17, 24)).astype(np.float32)
    if layout in WITHOUT_CLASS_ROW:
        table[:, 0] = 0
    part["encoder"] = part["encoder"] | {"pos_embed": table}
    assert same(from_layout(to_layout(part, layout, **geometry), layout), part)


def test_the_class_tokens_position_goes_to_the_token_where_a_layout_has_no_row_for_it(tiny):
    tree, geometry = tiny
    table = np.random.default_rng(2).standard_normal((1, 17, 24)).astype(np.float32)
    part = {"encoder": tree["encoder"] | {"pos_embed": table}}
    found = to_layout(part, "maect_encoder", **geometry)
    np.testing.assert_array_equal(found["pos_embed"], table[:, 1:])
    np.testing.assert_array_equal(found["cls_token"][0, 0], tree["encoder"]["cls_token"][0, 0] + table[0, 0])


def test_hugging_face_query_key_value_are_the_thirds_of_the_official_matrix(tiny):
    tree, geometry = tiny
    official = to_layout(fitting(tree, "mae_official_full"), "mae_official_full", **geometry)
    split = to_layout(fitting(tree, "hf4_pretraining"), "hf4_pretraining", **geometry)
    for kind in ("weight", "bias"):
        parts = [split[f"vit.encoder.layer.1.attention.attention.{n}.{kind}"] for n in ("query", "key", "value")]
        np.testing.assert_array_equal(np.concatenate(parts), official[f"blocks.1.attn.qkv.{kind}"])


def test_patch_kernel_is_a_convolution(tiny):
    """Our matrix on (row, column, channel) vectors gives what the exported (out, channel, row, column) kernel gives."""
    tree, geometry = tiny
    kernel = to_layout(fitting(tree, "mae_official_full"), "mae_official_full", **geometry)["patch_embed.proj.weight"]
    patch_chw = np.random.default_rng(1).standard_normal((3, 4, 4))  # float64, so that only the order can differ
    ours = patch_chw.transpose(1, 2, 0).reshape(-1) @ tree["encoder"]["patch_embed"]["kernel"]
    np.testing.assert_allclose(ours, (kernel * patch_chw).sum((1, 2, 3)), rtol=1e-10)


def test_all_missing_and_unexpected_tensors_are_listed(tiny):
    tree, geometry = tiny
    tensors = to_layout(fitting(tree, "mae_official_full"), "mae_official_full", **geometry)
    del tensors["blocks.1.norm1.bias"], tensors["decoder_norm.weight"]
    tensors["head.weight"] = np.zeros((10, 24))
    with pytest.raises(CheckpointError) as error:
        from_layout(tensors, "mae_official_full")
    for text in ("missing: blocks.1.norm1.bias, decoder_norm.weight", "unexpected: head.weight"):
        assert text in str(error.value)


def test_parts_may_be_missing_where_that_is_allowed(tiny):
    tree, geometry = tiny
    whole = fitting(tree, "mae_official_full")
    tensors = to_layout(whole, "mae_official_full", **geometry)
    encoder = {name: x for name, x in tensors.items() if not name.startswith(("decoder", "mask"))}
    with pytest.raises(CheckpointError, match="missing: decoder_blocks"):
        from_layout(encoder, "mae_official_full", ["head/*"])
    found = from_layout(encoder, "mae_official_full", ["decoder/*"])
    assert same(found, {"encoder": whole["encoder"]})
    del tensors["decoder_blocks.1.norm1.bias"]  # of a stack of two: no leaf can be made of the other
    with pytest.raises(CheckpointError, match=r"missing: decoder_blocks\.1\.norm1\.bias"):
        from_layout(tensors, "mae_official_full", ["decoder/*"])


def test_a_repetition_must_repeat_and_may_be_missing(tiny):
    tree, _ = tiny
    tensors = to_layout(fitting(tree, "maect_probe"), "maect_probe")
    assert {name for name in tensors if name.startswith("norm.")} == {
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }
    plain = {name: x for name, x in tensors.items() if not name.startswith("norm.")}
    assert same(from_layout(plain, "maect_probe"), fitting(tree, "maect_probe"))
    with pytest.raises(CheckpointError, match=r"norm\.running_var differs"):
        from_layout(tensors | {"norm.running_var": tensors["norm.running_var"] + 1}, "maect_probe")


def test_all_misshaped_tensors_are_listed(tiny):
    tree, geometry = tiny
    tensors = to_layout(fitting(tree, "mae_official_full"), "mae_official_full", **geometry)
    tensors["blocks.2.mlp.fc1.weight"] = np.zeros((96, 25), np.float32)
    tensors["decoder_pred.bias"] = np.zeros((48, 1), np.float32)
    with pytest.raises(CheckpointError) as error:
        from_layout(tensors, "mae_official_full")
    assert "blocks.2.mlp.fc1.weight: (96, 25), expected (96, 24)" in str(error.value)
    assert "decoder_pred.bias: (48, 1), expected (48,)" in str(error.value)


def test_a_decoders_position_table_that_is_not_the_fixed_one_is_refused(tiny):
    tree, geometry = tiny
    name = "decoder_pos_embed"
    tensors = to_layout(fitting(tree, "mae_official_full"), "mae_official_full", **geometry)
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
        to_layout(fitting(tree, "mae_official_full"), "timm_mae", **geometry)
    with pytest.raises(CheckpointError, match=r"missing: decoder\.blocks"):
        to_layout({"encoder": tree["encoder"]}, "mae_official_full", **geometry)
