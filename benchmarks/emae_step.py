"""What a step of EMAE costs beside K steps of MAE: seconds and memory of the steps that a run compiles.

    python -m benchmarks.emae_step                                     seconds; small models on a CPU, ViT-B and L else
    python -m benchmarks.emae_step --sides all                         every setting that changes the cost
    python -m benchmarks.emae_step --memory --model B/16 L/16          compiles and runs nothing
    python -m benchmarks.emae_step --memory --topology v5p:2x2x1       by the compiler of a TPU chip that need not be
                                                                       there, after `pip install libtpu`

Seconds: sides take turns on the same pictures, cropped before, so that other work on the machine meets all alike. Two
ratios are given, medians over the rounds: to K steps of MAE with the same pictures, and to one step of MAE with K times
the pictures, which moves as many tokens and updates the parameters once, as EMAE does: the harder of the two.

Memory: what a compiled step needs beside its arguments, at two batches. The difference is the activations; parameters,
gradients and moments drop out. MAE has K times as many pictures, so that both have the same number of sequences. What
lives at once, `peak_mib`, is the compiler's own account with the arguments; those for CPUs count these alone.

Prints tables, and keeps an entry for each model in `benchmarks/results/emae_step-<compiled for>.json`.
"""

import argparse
import importlib.util
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from maect_jax.assemble import assemble, compile_for, source_shapes
from maect_jax.config import default, derive, set_size
from maect_jax.parallel.mesh import batch_sharding, make_mesh

RESULTS = Path(__file__).parent / "results"
PICTURES = 1_281_167  # of the training set, which sets the length of the run and nothing in a step
BATCH = {"cifar10": 64, "B/16-short": 4}  # else 32
MIB = 2**20


# -------------------------------------------------------------------------------------------------------------- sides


@dataclass(frozen=True)
class Side:
    """One way of pre-training.

    Attributes:
      parts: K; for an MAE the one that it is compared at: its mask ratio is (K - 1) / K.
      pretrain, emae: settings of `config.pretrain` and of `config.pretrain.emae`.
      times: multiplies the pictures of a batch.
      beside: the MAE that it is compared with.
    """

    parts: int = 4
    pretrain: dict = field(default_factory=dict)
    emae: dict = field(default_factory=dict)
    times: int = 1
    beside: str = "mae"

    @property
    def sequences(self) -> int:
        """Sequences that the step has for each picture of the common batch."""
        return self.times * (self.parts if self.pretrain.get("method") == "emae" else 1)


def sides_of(config: ConfigDict, which: str) -> dict[str, Side]:
    """Sides by name: with `which` 'main' those at K = 4, with 'all' other numbers of parts and settings too."""
    sides = _with_parts(4, "")
    if which == "main":
        return sides
    sides |= {
        "emae, weight 0": _emae(consistency_weight=0.0),
        "emae, one_sided": _emae(consistency_form="one_sided"),
        "emae, pixels": _emae(consistency_space="pixels"),
        "mae, half decoded": Side(pretrain={"decoded_share": 0.5}),
        "mae x 4, half decoded": Side(pretrain={"decoded_share": 0.5}, times=4, beside="mae, half decoded"),
        "emae, half decoded": _emae(beside="mae, half decoded", decoded_share=0.5),
    }
    patches = (config.model.image_size // config.model.patch) ** 2
    for parts in [k for k in range(5, 17) if patches % k == 0][:2]:  # 7 and 14, or 8 and 16
        sides |= _with_parts(parts, f", K {parts}")
        sides[f"emae, K {parts}, weight 0"] = _emae(parts, f"mae, K {parts}", consistency_weight=0.0)
    return sides


def _with_parts(parts: int, suffix: str) -> dict[str, Side]:
    mae = {"mask_ratio": 1 - 1 / parts}
    return {
        f"mae{suffix}": Side(parts, mae, beside=f"mae{suffix}"),
        f"mae x {parts}{suffix}": Side(parts, mae, times=parts, beside=f"mae{suffix}"),
        f"emae{suffix}": _emae(parts, f"mae{suffix}"),
    }


def _emae(parts: int = 4, beside: str = "mae", decoded_share: float = 1.0, **settings) -> Side:
    return Side(parts, {"method": "emae", "decoded_share": decoded_share}, {"parts": parts} | settings, beside=beside)


def config_of(model: str, dtype: str, remat: bool, side: Side = Side()) -> ConfigDict:
    """Derived settings of a side's first stage.

    `model` is 'B/16' or another published size with the published decoder; 'B/16-short', two blocks and one of these;
    or a recipe that has a variant 'small', as 'cifar10'.
    """
    if "/" in model:
        config = default()
        set_size(config, model.removesuffix("-short"))
        if model.endswith("-short"):
            config.model.depth, config.model.decoder.depth = 2, 1
    else:
        spec = importlib.util.spec_from_file_location("recipe", RESULTS.parents[1] / "configs" / f"{model}.py")
        recipe = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(recipe)
        config = recipe.get_config("small")
    config.model.update(dtype=dtype, remat=remat)
    config.pretrain.update(views=1, **side.pretrain)
    config.pretrain.emae.update(side.emae)
    derive(config, PICTURES)
    return config


def compiled_step(config: ConfigDict, batch: int, mesh: Mesh) -> tuple[jax.stages.Compiled, Callable]:
    """The step as a run compiles it, and what gives its first state."""
    assembled = assemble(config, "pretrain", PICTURES, mesh)
    step, state, shardings = compile_for(assembled, mesh, source_shapes(config, "pretrain", mesh))
    shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
    pictures = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh)),
        jax.eval_shape(lambda: pictures_of(config, batch)),
    )
    return step.lower(shapes, pictures).compile(), jax.jit(lambda: assembled.first_state({}), out_shardings=shardings)


