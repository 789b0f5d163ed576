"""Files of torch.save's form, honest and hostile, and what reading them must keep to."""

import sys
import zipfile

import pytest

from maect_jax.errors import CheckpointError
from maect_jax.exchange.pth import read_pth

torch = pytest.importorskip("torch", reason="PyTorch writes the files that these tests read")


def saved(path, content, **options):
    torch.save(content, path / "weights.pth", **options)
    return path / "weights.pth"


def crafted(path, program: bytes, storages=None, *, packing=zipfile.ZIP_STORED, **others):
    """A file of torch.save's form around any pickle."""
    with zipfile.ZipFile(path / "crafted.pth", "w", packing) as archive:
        archive.writestr("archive/data.pkl", program)
        for key, content in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", content)
        for name, content in others.items():
            archive.writestr(f"archive/{name}", content)
    return path / "crafted.pth"


def refusal(path) -> str:
    """The sentence with which a file is refused: one line that names it."""
    with pytest.raises(CheckpointError) as error:
        read_pth(path)
    text = str(error.value)
    assert text.startswith(f"{path}: ") and "\n" not in text and text.isprintable()
    return text


WATCHED = {"os.system", "subprocess.Popen", "os.posix_spawn", "os.exec", "os.fork", "pickle.find_class"}
events: list[str] | None = None  # of Python's audit, while a test listens


def listen(event, _):
    if events is not None and (event in WATCHED or event.startswith("socket.")):
        events.append(event)


sys.addaudithook(listen)


def attempt(path) -> bool:
    """Whether a hostile file was read; if not, it was refused in one line. Nothing was run or unpickled meanwhile."""
    global events
    events = []
    try:
        assert isinstance(read_pth(path), dict)
        return True
    except CheckpointError as error:
        assert str(error).startswith(f"{path}: ") and str(error).isprintable()
        return False
    finally:
        heard, events = events, None
        assert heard == []
