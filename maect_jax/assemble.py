"""From settings to what runs: models, optimiser groups, schedules, jitted steps and first states of each stage."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from maect_jax.config import updates_of, warmup_updates
from maect_jax.data.device.augment import make_views
from maect_jax.models.mae import Decoder, MaskedAutoencoder
from maect_jax.models.nnclr import Predictor, Projector
from maect_jax.models.vit import ViT, split_blocks
from maect_jax.neighbors.queue import SupportQueue, align
from maect_jax.objectives import masking
from maect_jax.parallel.mesh import batch_sharding, replicated, state_sharding
from maect_jax.randomness import purpose_key, stage_seed
from maect_jax.training import flops
from maect_jax.training.contrastive import make_contrastive_step
from maect_jax.training.optimizer import Group
from maect_jax.training.pretraining import Loss, make_pretrain_step, reconstruction_only, self_consistent
from maect_jax.training.schedule import peak_learning_rate
from maect_jax.training.state import TrainState, create_state
from maect_jax.training.steps import Clock, Step


def build_encoder(config: ConfigDict, frozen: int = 0) -> ViT:
    """The encoder; `frozen` lower blocks kept apart (stage 3)."""
    m = config.model
    return ViT(
        m.width,
        m.depth,
        m.heads,
        m.patch,
        m.image_size,
        dtype=jnp.dtype(m.dtype),
        remat=m.remat,
        frozen=frozen,
        learned_positions=m.positions == "learned",
    )


def build_autoencoder(config: ConfigDict) -> MaskedAutoencoder:
    """Encoder and decoder of stage 1."""
    m, d = config.model, config.model.decoder
    encoder = build_encoder(config)
    values = m.patch**2 * m.channels
    decoder = Decoder(d.width, d.depth, d.heads, encoder.grid, values, dtype=encoder.dtype, remat=m.remat)
    return MaskedAutoencoder(encoder, decoder)


def build_masks(config: ConfigDict) -> masking.Masks:
    """What each part of a picture sees and predicts in stage 1.

    Raises:
      ValueError: the parts do not divide the patches (see `config_checks`).
    """
    p, patches = config.pretrain, (config.model.image_size // config.model.patch) ** 2
    if p.method == "emae":
        return masking.parallel_masks(patches, p.emae.parts, p.decoded_share)
    if p.method == "disjoint":
        return masking.disjoint_masks(patches, p.mask_ratio, p.disjoint.covered, p.decoded_share)
    return masking.random_mask(patches, p.mask_ratio, p.decoded_share)


def build_objective(config: ConfigDict, masks: masking.Masks) -> Loss:
    """What stage 1 minimises."""
    if config.pretrain.method != "emae":
        return reconstruction_only(masks)
    emae = config.pretrain.emae
    return self_consistent(
        masks,
        weight=emae.consistency_weight,
        norm=emae.consistency_norm,
        form=emae.consistency_form,
        space=emae.consistency_space,
        normalised_pixels=config.pretrain.normalise_pixels,
    )


def build_head(config: ConfigDict) -> tuple[Projector, Predictor]:
    """Projector and predictor of stages 2 and 3."""
    m = config.model
    dtype = jnp.dtype(m.dtype)
    return Projector(m.projector.hidden, m.projector.out, dtype), Predictor(m.predictor.hidden, m.projector.out, dtype)


@dataclass(frozen=True)
class Assembled:
    """A training stage before it has data.

    Attributes:
      name: 'pretrain', 'control', 'head' or 'tune'.
      step: pure step.
      clock: lengths and seed.
      batch, views: pictures an update, crops a picture.
      crop_scale: range of the crop's share of the picture.
      first_state: (sources) -> state at step 0; sources are what an earlier stage left: {} or
        {'encoder'}, {'encoder', 'decoder'}, {'encoder', 'params', 'batch_stats', 'queue'}.
    """

    name: str
    step: Step
    clock: Clock
    batch: int
    views: int
    crop_scale: tuple[float, float]
    first_state: Callable[[dict], TrainState]


def assemble(config: ConfigDict, stage: str, pictures: int, mesh: Mesh) -> Assembled:
    """The stage `stage` for a training set of that many pictures; all settings must be derived."""
    make = {"pretrain": _pretrain, "control": _pretrain, "head": _head, "tune": _tune}[stage]
    section = config.pretrain if stage == "control" else config[stage]
    clock = Clock(
        updates=updates_of(config, stage, pictures),
        warmup=warmup_updates(config, stage, pictures),
        updates_per_epoch=pictures // section.batch,
        seed=stage_seed(config.seed, stage),
    )
    return make(config, stage, section, clock, mesh)


def _views_of(config: ConfigDict, section: ConfigDict, clock: Clock, views: int, augmentation: str) -> Callable:
    def views_of(batch: dict, epoch: jax.Array) -> jax.Array:
        return make_views(
            batch,
            seed=clock.seed,
            epoch=epoch,
            views=views,
            size=config.model.image_size,
            scale=section.crop_scale,
            augmentation=augmentation,
            mean=config.data.mean,
            std=config.data.std,
        )

    return views_of


def _pretrain(config: ConfigDict, stage: str, section: ConfigDict, clock: Clock, mesh: Mesh) -> Assembled:
    model, masks = build_autoencoder(config), build_masks(config)
    counted = {"images": 1, "parts": masks.parts, "predicted": masks.coverage}[section.batch_counting]
    peak = peak_learning_rate(section.base_lr, section.batch, section.views) * counted
    group = Group(peak, section.weight_decay)
    step = make_pretrain_step(
        model,
        _views_of(config, section, clock, section.views, "minimal"),
        clock=clock,
        groups={"encoder": group, "decoder": group},
        masks=masks,
        objective=build_objective(config, masks),
        normalise_pixels=section.normalise_pixels,
        accumulate=section.accumulate,
    )

    def first_state(sources: dict) -> TrainState:
        visible_blp = jnp.zeros((1, masks.keep, model.decoder.values))
        order_bm = jnp.asarray(masks.places_km[:1])
        params = model.init(purpose_key(clock.seed, "initialisation"), visible_blp, order_bm)["params"]
        return create_state(params | {name: sources[name] for name in ("encoder", "decoder") if name in sources})

    return Assembled(stage, step, clock, section.batch, section.views, section.crop_scale, first_state)


def _head(config: ConfigDict, stage: str, section: ConfigDict, clock: Clock, mesh: Mesh) -> Assembled:
    encoder, (projector, predictor) = build_encoder(config), build_head(config)
    group = Group(peak_learning_rate(section.base_lr, section.batch, 2), section.weight_decay)
    step = make_contrastive_step(
        encoder,
        projector,
        predictor,
        _views_of(config, section, clock, 2, section.augmentation),
        mesh=mesh,
        clock=clock,
        groups={"projector": group, "predictor": group},
        pooling=config.model.pooling,
        temperature=section.temperature,
        top_k=1,
    )

    def first_state(sources: dict) -> TrainState:
        keys = jax.random.split(purpose_key(clock.seed, "initialisation"), 3)
        width, out = config.model.width, config.model.projector.out
        variables = {
            "projector": projector.init(keys[0], jnp.zeros((2, width)), train=True),
            "predictor": predictor.init(keys[1], jnp.zeros((2, out)), train=True),
        }
        return create_state(
            {name: v["params"] for name, v in variables.items()},
            frozen={"encoder": sources["encoder"]},
            batch_stats={name: v["batch_stats"] for name, v in variables.items()},
            queue=SupportQueue.create(keys[2], section.queue, out),
        )

    return Assembled(stage, step, clock, section.batch, 2, section.crop_scale, first_state)


def _tune(config: ConfigDict, stage: str, section: ConfigDict, clock: Clock, mesh: Mesh) -> Assembled:
    encoder, (projector, predictor) = build_encoder(config, section.frozen_blocks), build_head(config)
    head = Group(peak_learning_rate(section.head_base_lr, section.batch, 2), section.head_weight_decay)
    peak = peak_learning_rate(section.encoder_base_lr, section.batch, 2)
    step = make_contrastive_step(
        encoder,
        projector,
        predictor,
        _views_of(config, section, clock, 2, section.augmentation),
        mesh=mesh,
        clock=clock,
        groups={
            "encoder": Group(peak, section.encoder_weight_decay, section.layer_decay),
            "projector": head,
            "predictor": head,
        },
        pooling=config.model.pooling,
        temperature=section.temperature,
        top_k=section.top_k,
        target_factor=section.target_factor,
        ema_factor=section.ema_factor,
    )

    def first_state(sources: dict) -> TrainState:
        trained, frozen = split_blocks(sources["encoder"], section.frozen_blocks)
        head, stats = sources["params"], sources["batch_stats"]
        return create_state(
            {"encoder": trained, "projector": head["projector"], "predictor": head["predictor"]},
            frozen={"encoder": frozen},
            batch_stats=stats,
            target={"params": _copy(head["projector"]), "batch_stats": _copy(stats["projector"])},
            queue=align(SupportQueue(**sources["queue"]), section.batch),
            ema={"encoder": _copy(trained)},
        )

    return Assembled(stage, step, clock, section.batch, 2, section.crop_scale, first_state)


def _copy(tree: dict) -> dict:
    return jax.tree.map(jnp.copy, tree)


def source_shapes(config: ConfigDict, stage: str, mesh: Mesh) -> dict:
    """Shapes of what `stage` takes from the one before it; see `Assembled.first_state`."""
    before = jax.eval_shape(_pretrain(config, "pretrain", config.pretrain, _NO_CLOCK, mesh).first_state, {}).params
    if stage in ("pretrain", "control"):
        return before
    if stage == "head":
        return {"encoder": before["encoder"]}
    head_state = _head(config, "head", config.head, _NO_CLOCK, mesh).first_state
    head = jax.eval_shape(head_state, {"encoder": before["encoder"]})
    queue = {field.name: getattr(head.queue, field.name) for field in fields(SupportQueue)}
    return {"encoder": before["encoder"], "params": head.params, "batch_stats": head.batch_stats, "queue": queue}


_NO_CLOCK = Clock(1, 0, 1, 0)


def compile_for(assembled: Assembled, mesh: Mesh, shapes: dict) -> tuple[Callable, TrainState, TrainState]:
    """What the loop needs of a stage on these devices.

    Args:
      assembled: the stage.
      shapes: from `source_shapes`.

    Returns:
      the jitted step with donated state, the state's shapes, and its shardings (two trees like the state).
    """
    state = jax.eval_shape(assembled.first_state, shapes)
    shardings = state_sharding(mesh, state)
    outputs = (shardings, replicated(mesh), batch_sharding(mesh))
    return jax.jit(assembled.step, donate_argnums=0, out_shardings=outputs), state, shardings


def flops_per_update(config: ConfigDict, stage: str) -> float:
    """Operations of one update (matrix products, forward and backward), for ETAs."""
    m, d = config.model, config.model.decoder
    patches, values = (m.image_size // m.patch) ** 2, m.patch**2 * m.channels
    full = flops.forward_flops(m.width, m.depth, patches, values)
    mae = flops.mae_flops(m.width, m.depth, d.width, d.depth, values, build_masks(config))
    tuned = 1 - config.tune.frozen_blocks / m.depth
    batch = config.pretrain.batch if stage in ("pretrain", "control") else config[stage].batch
    return batch * flops.training_flops(stage, mae, full, tuned, config.pretrain.views)