def pictures_of(config: ConfigDict, batch: int) -> dict[str, jax.Array]:
    """A batch of noise, as the host gives it: already cropped, one view."""
    size = config.model.image_size
    image = jax.random.bits(jax.random.key(0), (batch, 1, size, size, 3), jnp.uint8)
    return {"image": image, "id": jnp.arange(batch, dtype=jnp.int32), "label": jnp.zeros(batch, jnp.int32)}


# ------------------------------------------------------------------------------------------------------------ seconds


def seconds(configs: dict[str, ConfigDict], sides: dict[str, Side], batch: int, repetitions: int, mesh: Mesh) -> dict:
    """Seconds of a step of each side, in turns, and the temporary memory of what ran."""
    programs, batches, first_state = {}, {}, None
    for name, config in configs.items():
        pictures = batch * sides[name].times
        programs[name], first_state = compiled_step(config, pictures, mesh)
        batches[name] = jax.device_put(pictures_of(config, pictures), batch_sharding(mesh))
        print(f"  {name}: compiled", flush=True)
    state = first_state()

    def run(name: str) -> float:
        nonlocal state  # parameters are the same on all sides: one state goes through all steps
        start = time.perf_counter()
        state, metrics, _ = programs[name](state, batches[name])
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - start

    for name in programs:
        run(name)
    rounds = [{name: run(name) for name in programs} for _ in range(repetitions)]
    rows = {}
    for name, program in programs.items():
        side, taken = sides[name], np.array([of[name] for of in rounds])
        beside = np.array([of[side.beside] for of in rounds])
        rows[name] = {
            "seconds": taken.tolist(),
            "median": float(np.median(taken)),
            "to_steps_of_mae": _quartiles(taken / side.sequences / beside),
            "temporary_mib": program.memory_analysis().temp_size_in_bytes / MIB,
        }
        at_once = side.beside.replace("mae", f"mae x {side.parts}", 1)
        if side.sequences == side.parts and at_once in programs:
            rows[name]["to_mae_at_once"] = _quartiles(taken / np.array([of[at_once] for of in rounds]))
    return rows


def _quartiles(x: np.ndarray) -> dict[str, float]:
    return dict(zip(("lower", "median", "upper"), np.percentile(x, (25, 50, 75)).tolist()))


def print_seconds(rows: dict) -> None:
    print(f"{'side':<24}{'median s':>10}{'to K MAE steps':>24}{'to MAE at once':>24}{'temporary MiB':>15}")
    for name, row in rows.items():
        cells = [
            f"{r['median']:.3f} ({r['lower']:.3f}–{r['upper']:.3f})" if (r := row.get(key)) else "–"
            for key in ("to_steps_of_mae", "to_mae_at_once")
        ]
        print(f"{name:<24}{row['median']:>10.4f}{cells[0]:>24}{cells[1]:>24}{row['temporary_mib']:>15.0f}")


# ------------------------------------------------------------------------------------------------------------- memory


