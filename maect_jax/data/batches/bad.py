"""Pictures that can not be used: noted once each in `bad_images.jsonl`, and too many of them end the run.

A data set of millions has some bad files, and a run of days must not end at one; a broken disk, or a folder of another
kind of files, must. So a bad picture gives its place to a neighbour (`samples.usable`) or, in an evaluation, is left
out, and a share of more than `LIMIT` of the set is an error.
"""

import json
import logging
import math
import threading
from pathlib import Path

from etils import epath

from maect_jax.data.batches.samples import Bad
from maect_jax.data.sources.base import Source
from maect_jax.data.sources.names import shown
from maect_jax.errors import DataError

_LOG = logging.getLogger(__name__)

POLICIES = ("error", "skip")
LIMIT = 0.001  # of the pictures of a set


class BadPictures:
    """What is done about bad pictures in one run, and which there were.

    Args:
      policy: 'error' (the first one ends the run) or 'skip'.
      limit: share of a set that may be bad.
      path: of `bad_images.jsonl`, to which a line a picture is added: data set, id, path, reason, the id that took its
        place; None = not written. Lines of earlier starts are known and not written again.

    Several loaders may note at once.
    """

    def __init__(self, policy: str = "skip", limit: float = LIMIT, path: str | Path | epath.Path | None = None):
        if policy not in POLICIES:
            raise ValueError(f"policy: {policy!r} is none of {', '.join(POLICIES)}")
        self.policy, self.limit = policy, limit
        self.path = None if path is None else epath.Path(path)
        self._where: dict[int, tuple[Source, set[str]]] = {}
        self._lock = threading.Lock()
        self._written, self._whole = self._read()

    def note(self, source: Source, bad: list[Bad]) -> None:
        """Takes what a chunk found.

        Raises:
          DataError: more than the limit of the set's pictures are bad.
        """
        if not bad:
            return
        with self._lock:
            # with the source, so that its id stays its own
            _, seen = self._where.setdefault(id(source), (source, set()))
            for picture in bad:
                seen.add(picture.where)
                if picture.where not in self._written:
                    self._written.add(picture.where)
                    self._write(source, picture)
        if len(seen) > self.limit * len(source):
            share, last = len(seen) / len(source), bad[-1]
            raise DataError(
                f"data: {len(seen)} of {len(source)} pictures of {source.name!r} can not be used: {100 * share:.3g} %, "
                f"more than {100 * self.limit:g} %; the last is {shown(last.where)}: {shown(last.reason)}. "
                + (f"All that were met are in {self.path}. " if self.path else "")
                + f"Replace them or take them out (`python -m maect_jax data verify {source.name}` lists every one), "
                f"or allow them with data.bad_limit={math.ceil(1000 * share) / 1000:g} (now {self.limit:g})"
            )

    def count(self, source: Source) -> int:
        """How many bad pictures of `source` were met."""
        return len(self._where.get(id(source), (source, ()))[1])

    def _write(self, source: Source, picture: Bad) -> None:
        taken = picture.replaced_by
        what = "is left out" if taken < 0 else f"is replaced by {shown(source.where(taken))}"
        _LOG.warning("bad picture %s (%s) %s", shown(picture.where), shown(picture.reason), what)
        if self.path is None:
            return
        line = {
            "set": source.name,
            "id": picture.sample_id,
            "path": picture.where,
            "reason": picture.reason,
            "replaced_by": picture.replaced_by if picture.replaced_by >= 0 else None,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._whole is not None:
            self.path.write_text(self._whole)
            self._whole = None
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _read(self) -> tuple[set[str], str | None]:
        """The paths that are in the file; and its whole lines, where the machine went down within the last one."""
        if self.path is None or not self.path.exists():
            return set(), None
        text = self.path.read_bytes().decode(errors="replace")
        whole = text[: text.rfind("\n") + 1]
        known = set()
        for line in whole.splitlines():
            try:
                known.add(json.loads(line)["path"])
            except (ValueError, TypeError, KeyError):
                continue
        return known, None if whole == text else whole
