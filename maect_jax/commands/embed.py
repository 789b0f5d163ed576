"""Writes the features of pictures to a file, with file names and labels.

FILE.parquet has a row a picture: file_name, id, label, class and one fixed-size list of float32 a feature; FILE.npz has
arrays of these names, nothing pickled.
"""

import argparse
from collections.abc import Iterable

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet
from etils import epath

from maect_jax.commands.evaluate import (
    add_bad,
    add_instead,
    bad_pictures,
    check_counts,
    check_devices,
    data_of,
    instead_of,
    names_of,
)
from maect_jax.data.sources.base import Source
from maect_jax.data.sources.open import open_source
from maect_jax.errors import ConfigError
from maect_jax.evaluation.features import Features, elementary
from maect_jax.evaluation.suite import Place, make_task
from maect_jax.evaluation.task import Settings
from maect_jax.parallel.mesh import make_mesh
from maect_jax.terminal import use_compilation_cache
from maect_jax.training.checkpoint import absolute
from maect_jax.training.stop import StopRequest
from maect_jax.weights import RAW, open_weights

KINDS = (".parquet", ".npz")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", required=True, metavar="PATH", help="as in evaluate; of a run the last stage")
    parser.add_argument("--data", metavar="DATA", help="'digits', a folder, or a TFDS name; without it the run's own")
    parser.add_argument("--split", choices=("train", "test"), default="train", help="of the data")
    parser.add_argument("--out", required=True, metavar="FILE", help="ends in .parquet or .npz")
    feature = "cls, mean, both, cls@7, mean@last, cls@last4, or some joined with '+'; several with commas between"
    parser.add_argument("--feature", metavar="NAME,…", help=f"{feature}; without it the model's own")
    add_instead(parser)
    parser.add_argument("--batch", type=int, default=256, help="pictures at a time, over all devices")
    parser.add_argument("--workers", type=int, default=0, help="loader processes; 0 = threads")
    add_bad(parser)


def main(arguments: argparse.Namespace) -> None:
    check_counts(arguments)
    out = absolute(arguments.out)
    if out.suffix not in KINDS:
        raise ConfigError(f"--out '{arguments.out}': must end in {' or '.join(KINDS)}")
    data = data_of([arguments.weights], arguments.data, None, None)
    use_compilation_cache()
    check_devices(1, arguments.batch)
    mesh = make_mesh()
    leader = jax.process_index() == 0
    found = open_weights(arguments.weights, mesh, instead_of(arguments))
    subject = [weights for weights in found if weights.stage != RAW][-1]
    name = data.train if arguments.split == "train" else data.test
    source = open_source(name, arguments.split, channels=subject.channels, key="--data")
    names = names_of(arguments.feature) or (subject.pooling,)
    for feature in names:
        elementary(feature, subject.encoder.depth)
    out.parent.mkdir(parents=True, exist_ok=True)
    with StopRequest() as stop:
        settings = Settings(batch=arguments.batch, workers=arguments.workers)
        bad = bad_pictures(arguments, out.parent)
        place = Place(mesh, data.workdir, stop, lambda text: print(text, flush=True) if leader else None, leader, bad)
        features = make_task(subject, source, source, settings, place).features_of(source, names)
    if leader:
        write(out, source, features, names)
        print(out, flush=True)


def write(out: epath.Path, source: Source, features: Features, names: Iterable[str]) -> None:
    """Writes a row a picture; see the module's docstring."""
    files = source.file_names()
    columns = {
        "file_name": np.array([files[i] for i in features.ids]),
        "id": features.ids,
        "label": features.labels,
        "class": np.array([source.classes[label] if label >= 0 else "" for label in features.labels]),
    }
    vectors = {name: features.vectors(name) for name in names}
    temporary = out.parent / f".{out.name}.tmp"
    with temporary.open("wb") as file:
        if out.suffix == ".npz":
            np.savez(file, **columns, **vectors)
        else:
            lists = {
                name: pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1]) for name, x in vectors.items()
            }
            pa.parquet.write_table(pa.table({name: pa.array(x) for name, x in columns.items()} | lists), file)
    temporary.replace(out)
