"""Writes pictures in the forms in which data sets come, by the standard library and pyarrow, not by this project."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

Picture = tuple[str, str, bytes]  # class, file name, encoded


def tar(path: Path, members: list[tuple[str, bytes]], form=tarfile.PAX_FORMAT) -> Path:
    """A tar of (name, content)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in members:
            facts = tarfile.TarInfo(name)
            facts.size = len(content)
            archive.addfile(facts, io.BytesIO(content))
    return path


def zipped(path: Path, members: list[tuple[str, bytes]], method=zipfile.ZIP_DEFLATED) -> Path:
    """A zip of (name, content)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def by_class(pictures: list[Picture]) -> dict[str, list[tuple[str, bytes]]]:
    """(file name, encoded) of each class."""
    found: dict[str, list[tuple[str, bytes]]] = {}
    for class_name, name, encoded in pictures:
        found.setdefault(class_name, []).append((name, encoded))
    return found


def class_numbers(pictures: list[Picture]) -> dict[str, int]:
    """Class -> its place in alphabetical order."""
    return {name: i for i, name in enumerate(sorted({class_name for class_name, _, _ in pictures}))}


def write_folder(root: Path, pictures: list[Picture]) -> str:
    for class_name, name, encoded in pictures:
        path = root / "train" / class_name / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded)
    return str(root)


def write_flat_folder(root: Path, pictures: list[Picture]) -> str:
    root.mkdir()
    for number, (_, name, encoded) in enumerate(pictures):
        (root / f"{number:03}{Path(name).suffix}").write_bytes(encoded)
    return str(root)


def write_tar_per_class(root: Path, pictures: list[Picture]) -> str:
    for class_name, members in by_class(pictures).items():
        tar(root / "train" / f"{class_name}.tar", members)
    return str(root)


def write_zip_per_class(root: Path, pictures: list[Picture]) -> str:
    for class_name, members in by_class(pictures).items():
        zipped(root / "train" / f"{class_name}.zip", members)
    return str(root)


def write_one_zip(root: Path, pictures: list[Picture]) -> str:
    members = [(f"photos/train/{class_name}/{name}", encoded) for class_name, name, encoded in pictures]
    return str(zipped(root / "photos.zip", members))


def write_one_tar(root: Path, pictures: list[Picture]) -> str:
    members = [(f"./{class_name}/{name}", encoded) for class_name, name, encoded in pictures]
    return str(tar(root / "photos.tar", members))


def write_webdataset(root: Path, pictures: list[Picture], shard: int = 25) -> str:
    numbers = class_numbers(pictures)
    for start in range(0, len(pictures), shard):
        members = []
        for i, (class_name, name, encoded) in enumerate(pictures[start : start + shard], start):
            members.append((f"{i:06}{Path(name).suffix}", encoded))
            members.append((f"{i:06}.cls", f"{numbers[class_name]}\n".encode()))
        tar(root / f"train-{start // shard:06}.tar", members)
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in numbers))
    return str(root)


def write_parquet(root: Path, pictures: list[Picture], rows: int = 25, group: int = 10) -> str:
    numbers = class_numbers(pictures)
    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(numbers), "_type": "ClassLabel"},
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    (root / "data").mkdir(parents=True)
    count = -(-len(pictures) // rows)
    for i in range(count):
        part = pictures[i * rows : (i + 1) * rows]
        images = [{"bytes": encoded, "path": f"{class_name}-{name}"} for class_name, name, encoded in part]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = pa.table({"image": pa.array(images, kind), "label": [numbers[class_name] for class_name, _, _ in part]})
        path = root / "data" / f"train-{i:05}-of-{count:05}.parquet"
        pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=group)
    return str(root)


# What test_every_source compares; each takes a folder that is not there yet and pictures in the order of a folder's ids
LABELLED = {
    "folder": write_folder,
    "tar per class": write_tar_per_class,
    "zip per class": write_zip_per_class,
    "one zip": write_one_zip,
    "one tar": write_one_tar,
    "WebDataset": write_webdataset,
    "Parquet": write_parquet,
}
UNLABELLED = {"flat folder": write_flat_folder}