def memory(configs: dict[str, ConfigDict], sides: dict[str, Side], batch: int, mesh: Mesh) -> dict:
    """Memory of each side's compiled step for `batch` * K and twice as many sequences."""
    rows = {}
    for name, config in configs.items():
        side, found = sides[name], []
        if side.times > 1:  # the same program as without
            continue
        for pictures in (n * batch * side.parts // side.sequences for n in (1, 2)):
            stats = compiled_step(config, pictures, mesh)[0].memory_analysis()
            found.append(
                {
                    "pictures": pictures,
                    "arguments_mib": stats.argument_size_in_bytes / MIB,
                    "temporary_mib": stats.temp_size_in_bytes / MIB,
                    "peak_mib": stats.peak_memory_in_bytes / MIB,
                }
            )
            print(f"  {name}: {pictures} pictures compiled", flush=True)
        more = found[1]["pictures"] - found[0]["pictures"]
        rows[name] = {"steps": found} | {
            f"{of}_mib_a_picture": (found[1][f"{of}_mib"] - found[0][f"{of}_mib"]) / more
            for of in ("temporary", "peak")
        }
        key = "temporary_mib_a_picture"
        rows[name]["to_mae"] = rows[name][key] / side.sequences / rows[side.beside][key]
    return rows


def print_memory(rows: dict) -> None:
    print(
        f"{'side':<24}{'pictures':>12}{'arguments MiB':>15}{'temporary MiB':>18}{'MiB a picture':>15}{'to K MAE':>10}"
    )
    for name, row in rows.items():
        less, more = row["steps"]
        print(
            f"{name:<24}{less['pictures']:>6}, {more['pictures']:>4}{more['arguments_mib']:>15.0f}"
            f"{less['temporary_mib']:>9.0f}, {more['temporary_mib']:>7.0f}{row['temporary_mib_a_picture']:>15.2f}"
            f"{row['to_mae']:>10.4f}"
        )


# ---------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", help="B/16, L/16, B/16-short, cifar10, … (default by the device)")
    parser.add_argument("--batch", type=int, help="pictures in a step (default by the model)")
    parser.add_argument("--repetitions", type=int, default=10, help="timed rounds (default 10)")
    parser.add_argument("--sides", choices=("main", "all"), default="main")
    parser.add_argument("--remat", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--memory", action="store_true", help="compile and run nothing")
    parser.add_argument("--topology", help="with --memory: a TPU that need not be there, as v5e:2x2 or v5p:2x2x1")
    arguments = parser.parse_args()
    if arguments.topology and not arguments.memory:
        parser.error("--topology needs --memory: what is not there can not run")
    if arguments.topology:
        devices = list(topologies.get_topology_desc(arguments.topology, "tpu").devices)
    else:
        devices = jax.devices()
    mesh = make_mesh(devices=devices[:1])
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    for model in arguments.model or (
        ["cifar10", "B/16-short"] if on_cpu and not arguments.memory else ["B/16", "L/16"]
    ):
        batch = arguments.batch or BATCH.get(model, 32)
        dtype = "float32" if on_cpu and not arguments.memory else "bfloat16"  # which CPUs only imitate
        sides = sides_of(config_of(model, dtype, arguments.remat), arguments.sides)
        configs = {name: config_of(model, dtype, arguments.remat, side) for name, side in sides.items()}
        print(f"{model}, {dtype}, {batch} pictures{', remat' if arguments.remat else ''}", flush=True)
        if arguments.memory:
            rows = memory(configs, sides, batch, mesh)
            print_memory(rows)
        else:
            rows = seconds(configs, sides, batch, arguments.repetitions, mesh)
            print_seconds(rows)
        entry = {"what": "memory" if arguments.memory else "seconds", "model": model, "dtype": dtype}
        entry |= {"remat": arguments.remat, "batch": batch, "sides": arguments.sides}
        keep(entry, rows, mesh, arguments.topology)


def keep(entry: dict, rows: dict, mesh: Mesh, topology: str | None) -> None:
    """Puts a model's rows in the record, in the place of those of the same entry."""
    device = mesh.devices.flat[0]
    entry["compiled_for"] = f"{device.device_kind} ({topology}), not run" if topology else device.device_kind
    path = RESULTS / f"emae_step-{'tpu-aot' if topology else device.platform}.json"
    entries = json.loads(path.read_text()) if path.is_file() else []
    entries = [old for old in entries if any(old[key] != value for key, value in entry.items())]
    machine = {
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (jax, jaxlib, np)},
        "compiler": device.client.platform_version,
    }
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps([*entries, entry | {"machine": machine, "rows": rows}], indent=2) + "\n")


if __name__ == "__main__":
    main()
