"""What an evaluation is given, and what it gives back."""

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property

import ml_dtypes
import numpy as np
from etils import epath
from jax.sharding import Mesh

from maect_jax.data.batches.bad import BadPictures
from maect_jax.data.batches.evaluation import EvaluationBatches
from maect_jax.data.sources.base import Source
from maect_jax.data.sources.subset import SubsetSource
from maect_jax.errors import DataError
from maect_jax.evaluation.cache import FeatureCache
from maect_jax.evaluation.features import Features, elementary, extract, make_extractor
from maect_jax.exchange.provenance import Provenance
from maect_jax.models.vit import ViT
from maect_jax.parallel.mesh import batch_sharding
from maect_jax.training.stop import StopRequest

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
PROBE_FROM = ("features", "images")
SEED = 0  # of every evaluation, whatever the run's: numbers of runs with other seeds compare
QUICK = ("knn", "knn_layers", "retrieval", "linear", "logreg", "ridge", "cluster", "health", "colour", "pictures")


@dataclass(frozen=True)
class Weights:
    """One encoder, read when it is asked for.

    Attributes:
      stage: its name in tables: 'pretrain', 'control', 'tune', 'tune, raw', or that of its file.
      encoder: the model.
      load: reads the parameters; may raise CheckpointError.
      pooling: 'cls' or 'mean', the feature that stands for a picture.
      mean, std: of the data it was trained on, a channel, for values in 0..1.
      resize_ratio: shorter side over picture size, before the central crop.
      channels: of the pictures, 1 or 3.
      seed: of the run; 0 for a file.
      origin: where it comes from, for the record: 'source', 'stage', 'step', 'average'.
      provenance: the same with licence and ancestors, for what is trained on it.
    """

    stage: str
    encoder: ViT
    load: Callable[[], dict]
    pooling: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize_ratio: float
    channels: int
    seed: int
    origin: dict
    provenance: Provenance = field(default_factory=Provenance)


@dataclass(frozen=True)
class Settings:
    """How an evaluation is to be done.

    Attributes:
      only: names of evaluations, in the order in which they run; see `protocols.EVALUATIONS`.
      preset: whose protocols, a key of `presets.PRESETS`.
      batch: pictures at a time in the encoder, over all devices.
      workers: loader processes; 0 = threads.
      limit: pictures that costly analyses (k-NN of each block, augmented views, colours) use at most.
      feature_dtype: that features are kept in, a key of `DTYPES`.
      probe_epochs, probe_batch: of the linear probe instead of its preset's; None = as published.
      probe_from: 'features' (cached, no augmentation) or 'images' (random crop and flip in each epoch, as published).
      finetune_epochs, finetune_batch, finetune_base_lr, finetune_ema: instead of the recipe's; None = as published,
        whose rates presuppose ImageNet's number of updates; on a few hundred pictures they hardly train.
      lists: folder of split lists; see `labelled`. '' = generated ones.
      robustness: names of further test sets, to which the linear probe is applied unchanged.
    """

    only: tuple[str, ...] = QUICK
    preset: str = "maect"
    batch: int = 256
    workers: int = 0
    limit: int = 10_000
    feature_dtype: str = "float32"
    probe_epochs: int | None = None
    probe_batch: int | None = None
    probe_from: str = "features"
    finetune_epochs: int | None = None
    finetune_batch: int | None = None
    finetune_base_lr: float | None = None
    finetune_ema: float | None = None
    lists: str = ""
    robustness: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measurement:
    """One number of an evaluation.

    Attributes:
      metric, value, unit: see `results.record.Record`.
      protocol: 'name' and every setting of the evaluation; data and transform are added by the suite.
      per_picture: what each test picture contributes, its mean being the value; None where there is no such thing.
      values: of splits, seeds or restarts, whose mean the value is; None for a single one.
      std: of `values`, or of the restarts of which this is one.
      found: what was chosen or came out beside the number.
      test: the rows of the test set it was measured on; None = the whole.
    """

    metric: str
    value: float
    protocol: dict
    unit: str = "fraction"
    per_picture: np.ndarray | None = None
    values: list[float] | None = None
    std: float | None = None
    found: dict = field(default_factory=dict)
    test: dict | None = None


