"""Small models and states that tests share."""

import jax
import jax.numpy as jnp

from maect_jax.models.mae import Decoder, MaskedAutoencoder
from maect_jax.models.nnclr import Predictor, Projector
from maect_jax.models.vit import ViT
from maect_jax.neighbors.queue import SupportQueue
from maect_jax.parallel.mesh import make_mesh


def encoder_of(cfg: dict, **changes) -> ViT:
    """Encoder of a reference's constants (`img_size`, `patch_size`, `dim`, `depth`, `heads`)."""
    shape = dict(
        width=int(cfg["dim"]),
        depth=int(cfg["depth"]),
        heads=int(cfg["heads"]),
        patch=int(cfg["patch_size"]),
        image_size=int(cfg["img_size"]),
    )
    return ViT(**shape | changes)


def mae_of(cfg: dict, **changes) -> MaskedAutoencoder:
    """Masked autoencoder of a reference's constants; `changes` go to both halves."""
    encoder = encoder_of(cfg, **changes)
    decoder = Decoder(
        int(cfg["decoder_dim"]),
        int(cfg["decoder_depth"]),
        int(cfg["decoder_heads"]),
        encoder.grid,
        3 * encoder.patch**2,
        **changes,
    )
    return MaskedAutoencoder(encoder, decoder)


def head_tree(width: int, hidden: int = 2048, out: int = 256, predictor_hidden: int = 4096, queue: int = 65536) -> dict:
    """Head of stage 3 as `exchange.layouts` takes it."""
    key = jax.random.key(0)
    projector = Projector(hidden, out).init(key, jnp.zeros((2, width)), train=False)
    predictor = Predictor(predictor_hidden, out).init(key, jnp.zeros((2, out)), train=False)
    return {
        "params": {"projector": projector["params"], "predictor": predictor["params"]},
        "batch_stats": {"projector": projector["batch_stats"], "predictor": predictor["batch_stats"]},
        "target": dict(projector),
        "queue": vars(SupportQueue.create(key, queue, out)),
    }


def mae_tree(cfg: dict) -> dict:
    """Fresh parameters of `mae_of(cfg)`."""
    model = mae_of(cfg)
    n, p = model.encoder.grid**2, 3 * model.encoder.patch**2
    return model.init(jax.random.key(0), jnp.zeros((1, n // 4, p)), jnp.arange(n)[None])["params"]


def one_device():
    """Mesh of a single device."""
    return make_mesh(devices=jax.devices()[:1])


def channels_last(images: jax.Array) -> jax.Array:
    """[..., channel, row, column] -> [..., row, column, channel]."""
    return jnp.moveaxis(jnp.asarray(images), -3, -1)


def cast(tree, dtype):
    """All floating leaves as `dtype`."""
    return jax.tree.map(lambda x: jnp.asarray(x, dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
