"""What a packing is going to write: which pictures go into which shard, a function of the source and settings alone.

The plan is written to the new folder before the first shard, so that a packing that was stopped goes on with it, and
one of other pictures or settings is refused.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import PIL

from maect_jax.data.packing.manifest import PLAN, write_atomically
from maect_jax.data.packing.reencode import packed
from maect_jax.data.sources.base import Source
from maect_jax.errors import BadPicture, DataError

_FORMAT = "maect_jax packing 1"
MEGABYTE = 1_000_000
_LOOKED_AT = 64  # pictures of a split, from which the size of all is estimated


@dataclass(frozen=True)
class Settings:
    """How pictures are packed.

    Attributes:
      short_side: to which larger pictures are made smaller, pixels; None = all stay as they are.
      quality: of the JPEGs that are made.
      shard_mb: about how large a shard becomes, 10^6 bytes.
    """

    short_side: int | None = None
    quality: int = 92
    shard_mb: int = 256

    def facts(self) -> dict[str, str | int | None]:
        """What the bytes of the shards depend on, beside the pictures."""
        facts = {"shard_mb": self.shard_mb, "short_side": self.short_side}
        if self.short_side is not None:
            facts |= {"quality": self.quality, "encoder": f"Pillow {PIL.__version__}"}
        return facts


def plan_shards(source: Source, settings: Settings) -> list[int]:
    """First ids of the shards of a split, ascending; the size of its pictures is estimated from some of them."""
    n = len(source)
    sizes, looked_at = [], range(0, n, -(-n // _LOOKED_AT))
    for index in looked_at:
        try:
            picture, _ = source.read(index)
            sizes.append(len(packed(picture, source.where(index), settings.short_side, settings.quality).encoded))
        except BadPicture:  # whoever writes the shard decides about it
            continue
    if not sizes:
        raise DataError(
            f"{source.name}: none of {len(looked_at)} pictures can be read; `data verify` lists the bad ones"
        )
    shards = max(1, min(n, round(sum(sizes) / len(sizes) * n / (settings.shard_mb * MEGABYTE))))
    return [n * shard // shards for shard in range(shards)]


def source_facts(sources: dict[str, Source]) -> dict[str, str | int]:
    """What the bytes of the shards depend on, of the pictures."""
    counts = {f"{split} pictures": len(source) for split, source in sources.items()}
    return counts | {f"{split} fingerprint": source.fingerprint() for split, source in sources.items()}


def begin(folder: Path, sources: dict[str, Source], settings: Settings, facts: dict) -> dict[str, list[int]]:
    """First ids of the shards of each split: those of the plan in the folder, else new ones, which are written there.

    Raises:
      DataError: the plan in the folder is of other pictures or settings; says what differs.
    """
    path = folder / PLAN
    if not path.exists():
        shards = {split: plan_shards(source, settings) for split, source in sources.items()}
        write_atomically(path, json.dumps({"format": _FORMAT, "of": facts, "shards": shards}, indent=1).encode())
        return shards
    try:
        found = json.loads(path.read_bytes())
        if found["format"] != _FORMAT:
            raise ValueError(f"{found['format']!r} is another version")
        there, shards = dict(found["of"]), dict(found["shards"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged ({error}); delete {folder} and pack anew") from error
    refuse_others(folder, there, facts)
    return shards


def refuse_others(folder: Path, there: dict, here: dict) -> None:
    """Raises DataError where the packing in `folder` is of other pictures or settings than this one."""
    keys = [key for key in dict.fromkeys([*there, *here]) if there.get(key) != here.get(key)]
    if not keys:
        return
    changed = [f"{key} {_short(there.get(key))} there, {_short(here.get(key))} now" for key in keys]
    raise DataError(
        f"{folder} holds a packing of other pictures or settings ({'; '.join(changed)}); "
        "choose another folder, or delete this one"
    )


def _short(value) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)