@dataclass
class Task:
    """One set of weights, the data, and the means to get features of it.

    Attributes:
      weights, params: the encoder; `sha256` is the hash of its parameters.
      train, test: pictures; both with labels, of the same classes.
      others: further test sets; see `robustness`.
      bad: what is done about pictures that can not be used.
      mesh: devices.
      settings: how to evaluate.
      folder: work folder; what has to be kept (fine-tuning, figures) goes below it.
      cache: of features.
      stop: asked now and then; raises when the run is to end.
      say: prints a line, on one process.
      cached: whether all features since it was last set were read from disk.
      results: what an evaluation leaves for those after it, by name: the linear probe for other test sets, …
    """

    weights: Weights
    params: dict
    sha256: str
    train: Source
    test: Source
    others: tuple[Source, ...]
    mesh: Mesh
    settings: Settings
    folder: epath.Path
    cache: FeatureCache
    stop: StopRequest
    say: Callable[[str], None]
    leader: bool
    bad: BadPictures = field(default_factory=BadPictures)
    results: dict = field(default_factory=dict)
    cached: bool = True
    _held: dict = field(default_factory=dict, repr=False)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes

    @property
    def depth(self) -> int:
        return self.weights.encoder.depth

    @cached_property
    def stage_folder(self) -> str:
        """The stage's name where it stands in a file name."""
        return "".join(c if c.isalnum() or c in "-_" else "_" for c in self.weights.stage)

    def check(self) -> None:
        """Raises when the run is to end."""
        self.stop.raise_if_requested(f"while evaluating '{self.weights.stage}'; finished numbers are in results.jsonl")

    def feature(self, name: str) -> str:
        """A preset's feature as one of this model: 'configured' is what its model stands for a picture by."""
        return name.replace("configured", self.weights.pooling)

    def features(self, names: Iterable[str], limit: int | None = None) -> tuple[Features, Features]:
        """(training, test) features that hold every one of `names`; from memory, from disk, or extracted.

        `limit`: of at most so many pictures of each set, always the same ones.
        """
        return tuple(self.features_of(source, names, limit) for source in (self.train, self.test))

    def features_of(self, source: Source, names: Iterable[str], limit: int | None = None) -> Features:
        """The features of any other set of pictures; see `features`."""
        parts = tuple(dict.fromkeys(part for name in names for part in elementary(name, self.depth)))
        limit = limit if limit is not None and limit < len(source) else None
        _, held = self._held.get((id(source), limit), (source, None))
        missing = tuple(part for part in parts if held is None or part not in held.parts)
        if missing:
            new = self._read_or_extract(source, missing, limit)
            held = (
                new if held is None else Features(held.parts | new.parts, new.labels, new.ids, new.content, new.depth)
            )
            self._held[(id(source), limit)] = source, held  # with the source, so that its id stays its own
        return held

    def leave_out_bad(self) -> dict[str, int]:
        """Encodes every set once; from then on each holds only its pictures that can be used, with new ids.

        So rows of features are rows of the set, and what trains on pictures meets no bad one.

        Returns:
          how many are left out of 'train' and 'test'.
        """
        before = len(self.train), len(self.test)
        self.train, self.test = self._usable(self.train), self._usable(self.test)
        self.others = tuple(self._usable(source) for source in self.others)
        return {"train": before[0] - len(self.train), "test": before[1] - len(self.test)}

    def _usable(self, source: Source) -> Source:
        features = self.features_of(source, [self.weights.pooling])
        if len(features.ids) == len(source):
            return source
        if not len(features.ids):
            raise DataError(f"data: no picture of '{source.name}' can be used")
        rest = SubsetSource(source, features.ids)
        ids = np.arange(len(rest), dtype=np.int32)
        self._held[(id(rest), None)] = rest, dataclasses.replace(features, ids=ids)
        return rest

    def batches(self, source: Source, limit: int | None = None):
        """Every picture once, cropped as the protocol says; see `data.batches.evaluation`."""
        return EvaluationBatches(
            source,
            batch=self.settings.batch,
            image_size=self.weights.encoder.image_size,
            sharding=batch_sharding(self.mesh),
            resize_ratio=self.weights.resize_ratio,
            limit=limit,
            workers=self.settings.workers,
            bad=self.bad,
        )

    def transform(self) -> dict:
        """How a picture becomes the encoder's input, for the record."""
        weights = self.weights
        return {
            "image_size": weights.encoder.image_size,
            "resize_ratio": round(weights.resize_ratio, 6),
            "resize": "bicubic, antialiased, shorter side; central crop",
            "mean": [round(x, 6) for x in weights.mean],
            "std": [round(x, 6) for x in weights.std],
        }

    def shape(self) -> dict:
        """What the encoder computes beside its weights: no shape tells the heads."""
        encoder = self.weights.encoder
        return {
            name: getattr(encoder, name) for name in ("width", "depth", "heads", "patch", "image_size", "mlp_ratio")
        }

    def dtypes(self) -> dict:
        """Types of the encoder's computation and of the kept features, for the record."""
        return {"compute": np.dtype(self.weights.encoder.dtype).name, "features": self.settings.feature_dtype}

    def _read_or_extract(self, source: Source, parts: tuple[str, ...], limit: int | None) -> Features:
        key = {
            "weights": self.sha256,
            "encoder": self.shape(),
            "data": source.fingerprint(),
            "limit": limit,
            "transform": self.transform(),
            "channels": source.channels,
            "dtypes": self.dtypes(),
        }

        def from_pictures(missing: tuple[str, ...]) -> Features:
            began, count = time.perf_counter(), min(limit or len(source), len(source))
            weights = self.weights
            extractor = make_extractor(weights.encoder, missing, weights.mean, weights.std, self.mesh)
            batches, dtype = self.batches(source, limit), DTYPES[self.settings.feature_dtype]
            found = extract(extractor, self.params, batches, self.depth, self.check, dtype)
            seconds = time.perf_counter() - began
            self.say(f"evaluate {weights.stage:9} {count:,} pictures of {source.name} encoded in {seconds:.1f} s")
            return found

        found, hit = self.cache.features(key, parts, self.depth, from_pictures)
        self.cached &= hit
        return found


def data_hash(features: Features) -> str:
    """SHA-256 of the pictures and labels behind the features, in their order."""
    digest = hashlib.sha256(np.ascontiguousarray(features.content))
    digest.update(np.ascontiguousarray(features.labels))
    return digest.hexdigest()
