"""Real pictures for tests: the archives in the folder `data` of MAECT_SHARED, or of `shared` beside the checkout."""

import os
import tarfile
from pathlib import Path

import pytest

ARCHIVES = {"cifar10": "cifar10-part1.tar.gz", "imagenette96": "imagenette96.tar.gz"}
SIDES = {"cifar10": 32, "imagenette96": 96}  # all pictures are square


def first_pictures(name: str, classes: int, each: int) -> list[tuple[str, str, bytes]]:
    """(class, file name, encoded) of some training pictures, by class and then by name as a folder's ids are.

    Skips the test when the archive is absent.
    """
    beside = Path(__file__).resolve().parents[3] / "shared"
    path = Path(os.environ.get("MAECT_SHARED", beside)) / "data" / ARCHIVES[name]
    if not path.is_file():
        pytest.skip(f"real pictures not found: set MAECT_SHARED to the folder that holds 'data/{ARCHIVES[name]}'")
    found: dict[str, list[tuple[str, str, bytes]]] = {}
    with tarfile.open(path, "r:gz") as archive:
        for member in archive:
            _, split, class_name, file = ["", "", "", *member.name.split("/")][-4:]
            pictures = found.setdefault(class_name, [])
            if member.isreg() and split == "train" and len(pictures) < each:
                pictures.append((class_name, file, archive.extractfile(member).read()))
            if sum(len(pictures) == each for pictures in found.values()) == classes:
                break
    full = sorted(class_name for class_name, pictures in found.items() if len(pictures) == each)
    return [picture for class_name in full for picture in sorted(found[class_name])]
