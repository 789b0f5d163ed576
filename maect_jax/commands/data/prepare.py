"""Builds a TFDS data set in the form that is read here (array_record).

`imagenet2012` is made from the two official archives, ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, which have
to lie in --manual-dir. TensorFlow is needed for few sets, and only for this step; when it is, the error says so.
"""

import argparse
import sys

from maect_jax.errors import Preempted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="TFDS name: cifar10, imagenette/320px-v2, imagenet2012, …")
    parser.add_argument("--data-dir", metavar="DIR", help="where prepared sets are kept (TFDS_DATA_DIR)")
    parser.add_argument("--manual-dir", metavar="DIR", help="files got by hand (<data-dir>/downloads/manual)")


def main(arguments: argparse.Namespace) -> None:
    import tensorflow_datasets as tfds

    from maect_jax.data.packing.prepare import prepare

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        info = prepare(arguments.name, arguments.data_dir, arguments.manual_dir)
    except KeyboardInterrupt:
        raise Preempted(f"data prepare: {arguments.name!r} is not prepared; what was downloaded is kept") from None
    counts = ", ".join(f"{name} {split.num_examples}" for name, split in info.splits.items())
    print(f"{info.full_name} in {info.data_dir}: {counts}")
