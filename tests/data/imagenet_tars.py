"""A miniature of ImageNet's official archives: the same layout and names, some pictures of some classes.

  ILSVRC2012_img_train.tar   a tar for each class, n01440764.tar, which holds n01440764_18.JPEG …
  ILSVRC2012_img_val.tar     ILSVRC2012_val_00000001.JPEG …, from the first on

Among the real training pictures one is a PNG named .JPEG and 22 are in CMYK; both are here under a real name of theirs.
The labels of the validation pictures are in no archive: TFDS brings them along in the order of the file names, so that
the first pictures have the labels that the devkit gives them.
"""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

PNG = "n02105855_2933.JPEG"
CMYK = "n01739381_1309.JPEG"
# class: (index among the 1,000 sorted ones, files)
TRAIN = {
    "n01440764": (0, ["n01440764_18.JPEG", "n01440764_36.JPEG", "n01440764_37.JPEG", "n01440764_39.JPEG"]),
    "n01739381": (59, ["n01739381_12.JPEG", CMYK, "n01739381_40.JPEG"]),
    "n02105855": (230, ["n02105855_2.JPEG", "n02105855_2933.JPEG", "n02105855_31.JPEG"]),
    "n15075141": (999, ["n15075141_54.JPEG", "n15075141_60.JPEG"]),
}
# of the first validation pictures, as everybody's list of ILSVRC2012 has them
VALIDATION_LABELS = (65, 970, 230, 809, 516, 57)


def smooth(seed: int, height: int = 60, width: int = 80) -> np.ndarray:
    """A picture of slow colour waves, uint8 [height, width, 3], another one for each seed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width][..., None]
    phase, fx, fy = rng.uniform(0, 6, 3), rng.uniform(0.02, 0.1, 3), rng.uniform(0.02, 0.1, 3)
    return np.round(127.5 + 100 * np.sin(phase + fx * x + fy * y)).astype(np.uint8)


def picture(name: str) -> bytes:
    """The file that the miniature holds under this name."""
    image = Image.fromarray(smooth(sum(name.encode())))
    encoded = io.BytesIO()
    if name == PNG:
        image.save(encoded, "PNG")
    else:
        image.convert("CMYK" if name == CMYK else "RGB").save(encoded, "JPEG", quality=92)
    return encoded.getvalue()


def validation_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08}.JPEG"


def write_archives(folder: Path) -> None:
    """Both archives into `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as train:
        for synset, (_, names) in TRAIN.items():
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as of_class:
                for name in names:
                    _add(of_class, name, picture(name))
            _add(train, f"{synset}.tar", inner.getvalue())
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as validation:
        for number in range(len(VALIDATION_LABELS), 0, -1):  # the official one is in no order either
            _add(validation, validation_name(number), picture(validation_name(number)))


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
