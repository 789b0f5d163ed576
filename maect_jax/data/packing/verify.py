"""Finds every picture of a data set that can not be used: each is read and decoded, as training would."""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from maect_jax.data.host.decode import threads
from maect_jax.data.packing.manifest import FILE, SPLITS, File, check_size, read_manifest
from maect_jax.data.packing.pool import work_on
from maect_jax.data.sources.base import Source
from maect_jax.errors import BadPicture, DataError

CHUNK = 128  # pictures that a process looks at at a time


def chunks(sources: dict[str, Source]) -> list[tuple[str, range]]:
    """(split, ids) of pieces of work that cover all pictures, in their order."""
    starts = [
        (split, start, len(source)) for split, source in sources.items() for start in range(0, len(source), CHUNK)
    ]
    return [(split, range(start, min(start + CHUNK, n))) for split, start, n in starts]


def bad_pictures(sources: dict[str, Source], workers: int) -> list[dict]:
    """What can not be used: split, id, path and reason of each, in the order of the ids.

    Args:
      sources: by split.
      workers: processes; 0 = this one alone.

    Raises:
      DataError: the pictures have another number of channels than the source.
    """
    total = sum(map(len, sources.values()))
    found = work_on(sources, _bad_of, chunks(sources), workers=workers, what="verify", total=total)
    return [bad for part in found for bad in part]


def _bad_of(sources: dict[str, Source], task: tuple[str, range], tick: Callable[[], None]) -> list[dict]:
    split, ids = task
    source, bad = sources[split], []
    for index in ids:
        tick()
        try:
            source.sample(index)
        except BadPicture as error:
            bad.append({"split": split, "id": index, "path": error.where, "reason": error.reason})
    return bad


def bad_files(folder: Path, split: str | None) -> list[dict]:
    """Files of a packed folder that are not what its manifest says: split, id (None), path and reason of each.

    Raises:
      DataError: the manifest itself is damaged.
    """
    found = read_manifest(folder).splits
    wanted = [s for s in SPLITS if s in found and split in (None, s)]
    files = [(s, file) for s in wanted for file in (*found[s].shards, found[s].labels, found[s].names)]
    with ThreadPoolExecutor(threads()) as pool:
        reasons = pool.map(lambda entry: _difference(folder, entry[1]), files)
        return [
            {"split": split, "id": None, "path": str(folder / file.file), "reason": reason}
            for (split, file), reason in zip(files, reasons)
            if reason
        ]


def _difference(folder: Path, file: File) -> str | None:
    try:
        check_size(folder, file)
        with open(folder / file.file, "rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
    except DataError as error:
        return str(error).removeprefix(f"{folder / file.file}: ")
    except OSError as error:
        return f"can not be read ({error.strerror})"
    return None if found == file.sha256 else f"SHA-256 is {found[:16]}…, {FILE} says {file.sha256[:16]}…"
