"""A data set as pictures by index: the one interface that training, evaluation and packing read."""

import hashlib

import numpy as np

from maect_jax.data.host.decode import decode, open_picture


class Source:
    """Pictures by index, each read by itself. Subclasses are picklable, so that loader processes can hold one.

    The sample id is the index. It is stable: the same files give the same ids on every machine and in every run,
    because the order of an epoch, the random crops, the support queue and the evaluators know a picture by it.

    A subclass gives `__len__`, `read`, `where`, `labels` and `fingerprint`.

    Attributes:
      name: what the user called it.
      classes: class names by index; () when unlabelled.
      labels: int32 [n]; -1 when unlabelled.
      channels: of every picture.
    """

    name: str
    classes: tuple[str, ...]
    labels: np.ndarray
    channels: int

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int) -> tuple[bytes | np.ndarray, int]:
        """(picture, label) by one read: the encoded bytes, or pixels uint8 [h, w, c] where the set holds pixels.

        Raises:
          BadPicture: it can not be read; other pictures may.
        """
        raise NotImplementedError

    def where(self, index: int) -> str:
        """What an error calls the picture: its path, or archive and member, or shard and record."""
        return f"{self.name}/{index}"

    def sample(self, index: int) -> tuple[np.ndarray, int]:
        """(pixels uint8 [h, w, c], label). Raises BadPicture when the picture can not be read or decoded."""
        picture, label = self.read(index)
        return decode(picture, self.channels, self.where(index)), label

    def image(self, index: int) -> np.ndarray:
        """Pixels, uint8 [h, w, c]. Raises as `sample`."""
        return self.sample(index)[0]

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) in pixels, from the header alone where the form has one."""
        picture = open_picture(self.read(index)[0], self.channels, self.where(index))
        return picture.height, picture.width

    def digest(self) -> str:
        """What the sample ids depend on, as a short text: another digest, other pictures behind the ids."""
        return f"{len(self)} pictures"

    def fingerprint(self) -> str:
        """Another text whenever a picture or label may have changed; found without decoding, for what is cached."""
        raise NotImplementedError

    def file_names(self) -> list[str]:
        """A name for each picture, in the order of the ids: its file where it has one, else '<set>/<id>'."""
        return [f"{self.name}/{index}" for index in range(len(self))]

    def label_sets(self) -> list[np.ndarray] | None:
        """All right labels of each picture, where a picture may have several or none; None where it has just one."""
        return None


class ArraySource(Source):
    """Pictures that are in memory already: images uint8 [n, h, w, c], labels int32 [n] or None."""

    def __init__(self, name: str, images: np.ndarray, labels: np.ndarray | None = None, classes=()):
        self.name, self.images, self.classes = name, images, tuple(classes)
        self.labels = np.full(len(images), -1, np.int32) if labels is None else np.asarray(labels, np.int32)
        self.channels = images.shape[3]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], int(self.labels[index])

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.images.shape}".encode())
        digest.update(np.ascontiguousarray(self.images))
        digest.update(np.ascontiguousarray(self.labels))
        return digest.hexdigest()
