"""Checkpoints: logical arrays and a JSON item, saved asynchronously, restored on any number of devices.

"Step n" means that n batches were seen and batch n is next. A later save never touches the newest good checkpoint, and
one that can not be read gives way to the one before it.
"""

import json
import logging
import os
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.serialization import from_state_dict, to_state_dict

from maect_jax.errors import CheckpointError

_LOG = logging.getLogger(__name__)

SCHEMA = 1


def absolute(folder: str | epath.Path) -> epath.Path:
    """The folder by its full path, as Orbax needs it; addresses such as gs://… stay as they are."""
    return epath.Path(folder if "://" in str(folder) else os.path.abspath(folder))


class Checkpoints:
    """The checkpoints of one stage, in a folder of their own.

    Args:
      folder: made when missing.
      keep: how many of the newest stay.
      keep_every: a checkpoint at every multiple of this many updates stays for good; 0 = none.
    """

    def __init__(self, folder: str | epath.Path, keep: int = 2, keep_every: int = 0):
        self.folder = absolute(folder)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=max(keep, 1), keep_period=keep_every or None, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state: Any, meta: dict) -> None:
        """Starts to save `state` (a tree of arrays) and `meta` (JSON); returns when the arrays are copied."""
        if step in self._manager.all_steps():
            return
        tree = _without_empty(to_state_dict(state))
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(tree), meta=ocp.args.JsonSave(meta | {"schema": SCHEMA, "step": step})
        )
        self._manager.save(step, args=items)

    def wait(self) -> None:
        """Returns when every save is complete; raises what went wrong in one."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Completes pending saves and lets go of the folder."""
        self._manager.close()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, newest first."""
        return sorted(self._manager.all_steps(read=True), reverse=True)

    def restore(self, like: Any, shardings: Any) -> tuple[Any, dict] | None:
        """The newest readable checkpoint as (state, meta), or None when there is none.

        Args:
          like: tree of arrays or shapes of the current state.
          shardings: tree of shardings with the same structure, of the current devices.

        Raises:
          CheckpointError: it is of another architecture, or none of several can be read.
        """
        failures, damaged = [], []
        for step in self.steps():
            try:
                saved = self._saved_tree(step)
                compare_trees(saved, _without_empty(to_state_dict(like)), f"{self.folder}/{step}")
                found = self._read(step, like, shardings)
                self._set_aside(damaged)
                return found
            except CheckpointError:
                raise
            except Exception as error:  # whatever a damaged file makes of itself: try the one before
                damaged.append(step)
                failures.append(f"{self.folder}/{step}: {str(error).splitlines()[0] if str(error) else error!r}")
                _LOG.warning("checkpoint %s can not be read; trying the one before", failures[-1])
        if failures:
            raise CheckpointError(
                "no checkpoint of this stage can be read:\n  " + "\n  ".join(failures) + "\nRestore the folder from a "
                "copy, or remove it to train the stage again."
            )
        return None

    def _set_aside(self, steps: list[int]) -> None:
        """Renames checkpoints that can not be read, so that training may save these steps again."""
        for step in steps:
            aside = self.folder / f"damaged-{step}"
            if aside.exists():
                aside.rmtree()
            (self.folder / str(step)).rename(aside)
        if steps:
            self._manager.reload()

    def _read(self, step: int, like: Any, shardings: Any) -> tuple[Any, dict]:
        abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), like, shardings
        )
        tree = _without_empty(to_state_dict(abstract))
        items = ocp.args.Composite(state=ocp.args.StandardRestore(tree), meta=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=items)
        return from_state_dict(like, _with_empty(to_state_dict(like), restored["state"])), restored["meta"]

    def _saved_tree(self, step: int) -> dict:
        """Shapes of a checkpoint's arrays, as nested dicts."""
        return saved_tree(self.folder / str(step))


def saved_tree(folder: epath.Path) -> dict:
    """Nested dicts of shape-and-dtype leaves of the checkpoint in `folder` (a step's folder)."""
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(folder / "state")
    tree = getattr(metadata, "item_metadata", metadata)
    return getattr(tree, "tree", tree)


def read_arrays(
    folder: epath.Path, parts: tuple[str, ...], sharding: jax.sharding.Sharding, mend: str = "give another checkpoint"
) -> dict:
    """Some parts of a checkpoint's state, whatever its architecture, as nested dicts of arrays.

    Args:
      folder: a step's folder.
      parts: names at the top of the state, such as 'params'; those it does not have come back as {}.
      sharding: of every array.
      mend: what the error advises.

    Raises:
      CheckpointError: it can not be read.
    """
    try:
        tree = saved_tree(folder)
        wanted = {part: tree[part] for part in parts if part in tree}
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), wanted)
        with ocp.PyTreeCheckpointer() as checkpointer:
            restore = ocp.args.PyTreeRestore(
                item=abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True
            )
            found = checkpointer.restore(folder / "state", restore)
    except Exception as error:
        raise CheckpointError(f"{folder}: can not be read ({error}); {mend}") from error
    return {part: found.get(part, {}) for part in parts}


def read_meta(folder: epath.Path) -> dict:
    """The JSON item of the checkpoint in `folder` (a step's folder); {} where it has none.

    Raises:
      CheckpointError: it is damaged.
    """
    path = folder / "meta" / "metadata"
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise CheckpointError(f"{path}: is damaged ({error}); give another checkpoint") from None


def newest_step_folder(stage_folder: epath.Path) -> epath.Path | None:
    """Folder of the newest complete checkpoint of a stage, or None."""
    folder = stage_folder / "checkpoints"
    if not folder.is_dir():
        return None
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit() and (path / "meta").exists()]
    return folder / str(max(steps)) if steps else None


def write_json(path: epath.Path, content: dict) -> None:
    """Writes a JSON file in one step: a reader sees the old or the new one, never a part."""
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


def _without_empty(tree: Any) -> Any:
    """The tree without empty dicts and Nones, which hold no arrays and are not saved."""
    if not isinstance(tree, dict):
        return tree
    kept = {name: _without_empty(child) for name, child in tree.items()}
    return {
        name: child for name, child in kept.items() if child is not None and not (isinstance(child, dict) and not child)
    }


def _with_empty(template: Any, tree: Any) -> Any:
    """`tree` with the empty parts of `template` put back."""
    if not isinstance(template, dict):
        return tree
    return {name: _with_empty(child, tree[name]) if name in tree else child for name, child in template.items()}


def _shapes(tree: Any, prefix: str = "") -> dict[str, tuple]:
    if isinstance(tree, dict):
        return {k: v for name, child in tree.items() for k, v in _shapes(child, f"{prefix}/{name}").items()}
    return {prefix[1:]: (tuple(tree.shape), str(np.dtype(tree.dtype)))}


def compare_trees(saved: dict, wanted: dict, where: str) -> None:
    """Raises CheckpointError with a table when names, shapes or types of two nested dicts of arrays differ."""
    have, want = _shapes(saved), _shapes(wanted)
    rows = [
        f"  {name}: checkpoint {have.get(name, 'nothing')}, this run {want.get(name, 'nothing')}"
        for name in sorted(have.keys() | want.keys())
        if have.get(name) != want.get(name)
    ]
    if rows:
        more = f"\n  … and {len(rows) - 8} more" if len(rows) > 8 else ""
        raise CheckpointError(
            f"{where} is of another architecture; {len(rows)} arrays differ:\n" + "\n".join(rows[:8]) + more + "\nUse "
            "the model settings it was made with, or another --workdir."
        )
