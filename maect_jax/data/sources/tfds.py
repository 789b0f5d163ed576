"""TFDS data sets as a `Source`: prepared ArrayRecord files, read without TensorFlow."""

import difflib
import hashlib
import logging
import os
import re
import shlex
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from maect_jax.data.host.decode import threads
from maect_jax.data.sources.base import Source
from maect_jax.data.sources.kept import Arrays, cache_folder, kept
from maect_jax.data.sources.shards import Shards
from maect_jax.errors import BadPicture, DataError

_LOG = logging.getLogger(__name__)

KEPT_FROM = 10_000  # records, from which on what is found by reading them all is kept on disk
_ROWS = 256  # records that a thread looks through at a time


class TfdsSource(Source):
    """One split of a prepared TFDS data set; pictures stay encoded until asked for.

    A record is a `tf.train.Example`, of which only the picture and its label are taken. `labels`, `file_names` and
    `label_sets` need all records; they are read once and kept (`kept.kept`). Training and evaluation batches take the
    label from the record they read anyway.

    Args:
      name: as the user gave it.
      info: of the prepared set, which is in the array_record format.
      split: of the set.
      channels: of the decoded pictures.
      key: the setting that errors name.

    Raises:
      DataError: no picture among the features; a shard that can not be opened.
    """

    def __init__(self, name: str, info: tfds.core.DatasetInfo, split: str, channels: int, key: str):
        self.name, self.split, self.channels = name, split, channels
        features = info.features
        pictures = [k for k, v in features.items() if isinstance(v, tfds.features.Image)]
        classes = [k for k, v in features.items() if isinstance(v, tfds.features.ClassLabel)]
        several = [
            k
            for k, v in features.items()
            if isinstance(v, tfds.features.Sequence) and isinstance(v.feature, tfds.features.ClassLabel)
        ]
        if not pictures:
            raise DataError(f"{key}: TFDS {name!r} has no picture feature, only {', '.join(features)}")
        self.image_key = "image" if "image" in pictures else pictures[0]
        self.label_key = ("label" if "label" in classes else classes[0]) if classes else None
        self.name_key = "file_name" if "file_name" in features else None
        self.several_key = several[0] if several else None
        self.classes = tuple(features[self.label_key].names) if classes else ()
        self.shape = features[self.image_key].shape
        if features[self.image_key].np_dtype not in (np.uint8, np.uint16):
            kind = np.dtype(features[self.image_key].np_dtype)
            raise DataError(f"{key}: pictures of TFDS {name!r} are {kind}; only 8 and 16 bit integers are taken")
        self.full_name = info.full_name
        self.shards = Shards([str(path) for path in info.splits[split].filepaths], info.splits[split].shard_lengths)

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_columns"}  # loaders need no names

    def __len__(self) -> int:
        return len(self.shards)

    def where(self, index: int) -> str:
        return self.shards.where(index)

    def read(self, index: int) -> tuple[bytes, int]:
        features = self._features(index)
        try:
            return features[self.image_key].bytes_list.value[0], self._label(features, index)
        except IndexError:
            raise BadPicture(
                self.where(index), f"has no {self.image_key!r} or no label", "prepare the set anew"
            ) from None

    def size(self, index: int) -> tuple[int, int]:
        return self.shape[:2] if None not in self.shape[:2] else super().size(index)

    def fingerprint(self) -> str:
        files = [(path, os.stat(path)) for path in self.shards.paths]
        facts = [f"{os.path.basename(path)}\0{stat.st_size}\0{stat.st_mtime_ns}" for path, stat in files]
        return hashlib.sha256("\n".join([self.full_name, self.split, *facts]).encode()).hexdigest()

    @property
    def labels(self) -> np.ndarray:
        return np.full(len(self), -1, np.int32) if self.label_key is None else self._columns["label"]

    def file_names(self) -> list[str]:
        if self.name_key is None:
            return super().file_names()
        return [os.fsdecode(name) for name in _parts(self._columns, "name")]

    def label_sets(self) -> list[np.ndarray] | None:
        return None if self.several_key is None else _parts(self._columns, "several")

    # ------------------------------------------------------------------------------------------------ records

    def _features(self, index: int):
        try:
            return tf_example_pb2.Example.FromString(self.shards.read(index)).features.feature
        except DecodeError as error:
            raise BadPicture(self.where(index), "not a tf.train.Example", "prepare the set anew") from error

    def _label(self, features, index: int) -> int:
        if self.label_key is None:
            return -1
        label = features[self.label_key].int64_list.value[0]
        if not -1 <= label < len(self.classes):  # -1: not published
            reason = f"label {label} of {len(self.classes)} classes"
            raise BadPicture(self.where(index), reason, "prepare the set anew")
        return label

    @cached_property
    def _columns(self) -> Arrays:
        """'label' int32 [n]; of 'name' (uint8) and 'several' (int64) all values joined, and '<key>_end' int64 [n].

        A record that can not be read has label -1, an empty name and no labels; 'bad' int64 [.] are their ids. Whoever
        wants its picture meets the error, and the policy for bad pictures decides.
        """
        if len(self) < KEPT_FROM:
            return self._read_columns()
        path = cache_folder() / "labels" / f"{self.fingerprint()}.npz"
        return kept(path, self._read_columns, self._fits)

    def _read_columns(self) -> Arrays:
        if len(self) >= KEPT_FROM:
            _LOG.warning("the labels of TFDS %r lie in its %d records, which are read once", self.name, len(self))
        with ThreadPoolExecutor(threads()) as pool:
            parts = list(pool.map(self._columns_from, range(0, len(self), _ROWS)))
        columns = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        if (bad := columns["bad"]).size:
            first = self.where(int(bad[0]))
            _LOG.warning("%d records of TFDS %r have no readable label; the first is %s", len(bad), self.name, first)
        return columns | {key: np.cumsum(columns[key]) for key in columns if key.endswith("_end")}

    def _columns_from(self, start: int) -> Arrays:
        """The columns of up to _ROWS records, but with lengths for ends."""
        labels, names, several, bad = [], [], [], []
        for index in range(start, min(start + _ROWS, len(self))):
            label, name, several_labels = -1, b"", ()
            try:
                features = self._features(index)
                label = self._label(features, index)
                name = features[self.name_key].bytes_list.value[0] if self.name_key else b""
                several_labels = features[self.several_key].int64_list.value if self.several_key else ()
            except (BadPicture, IndexError):
                bad.append(index)
            labels.append(label)
            names.append(name)
            several.append(several_labels)
        return {
            "label": np.array(labels, np.int32),
            "name": np.frombuffer(b"".join(names), np.uint8),
            "name_end": np.array([len(name) for name in names], np.int64),
            "several": np.array([label for row in several for label in row], np.int64),
            "several_end": np.array([len(row) for row in several], np.int64),
            "bad": np.array(bad, np.int64),
        }

    def _fits(self, columns: Arrays) -> bool:
        """Whether they can be those of this set, and all records were readable; only such ones are kept."""
        labels = columns["label"]
        if columns["bad"].size or labels.dtype != np.int32 or labels.shape != (len(self),):
            return False
        if labels.min() < -1 or labels.max() >= max(len(self.classes), 1):
            return False
        for key, dtype in (("name", np.uint8), ("several", np.int64)):
            values, ends = columns[key], columns[f"{key}_end"]
            if (values.dtype, values.ndim, ends.dtype, ends.shape) != (dtype, 1, np.int64, (len(self),)):
                return False
            if (np.diff(ends, prepend=0) < 0).any() or len(values) != ends[-1]:
                return False
        return True


