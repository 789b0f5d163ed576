"""Exported names and shapes are those of the published files, for every size, without allocating a model."""

import jax
import pytest

from golden import constants
from maect_jax.exchange.layouts import LAYOUTS
from maect_jax.exchange.mapping import to_layout
from small import head_tree, mae_tree

MODELS = ("B16", "L16", "H16", "H14", "tiny")


@pytest.mark.parametrize("name", MODELS)
def test_exported_names_and_shapes_are_the_published_ones(name):
    reference = constants("keys")
    cfg = reference["configs"][name]
    patch, grid = cfg["patch_size"], cfg["img_size"] // cfg["patch_size"]

    def exported(layout):
        head = layout.startswith("maect_head")
        tree = jax.eval_shape(lambda: head_tree(cfg["dim"]) if head else mae_tree(cfg))
        if layout in ("mae_official_encoder", "timm_mae", "maect_encoder"):
            tree.pop("decoder")
        if layout == "maect_head_stage2":
            tree.pop("target")
        return jax.eval_shape(lambda t: to_layout(t, layout, patch=patch, grid=grid), tree)

    layouts = [layout for layout in reference if layout not in ("configs", "timm_names")]
    assert set(layouts) <= LAYOUTS.keys()
    for layout in layouts:
        if name in reference[layout]:
            with jax.enable_x64(True):  # ids and counters are 64 bit there
                shapes = {key: list(x.shape) for key, x in exported(layout).items()}
            assert shapes == reference[layout][name], layout
