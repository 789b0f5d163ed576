"""Small random models to export: every value is random, norms, biases and class rows too; none is right by chance."""

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from maect_jax.exchange.model import Model
from maect_jax.exchange.provenance import Provenance
from maect_jax.models.mae import Decoder, MaskedAutoencoder
from maect_jax.models.vit import SIZES, ViT


def random_model(
    *,
    seed: int = 0,
    width: int = 48,
    depth: int = 2,
    heads: int = 4,
    patch: int = 4,
    image_size: int = 16,
    channels: int = 3,
    decoder: bool = False,
    classes: int = 0,
    fc_norm: bool = False,
    learned_positions: bool = False,
    **facts,
) -> Model:
    """A model of this shape.

    Args:
      decoder: with a decoder of width 32, depth 2 and 4 heads.
      classes: of its head; 0 = no head.
      fc_norm: norm over the mean of the patch tokens, none after the last block; pooling is then 'mean'.
      facts: other attributes of `Model`.
    """
    encoder = ViT(width, depth, heads, patch, image_size, learned_positions=learned_positions, final_norm=not fc_norm)
    values = channels * patch**2
    half = Decoder(32, 2, 4, encoder.grid, values) if decoder else None
    random = np.random.default_rng(seed)
    params = _random_tree(_shapes(encoder, half, values), random)
    if fc_norm:
        params["fc_norm"] = _random_tree({"scale": _shape(width), "bias": _shape(width)}, random)
    if classes:
        params["head"] = _random_tree({"kernel": _shape(width, classes), "bias": _shape(classes)}, random)
    if fc_norm:
        facts = {"pooling": "mean"} | facts
    if channels != 3:
        facts = {"mean": (0.4,) * channels, "std": (0.2,) * channels} | facts
    facts = {"name": "tune", "provenance": Provenance(), "normalised_pixels": True if decoder else None} | facts
    return Model(encoder=encoder, decoder=half, params=params, channels=channels, **facts)


def published_model(size: str, **changes) -> Model:
    """A random model of a published size, such as 'B/16', for pictures of 224 pixels."""
    shape = SIZES[size]
    shape = dict(width=shape.width, depth=shape.depth, heads=shape.heads, patch=shape.patch, image_size=224)
    return random_model(**shape | changes)


def weightless_model(size: str, decoder: bool = False) -> Model:
    """A model of a published size, decoder too, whose arrays have a shape and no memory: all values are one zero."""
    shape = SIZES[size]
    encoder = ViT(shape.width, shape.depth, shape.heads, shape.patch, 224)
    values = 3 * shape.patch**2
    half = Decoder(512, 8, 16, encoder.grid, values) if decoder else None
    params = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), _shapes(encoder, half, values))
    return Model(name=size, encoder=encoder, decoder=half, params=params, provenance=Provenance())


def photograph() -> Image.Image:
    """A picture in colour, wider than high, with slow and fast changes."""
    rows, columns = np.mgrid[:60, :80]
    channels = [rows * 4, columns * 3, (rows // 3 + columns // 5) % 2 * 255]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def _shape(*axes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(axes, jnp.float32)


def _shapes(encoder: ViT, decoder: Decoder | None, values: int) -> dict:
    n = encoder.grid**2
    patches_bnp, shuffle_bn = jnp.zeros((1, n, values)), jnp.arange(n)[None]
    if decoder is None:
        return {"encoder": jax.eval_shape(lambda: encoder.init(jax.random.key(0), patches_bnp)["params"])}
    model = MaskedAutoencoder(encoder, decoder)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), patches_bnp[:, : n // 4], shuffle_bn)["params"])


def _random_tree(shapes: dict, random: np.random.Generator) -> dict:
    """Values that keep activations near 1: kernels by their inputs, scales around 1, the rest around 0."""

    def values(path, leaf):
        drawn = random.standard_normal(leaf.shape, dtype=np.float32)
        name = path[-1].key
        if name == "kernel":
            return drawn / np.float32(leaf.shape[-2]) ** np.float32(0.5)
        return drawn * np.float32(0.3) + np.float32(name == "scale")

    return jax.tree_util.tree_map_with_path(values, shapes)