def _parts(columns: Arrays, key: str) -> list:
    """The value of each record: bytes of a name, int64 [labels] of several labels."""
    values, ends = columns[key], columns[f"{key}_end"].tolist()
    parts = [values[start:end] for start, end in zip([0, *ends], ends)]
    return [part.tobytes() for part in parts] if key == "name" else parts


# ------------------------------------------------------------------------------------------------- finding a data set


def data_folder(data_dir: str | None) -> Path:
    """Where TFDS keeps prepared sets: as given, else TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def preparation(name: str, data_dir: str | None) -> str:
    """The command that prepares a set."""
    where = f" --data-dir {shlex.quote(data_dir)}" if data_dir else ""
    return f"python -m maect_jax data prepare {shlex.quote(name)}{where}"


def check_name(name: str, key: str) -> None:
    """Whether TFDS knows how to make a set of that name ('set', 'set/config', 'set/config:version').

    Raises:
      DataError: it does not; with the nearest name it knows.
    """
    named = re.fullmatch(r"(\w+)(?:/([\w.-]+))?(?::[\d.*]+)?", name)
    registered = tfds.list_builders(with_community_datasets=False)
    if not named or named[1] not in registered:
        near = difflib.get_close_matches(name.lower(), registered, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(f"{key}: {name!r} is neither a folder nor a TFDS name{hint}")
    configs = list(tfds.builder_cls(named[1]).builder_configs)
    if named[2] and configs and named[2] not in configs:
        near = difflib.get_close_matches(named[2], configs, 1) or configs
        raise DataError(f"{key}: TFDS {named[1]!r} has no config {named[2]!r}; did you mean '{named[1]}/{near[0]}'?")


def open_tfds(name: str, split: str, channels: int, data_dir: str | None, key: str) -> TfdsSource:
    """The data set `name` as prepared in `data_dir`; arguments and errors as `open.open_source`."""
    info = _description(name, data_dir, key)
    if info.file_format != tfds.core.FileFormat.ARRAY_RECORD:  # TFRecord, say, has no random access
        raise DataError(
            f"{key}: TFDS {name!r} in {info.data_dir} is not in the array_record format; delete that folder "
            f"(or choose another data_dir) and prepare it anew: {preparation(name, data_dir)}"
        )
    splits = info.splits
    for candidate in ("train",) if split == "train" else ("test", "validation"):
        if candidate not in splits or not splits[candidate].num_examples:
            continue
        source = TfdsSource(name, info, candidate, channels, key)
        if candidate == "test" and "validation" in splits and _is_hidden(source):
            continue
        return source
    raise DataError(f"{key}: TFDS {name!r} has no {split} split, only {', '.join(splits) or 'none'}")


def _description(name: str, data_dir: str | None, key: str) -> tfds.core.DatasetInfo:
    """What the JSON files beside the shards say."""
    try:
        if not re.fullmatch(r"[\w./:*-]+", name):
            raise tfds.core.DatasetNotFoundError
        info = tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir).info
        for split in info.splits.values():
            split.filepaths  # noqa: B018 - made now, so that a wrong pattern is an error now
        return info
    except tfds.core.DatasetNotFoundError:
        check_name(name, key)
        raise DataError(
            f"{key}: TFDS {name!r} is not prepared in {data_folder(data_dir)}; prepare it once: "
            f"{preparation(name, data_dir)}"
        ) from None
    except Exception as error:  # prepared in several data dirs; or TFDS can not read its own files
        text = " ".join(str(error).split())
        raise DataError(
            f"{key}: TFDS {name!r} can not be opened ({text[:300]}); mend that or prepare it anew"
        ) from error


def _is_hidden(source: TfdsSource) -> bool:
    """Whether labels are not published, as those of ImageNet's test split; by the first record that can be read."""
    for index in range(len(source) if source.classes else 0):
        try:
            return source.read(index)[1] < 0
        except BadPicture:
            continue
    return False
