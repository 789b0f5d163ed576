"""The room that loaders write batches into: who may write when, what another process sees, and what is left behind."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from maect_jax.data.batches.slots import SLOTS, Column, Slots, room
from maect_jax.data.batches.training import training_batches
from maect_jax.data.sources.base import ArraySource
from maect_jax.errors import DataError
from maect_jax.parallel.mesh import batch_sharding, make_mesh

LAYOUT = {"image": Column((4, 3, 3), "uint8"), "id": Column((4,), "int32"), "valid": Column((4,), "bool")}


@pytest.fixture
def slots():
    made = Slots(LAYOUT, first=7)
    yield made
    made.stop()
    made.close()


def test_batches_in_use_share_no_byte(slots):
    for step in range(7, 7 + SLOTS):
        for number, column in enumerate(slots.batch(step).values()):
            column[...] = (step + number) % 2 if column.dtype == bool else step + number
    for step in range(7, 7 + SLOTS):
        columns = slots.batch(step)
        assert {name: (x.shape, x.dtype.name) for name, x in columns.items()} == {
            "image": ((4, 3, 3), "uint8"),
            "id": ((4,), "int32"),
            "valid": ((4,), "bool"),
        }
        assert (columns["image"] == step).all() and (columns["id"] == step + 1).all()
        assert (columns["valid"] == (step % 2 == 1)).all()


def test_a_loader_waits_until_its_slot_is_free_and_no_longer(slots):
    assert all(slots.wait(step) for step in range(7, 7 + SLOTS))
    written = threading.Event()

    def write():
        assert slots.wait(7 + SLOTS)
        written.set()

    thread = threading.Thread(target=write)
    thread.start()
    assert not written.wait(0.2), "batch 7 is not read"
    slots.free(7)
    assert written.wait(10)
    thread.join()


def test_stopping_sends_waiting_loaders_away_also_when_a_batch_is_freed_after_it(slots):
    slots.stop()
    slots.free(7)
    assert not slots.wait(8) and not slots.wait(1000)


def write_in_process(slots: Slots, step: int) -> None:
    assert slots.wait(step)
    slots.batch(step)["id"][:] = [3, 1, 4, 1]


def test_what_another_process_writes_is_seen_here(slots):
    process = multiprocessing.get_context("spawn").Process(target=write_in_process, args=(slots, 8))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert slots.batch(8)["id"].tolist() == [3, 1, 4, 1]


def test_a_process_that_comes_too_late_is_told_even_if_another_file_has_the_number_now():
    early = Slots(LAYOUT, 0)
    pickled = pickle.dumps(early)
    early.stop()
    early.close()
    another = Slots(LAYOUT, 0)
    try:
        with pytest.raises(FileNotFoundError):
            pickle.loads(pickled)
    finally:
        another.close()


def test_many_rooms_leave_no_open_file_behind():
    def files():
        return len(os.listdir("/proc/self/fd"))

    before = files()
    for _ in range(50):
        made = Slots(LAYOUT, 0)
        pickle.loads(pickle.dumps(made)).batch(0)
        made.stop()
        made.close()
    assert files() <= before + 1


def test_room_in_ordinary_memory_has_the_same_layout():
    columns = room(LAYOUT)
    assert columns["image"].shape == (4, 3, 3) and columns["valid"].dtype == np.bool_


SCRIPT = """
import sys, time
sys.path.insert(0, {root!r})
import numpy as np, jax
from PIL import Image
from maect_jax.data.batches.training import training_batches
from maect_jax.data.sources.base import ArraySource
from maect_jax.parallel.mesh import batch_sharding, make_mesh

if __name__ == "__main__":
    source = ArraySource("memory", np.zeros((32, 8, 8, 3), np.uint8))
    batches = training_batches(source, batch=8, seed=0, start_step=0, views=1, image_size=8, crop_scale=(0.2, 1.0),
                               sharding=batch_sharding(make_mesh()), workers=2, resident_limit=0)
    next(batches)
    print("ready", flush=True)
    time.sleep(600)
"""


def children(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                status = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(status[1]) == parent and status[0] != "Z":
                found.append(int(entry.name))
    return found


def start(folder: Path) -> subprocess.Popen:
    """A program that has its first batch and waits."""
    script = folder / "run.py"
    script.write_text(SCRIPT.format(root=str(Path(__file__).parents[2])))
    return subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)


def loaders_of(process: subprocess.Popen) -> list[int]:
    """Its loader processes, once it has its first batch."""
    assert process.stdout.readline() == "ready\n"
    found = [child for child in children(process.pid) if b"spawn_main" in cmdline(child)]
    assert len(found) >= 2
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked up in /proc")
def test_loaders_end_with_a_main_process_that_is_killed(tmp_path):
    process = start(tmp_path)
    try:
        loaders = loaders_of(process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    until = time.monotonic() + 30
    while (alive := [loader for loader in loaders if b"spawn_main" in cmdline(loader)]) and time.monotonic() < until:
        time.sleep(0.1)
    assert not alive


def cmdline(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def test_loaders_do_not_hear_what_asks_the_program_to_stop(tmp_path):
    """A signal of a terminal or a job goes to all its processes, and the main one still needs its loaders."""
    process = start(tmp_path)
    try:
        loaders = loaders_of(process)
        for loader in loaders:
            status = Path(f"/proc/{loader}/status").read_text()
            blocked = int(next(line for line in status.splitlines() if line.startswith("SigBlk")).split()[1], 16)
            assert all(blocked >> (number - 1) & 1 for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))
        os.kill(loaders[0], signal.SIGTERM)
        time.sleep(0.5)
        assert b"spawn_main" in cmdline(loaders[0])
    finally:
        process.kill()
        process.wait()


class Unsendable(Exception):
    def __reduce__(self):
        raise TypeError("not to be sent")


class Failing(ArraySource):
    """A set that dies or fails in a way of its own at its picture 5."""

    def __init__(self, how: str):
        super().__init__("failing", np.zeros((32, 8, 8, 3), np.uint8))
        self.how = how

    def read(self, index):
        if index == 5 and self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 5:
            raise Unsendable("odd")
        return super().read(index)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [("killed", DataError, r"a loader process was killed.*lower data\.workers \(now 1\)"), ("odd", Exception, "odd")],
)
def test_a_loader_that_dies_or_fails_oddly_ends_the_run_with_a_reason(how, error, message):
    batches = training_batches(Failing(how), batch=32, seed=0, start_step=0, views=1, image_size=8,
                               crop_scale=(0.2, 1.0), sharding=batch_sharding(make_mesh(devices=jax.devices()[:1])),
                               workers=1, resident_limit=0)  # fmt: skip
    try:
        with pytest.raises(error, match=message):
            next(batches)
    finally:
        batches.close()
