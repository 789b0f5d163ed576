"""What the sides of `benchmarks.input` have in common: each is a process that measures when it is asked to.

So that repetitions of all sides can take turns without paying for their imports each time. Standard library only,
because a side may run in another environment.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator

BATCH, SIZE = 64, 224
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, that everyone writes
WARM = 1.5  # seconds before the clock starts: what was loaded ahead between two turns is used up


def arguments(description: str, modes: tuple[str, ...]) -> argparse.Namespace:
    """--folder, --mode and --cores of a side; a side of one core stays on one."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--folder", required=True, help="with pictures in train/<class>/")
    parser.add_argument("--mode", required=True, choices=modes)
    given = parser.parse_args()
    given.cores = os.cpu_count()
    if given.mode.startswith("core") and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    return given


def files(folder: str) -> list[str]:
    """All JPEGs of a folder, sorted."""
    found = [os.path.join(at, name) for at, _, names in os.walk(folder) for name in names if name.endswith(".jpg")]
    return sorted(found)


def processes() -> list[int]:
    """This process and all below it (Linux)."""
    found = [os.getpid()]
    for process in found:
        for task in os.listdir(f"/proc/{process}/task"):
            with open(f"/proc/{process}/task/{task}/children") as file:
                found += map(int, file.read().split())
    return found


def cpu_seconds() -> float:
    """What this process and those below it, which must still live, have used of the processor."""
    total = time.process_time()
    for process in processes()[1:]:
        with open(f"/proc/{process}/stat") as file:
            user, system = file.read().rpartition(")")[2].split()[11:13]
        total += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return total


def serve(measure: Callable[[float], dict], **about) -> None:
    """Says what this side is, then answers each line of standard input (seconds) with a line of JSON."""
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(float(line))), flush=True)


def measured(batches: Iterator[int]) -> Callable[[float], dict]:
    """Takes batches for some seconds; each item is how many pictures a batch has."""

    def measure(seconds: float) -> dict:
        until = time.perf_counter() + WARM
        while time.perf_counter() < until:
            next(batches)
        began, cpu, pictures = time.perf_counter(), cpu_seconds(), 0
        while time.perf_counter() < began + seconds:
            pictures += next(batches)
        return {
            "pictures": pictures,
            "seconds": time.perf_counter() - began,
            "cpu_seconds": cpu_seconds() - cpu,
        }

    return measure
