"""TFDS data sets as a `Source`: prepared ArrayRecord files, read without TensorFlow."""

import difflib
import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import numpy as np
import tensorflow_datasets as tfds

from maect_jax.data.host.decode import threads
from maect_jax.data.sources.base import Source
from maect_jax.errors import DataError


class TfdsSource(Source):
    """One split of a prepared TFDS data set, read as ArrayRecord; pictures stay encoded until asked for.

    `labels` reads every record once, at the first use: training and evaluation batches take the label from the
    record they read anyway.
    """

    def __init__(self, name: str, directory: str, split: str, channels: int, key: str):
        self.name, self.directory, self.split, self.channels, self.key = name, directory, split, channels, key
        features = self._builder.info.features
        pictures = [k for k, v in features.items() if isinstance(v, tfds.features.Image)]
        classes = [k for k, v in features.items() if isinstance(v, tfds.features.ClassLabel)]
        if not pictures:
            raise DataError(f"{key}: TFDS {name!r} has no picture feature, only {', '.join(features)}")
        self.image_key = "image" if "image" in pictures else pictures[0]
        self.label_key = ("label" if "label" in classes else classes[0]) if classes else None
        self.classes = tuple(features[self.label_key].names) if classes else ()
        self.shape = features[self.image_key].shape
        len(self._records)  # a wrong format or split is an error now, not in a loader process

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k not in ("_builder", "_records")}

    @cached_property
    def _builder(self):
        return tfds.builder_from_directory(self.directory)

    @cached_property
    def _records(self):
        try:
            decoders = {self.image_key: tfds.decode.SkipDecoding()}
            return self._builder.as_data_source(split=self.split, decoders=decoders)
        except NotImplementedError:  # prepared as TFRecord, which has no random access
            raise DataError(
                f"{self.key}: TFDS {self.name!r} in {self.directory} is not in the array_record format; delete that "
                f"folder (or choose another data_dir) and prepare it anew:\n  {_preparation(self.name, None)}"
            ) from None

    @cached_property
    def labels(self) -> np.ndarray:
        if self.label_key is None:
            return np.full(len(self), -1, np.int32)
        with ThreadPoolExecutor(threads()) as pool:
            starts = range(0, len(self), 1024)
            return np.concatenate(list(pool.map(self._labels_from, starts)))

    def _labels_from(self, start: int) -> np.ndarray:
        stop = min(start + 1024, len(self))
        return np.array([self._records[i][self.label_key] for i in range(start, stop)], np.int32)

    def fingerprint(self) -> str:
        info = self._builder.info
        files = [(path, os.stat(path)) for path in sorted(map(str, info.splits[self.split].filepaths))]
        facts = [f"{os.path.basename(path)}\0{stat.st_size}\0{stat.st_mtime_ns}" for path, stat in files]
        return hashlib.sha256("\n".join([info.full_name, self.split, *facts]).encode()).hexdigest()

    def file_names(self) -> list[str]:
        if "file_name" not in self._builder.info.features:
            return super().file_names()
        return [os.fsdecode(self._records[i]["file_name"]) for i in range(len(self))]

    def label_sets(self) -> list[np.ndarray] | None:
        features = self._builder.info.features
        several = [
            key
            for key, feature in features.items()
            if isinstance(feature, tfds.features.Sequence) and isinstance(feature.feature, tfds.features.ClassLabel)
        ]
        if not several:
            return None
        return [np.asarray(self._records[i][several[0]], np.int64) for i in range(len(self))]

    def __len__(self) -> int:
        return len(self._records)

    def where(self, index: int) -> str:
        return f"TFDS {self.name!r}, {self.split} record {index}"

    def read(self, index: int) -> tuple[bytes, int]:
        record = self._records[index]
        return record[self.image_key], -1 if self.label_key is None else int(record[self.label_key])

    def size(self, index: int) -> tuple[int, int]:
        return self.shape[:2] if None not in self.shape[:2] else super().size(index)


def _preparation(name: str, data_dir: str | None) -> str:
    where = f", data_dir={data_dir!r}" if data_dir else ""
    return (
        'python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder({name!r}, file_format='array_record'{where}).download_and_prepare()\"\n"
        "(a few data sets need `pip install tensorflow` for this one step)"
    )


def open_tfds(name: str, split: str, channels: int, data_dir: str | None, key: str) -> TfdsSource:
    """The data set `name` as prepared in `data_dir`; arguments and errors as `open.open_source`."""
    named = re.fullmatch(r"(\w+)(?:/([\w.-]+))?(?::[\d.*]+)?", name)
    try:
        if not named:
            raise tfds.core.DatasetNotFoundError
        builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        registered = tfds.list_builders(with_community_datasets=False)
        if not named or named[1] not in registered:
            near = difflib.get_close_matches(name.lower(), registered, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(f"{key}: {name!r} is neither a folder nor a TFDS name{hint}") from None
        configs = list(tfds.builder_cls(named[1]).builder_configs)
        if named[2] and configs and named[2] not in configs:
            near = difflib.get_close_matches(named[2], configs, 1) or configs
            raise DataError(
                f"{key}: TFDS {named[1]!r} has no config {named[2]!r}; did you mean '{named[1]}/{near[0]}'?"
            ) from None
        at = data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
        raise DataError(
            f"{key}: TFDS {name!r} is not prepared in {at}; prepare it once:\n  {_preparation(name, data_dir)}"
        ) from None
    except ValueError as error:  # prepared in several data dirs
        raise DataError(f"{key}: TFDS {name!r}: {error}") from error

    splits = builder.info.splits
    directory = str(builder.data_path)
    for candidate in ("train",) if split == "train" else ("test", "validation"):
        if candidate not in splits or not splits[candidate].num_examples:
            continue
        source = TfdsSource(name, directory, candidate, channels, key)
        hidden = candidate == "test" and source.classes and source.sample(0)[1] < 0
        if hidden and "validation" in splits:  # ImageNet's test split has no labels
            continue
        return source
    raise DataError(f"{key}: TFDS {name!r} has no {split} split, only {', '.join(splits) or 'none'}")
