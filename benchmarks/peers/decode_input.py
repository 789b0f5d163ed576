"""Bare decoding to RGB, a process a core and nothing else; one side of `benchmarks.input`."""

import io
import multiprocessing
import time
from importlib.metadata import version

import serving
import simplejpeg
from PIL import Image


def with_simplejpeg(encoded: bytes) -> None:
    simplejpeg.decode_jpeg(encoded, "RGB")


def with_pillow(encoded: bytes) -> None:
    Image.open(io.BytesIO(encoded)).load()


DECODERS = {"simplejpeg": with_simplejpeg, "pillow": with_pillow}
_pictures: list[bytes] = []


def load(names: list[str]) -> None:
    for name in names:
        with open(name, "rb") as file:
            _pictures.append(file.read())


def decode(decoder: str, barrier, seconds: float, answers) -> None:
    """Decodes from memory until the time is over; answers (pictures, CPU seconds)."""
    one, done = DECODERS[decoder], 0
    for encoded in _pictures[:16]:
        one(encoded)
    barrier.wait()
    began, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() < began + seconds:
        one(_pictures[done % len(_pictures)])
        done += 1
    answers.put((done, time.perf_counter() - began, time.process_time() - cpu))


def main() -> None:
    given = serving.arguments(__doc__, tuple(f"{cores}-{name}" for cores in ("core", "all") for name in DECODERS))
    cores, decoder = given.mode.split("-")
    processes = 1 if cores == "core" else given.cores
    load(serving.files(f"{given.folder}/train"))
    context = multiprocessing.get_context("fork")  # shares the pictures

    def measure(seconds: float) -> dict:
        barrier, answers = context.Barrier(processes), context.SimpleQueue()
        children = [context.Process(target=decode, args=(decoder, barrier, seconds, answers)) for _ in range(processes)]
        for child in children:
            child.start()
        found = [answers.get() for _ in children]
        for child in children:
            child.join()
        return {
            "pictures": sum(done for done, _, _ in found),
            "seconds": max(wall for _, wall, _ in found),
            "cpu_seconds": sum(cpu for _, _, cpu in found),
        }

    serving.serve(measure, versions={package: version(package) for package in ("simplejpeg", "pillow")})


if __name__ == "__main__":
    main()
