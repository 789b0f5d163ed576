"""Folders, archives of one class each, and the folders inside an archive, as the trees in which `layout` looks."""

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import groupby
from pathlib import Path

from maect_jax.data.host.decode import threads
from maect_jax.data.sources.archives import ArchiveSource, Part
from maect_jax.data.sources.folder import FolderSource
from maect_jax.data.sources.layout import SPLIT_FOLDERS, Tree, is_picture, is_unread
from maect_jax.data.sources.members import ARCHIVES, Members, index, refuse_compressed
from maect_jax.data.sources.names import HIDDEN
from maect_jax.errors import DataError

_LOG = logging.getLogger(__name__)


def tree_at(path: Path) -> Tree | None:
    """What lies at `path`: a folder, an archive, or the archive of that name without its ending; None for neither.

    Raises:
      DataError: an archive of a kind that is not read; two archives of one name.
    """
    if path.is_file():
        refuse_compressed(path)
        return _unwrapped(ArchiveTree(path)) if path.name.lower().endswith(ARCHIVES) else None
    if not path.is_dir():
        archive = archives_in(path.parent).get(path.name) if path.parent.is_dir() else None
        return archive and _unwrapped(ArchiveTree(archive))
    return ClassArchives(path) if set(archives_in(path)) - _SPLITS and not holds_pictures(path) else FolderTree(path)


def holds_pictures(folder: Path) -> bool:
    """Whether there is any picture file in a folder, in the folders of its classes or splits, or in those below."""
    tree = FolderTree(folder)
    return bool(tree.loose()) or any(map(tree.below, tree.folders()))


def archives_in(folder: Path) -> dict[str, Path]:
    """The archives directly in a folder by their names without ending, sorted.

    Raises:
      DataError: two of one name.
    """
    found: dict[str, Path] = {}
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        stem, ending = os.path.splitext(entry.name)
        if ending.lower() in ARCHIVES and not stem.startswith(HIDDEN) and entry.is_file():
            if stem in found:
                raise DataError(f"{str(folder)!r} has both {found[stem].name} and {entry.name}; take one of them out")
            found[stem] = Path(entry.path)
    return found


class FolderTree(Tree):
    """A folder on disk; a handle is a path relative to it."""

    def __init__(self, path: Path):
        self.path, self._path = str(path), path
        self._unread: set[str] = set()

    def folders(self) -> list[str]:
        return sorted(e.name for e in os.scandir(self._path) if e.is_dir() and not e.name.startswith(HIDDEN))

    def loose(self) -> list[str]:
        return sorted(self._pictures([e.name for e in os.scandir(self._path) if e.is_file()]))

    def below(self, folder: str) -> list[str]:
        """Relative paths, sorted; nested folders and links are followed, once each."""
        found, seen = [], set()
        for at, subfolders, files in os.walk(self._path / folder, followlinks=True):
            real = os.path.realpath(at)
            subfolders[:] = [] if real in seen else [s for s in subfolders if not s.startswith(".")]
            files = [] if real in seen else files
            seen.add(real)
            found += self._pictures(files, os.path.relpath(at, self._path))
        return sorted(found)

    def _pictures(self, files: list[str], folder: str = "") -> list[str]:
        """Relative paths of the pictures among the files of a folder; those of kinds that are not read are noted."""
        self._unread.update(os.path.join(folder, f) for f in files if is_unread(f))
        return [os.path.join(folder, f) for f in files if is_picture(f)]

    def unread(self) -> list[str]:
        return sorted(self._unread)

    def folder(self, name: str) -> Tree | None:
        return tree_at(self._path / name)

    def training_set(self) -> Tree | None:
        return _training_set_beside(self._path.parent, self._path.name)

    def explain_empty(self) -> None:
        for path in sorted(self._path.iterdir()):
            refuse_compressed(path)

    def source(self, name, handles, labels, classes, channels) -> FolderSource:
        if beside := set(archives_in(self._path)) - _SPLITS:
            _LOG.warning("%d archives beside the pictures of %s are left out", len(beside), self.path)
        return FolderSource(name, self._path, handles, labels, classes, channels)


class ClassArchives(FolderTree):
    """A folder of archives, one a class; a handle is (class, row of the member)."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._archives = {stem: file for stem, file in archives_in(path).items() if stem not in _SPLITS}

    @cached_property
    def _members(self) -> dict[str, Members]:
        """The list of each archive; not made where only the classes are asked for."""
        with ThreadPoolExecutor(threads()) as pool:
            return dict(zip(self._archives, pool.map(index, self._archives.values())))

    def folders(self) -> list[str]:
        return list(self._archives)

    def loose(self) -> list:
        return []

    def below(self, folder: str) -> list[tuple[str, int]]:
        return [(folder, row) for row in range(len(self._members[folder]))]

    def unread(self) -> list[str]:
        return [f"{stem}/{name}" for stem, members in self._members.items() for name in members.unread]

    def source(self, name, handles, labels, classes, channels) -> ArchiveSource:
        parts = []
        for stem, several in groupby(handles, lambda handle: handle[0]):
            members = self._members[stem].rows([row for _, row in several])
            parts.append(Part(self._archives[stem], members, folder=f"{stem}/"))
        return ArchiveSource(name, parts, labels, classes, channels)


class ArchiveTree(Tree):
    """A folder inside an archive, at first the outermost; a handle is the row of a member."""

    def __init__(self, file: Path, members: Members | None = None, inside: str = "", rows: list[int] | None = None):
        self._file, self._inside = file, inside
        self._members = index(file) if members is None else members
        self.path = f"{file}:{inside}" if inside else str(file)
        self._loose: list[int] = []
        self._folders: dict[str, list[int]] = {}
        for row in range(len(self._members)) if rows is None else rows:
            top, slash, _ = self._members.names[row][len(inside) :].partition("/")
            (self._folders.setdefault(top, []) if slash else self._loose).append(row)

    def folders(self) -> list[str]:
        return sorted(self._folders)

    def loose(self) -> list[int]:
        return self._loose

    def below(self, folder: str) -> list[int]:
        return self._folders[folder]

    def unread(self) -> list[str]:
        return [name for name in self._members.unread if name.startswith(self._inside)]

    def folder(self, name: str) -> "ArchiveTree | None":
        rows = self._folders.get(name)
        return rows and ArchiveTree(self._file, self._members, f"{self._inside}{name}/", rows)

    def training_set(self) -> Tree | None:
        return None if self._inside else _training_set_beside(self._file.parent, self._file.stem)

    def source(self, name, handles, labels, classes, channels) -> ArchiveSource:
        part = Part(self._file, self._members.rows(handles), inside=self._inside)
        return ArchiveSource(name, [part], labels, classes, channels)

    @property
    def stem(self) -> str:
        """The archive's name without its ending."""
        return self._file.stem


_SPLITS = {name for names in SPLIT_FOLDERS.values() for name in names}


def _unwrapped(tree: ArchiveTree) -> ArchiveTree:
    """Without the folder that holds all the others and says no more than the name of the archive does."""
    while len(tree.folders()) == 1 and not tree.loose():
        (only,) = tree.folders()
        inner = tree.folder(only)
        if only != tree.stem and (only in _SPLITS or not inner.folders()):
            break
        tree = inner
    return tree


def _training_set_beside(folder: Path, name: str) -> Tree | None:
    return FolderTree(folder).split("train") if name in SPLIT_FOLDERS["test"] else None
