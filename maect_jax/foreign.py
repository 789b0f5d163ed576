"""What a run takes from weights that it did not train: `init_from` as a file in anybody's layout.

The file stands for a complete pre-training: it starts 'pretrain' and 'control' with encoder and decoder, 'head' with
the encoder. It can not start 'tune', which needs a head.
"""

import numpy as np
from ml_collections import ConfigDict

from maect_jax.errors import ConfigError
from maect_jax.exchange.beside import HUB_FILES
from maect_jax.exchange.files import Opened, find_file, hashes, open_model
from maect_jax.exchange.fitting import allows
from maect_jax.training.checkpoint import absolute


def is_weights_file(init_from: str) -> bool:
    """Whether `init_from` names a weights file, or a folder that is no run but has one."""
    root = absolute(init_from or ".")
    return bool(init_from) and (root.is_file() or any((root / name).is_file() for name in HUB_FILES))


def file_hash(init_from: str) -> str:
    """SHA-256 of the weights file."""
    return hashes(find_file(absolute(init_from)))[0]


def open_initial(config: ConfigDict) -> Opened:
    """The model in `config.init_from`, for pictures of the run's size.

    Raises:
      ConfigError: it is of another architecture than the run's; every setting that would have to change is named.
      CheckpointError: it can not be read, or fits no layout.
    """
    model = config.model
    opened = open_model(
        absolute(config.init_from),
        image_size=model.image_size,
        heads=model.heads,
        decoder_heads=model.decoder.heads,
        allow_missing=_allowed(config),
    )
    if problems := _differences(config, opened):
        raise ConfigError(problems)
    return opened


def sources_of(config: ConfigDict, stage: str, opened: Opened) -> dict:
    """What `stage` starts from, as `handover.stage_sources`; a head of the file is not used.

    Raises:
      ConfigError: the file lacks what the stage starts from, and it was not allowed to.
    """
    params = opened.model.params
    encoder, lacking = dict(params["encoder"]), []
    if "norm" not in encoder:
        lacking.append("encoder/norm")
        width = config.model.width
        encoder["norm"] = {"scale": np.ones(width, np.float32), "bias": np.zeros(width, np.float32)}
    sources = {"encoder": encoder}
    if stage in ("pretrain", "control"):
        if "decoder" in params:
            sources["decoder"] = params["decoder"]
        else:
            lacking.append("decoder")
    problems = [
        f"config.init_from: '{config.init_from}' has no {part.replace('/', ' ')}, which stage '{stage}' starts from; "
        f"--config.allow_missing='{part}/*' starts it afresh"
        for part in lacking
        if not allows(_allowed(config), part)
    ]
    if problems:
        raise ConfigError(problems)
    return sources


def _allowed(config: ConfigDict) -> tuple[str, ...]:
    return tuple(part.strip() for part in config.allow_missing.split(",") if part.strip())


def _differences(config: ConfigDict, opened: Opened) -> list[str]:
    """A sentence for each setting of the model that the file has otherwise."""
    encoder, decoder = opened.model.encoder, opened.model.decoder
    learned = "learned" if encoder.learned_positions else "fixed"
    found = {
        "width": encoder.width,
        "depth": encoder.depth,
        "heads": opened.said.heads or encoder.heads,
        "patch": encoder.patch,
        "channels": opened.model.channels,
        "positions": learned,
    }
    with_decoder = decoder is not None and config.stages[0] in ("pretrain", "control")
    if with_decoder:
        heads = opened.said.decoder_heads or decoder.heads
        found |= {"decoder.width": decoder.width, "decoder.depth": decoder.depth, "decoder.heads": heads}
    found = {f"model.{key}": value for key, value in found.items()}
    for key in ("mean", "std"):  # pictures must come normalised as in its training
        value, mine = getattr(opened.said, key), config.data[key]
        if value and len(value) == len(mine) and not np.allclose(value, mine, atol=1e-3):
            found[f"data.{key}"] = tuple(round(x, 4) for x in value)
    pixels = opened.said.normalised_pixels
    if with_decoder and pixels is not None:
        found["pretrain.normalise_pixels"] = pixels
    problems = []
    for key, value in found.items():
        section, _, name = key.rpartition(".")
        mine, text = config[section][name], str(value).replace(" ", "").strip("()")
        if mine != value:
            problems.append(f"config.{key} = {mine!r}: '{config.init_from}' has {value!r}; set --config.{key}={text}")
    for part, module in (("encoder", encoder), ("decoder", decoder if with_decoder else None)):
        if module is not None and module.mlp_ratio != 4:
            wide = f"{module.mlp_ratio} times as wide; runs train 4 times"
            problems.append(f"config.init_from: '{config.init_from}' has, in its {part}, MLPs {wide}")
    return problems
