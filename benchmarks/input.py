"""Pictures a second from JPEGs to two-view crops: ours beside torchvision, tf.data and bare decoding, on one CPU.

    python -m benchmarks.input [--pictures 400] [--seconds 8] [--repetitions 5] [--tensorflow-python PATH]
    python -m benchmarks.input --memory

The pictures are made for the purpose: 500x375, quality 92, 4:2:0, with the spectrum and the file size of ImageNet's.
Every side is a process that measures when its turn comes, so that other work on the machine meets all alike; what is
compared are medians. A rate 'a core' is pictures by CPU seconds of one process with one thread on one core. A rate of
'all cores' is given twice: pictures by seconds, and pictures by CPU seconds of all its processes, times the cores,
which is what a machine without other work would reach if no core waits. tf.data runs in a Python of its own (TensorFlow
and PyTorch do not live in one process, and neither is needed by ours); without one its rows say so. 'records' are the
same pictures packed with `python -m maect_jax data pack … --short-side 256`. Linux only.

--memory: the memory of the streamed pipeline and its loader processes over 100,000 small pictures instead.

Writes `benchmarks/results/input-<cores>-cores.json`, or `input-memory.json`.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import simplejpeg

ROOT = Path(__file__).parents[1]
PEERS, RESULTS = Path(__file__).parent / "peers", Path(__file__).parent / "results"
HEIGHT, WIDTH, QUALITY, CLASSES = 375, 500, 92, 4
RATES = ("core", "all", "all by CPU")
TARGETS = (  # name, side, the side it is divided by (of several the fastest), least ratio
    ("a core, of torchvision", "ours, a core", ("torchvision, a core",), 1.5),
    ("a core, of tf.data", "ours, a core", ("tf.data, a core, decode once", "tf.data, a core, decode twice"), 3),
    ("all cores, of bare simplejpeg", "ours, processes", ("bare simplejpeg, all cores",), 0.85),
    ("all cores, threads, of bare simplejpeg", "ours, threads", ("bare simplejpeg, all cores",), 0.85),
    ("all cores, of bare Pillow", "ours, processes", ("bare Pillow, all cores",), 0.85),
    ("a core, of bare simplejpeg", "ours, a core", ("bare simplejpeg, a core",), None),
    ("all cores, of torchvision", "ours, processes", ("torchvision, all cores",), None),
    (
        "all cores, of tf.data",
        "ours, processes",
        ("tf.data, all cores, decode once", "tf.data, all cores, decode twice"),
        None,
    ),
    ("records of originals, a core", "ours, records, a core", ("ours, a core",), 2),
    ("records of originals, all cores", "ours, records, processes", ("ours, processes",), 2),
)


class Side:
    """A process that measures when asked, see `peers/serving.py`."""

    def __init__(self, name: str, script: str, folder: Path, mode: str, python: str = sys.executable):
        # timm's way of the tests: torchvision beside a PyTorch of another build
        paths = [str(ROOT), str(ROOT / "tests" / "site"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"}
        if python != sys.executable:
            environment.pop("PYTHONPATH")
        command = [python, str(PEERS / script), "--folder", str(folder), "--mode", mode]
        self.name, self.errors = name, tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        self.about = self._answer()

    def ask(self, seconds: float) -> dict:
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process; it stops by itself when nobody asks any more."""
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            said = self.errors.read().strip().splitlines() or ["nothing"]
            raise RuntimeError(f"{self.name}: {said[-1]}")
        return json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=400, help="that are made (default 400)")
    parser.add_argument("--seconds", type=float, default=8, help="of a side in one repetition (default 8)")
    parser.add_argument("--repetitions", type=int, default=5, help="of every side, by turns (default 5)")
    parser.add_argument("--tensorflow-python", help="a Python that imports TensorFlow")
    parser.add_argument("--memory", action="store_true", help="measure memory over 100,000 pictures instead")
    given = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        if given.memory:
            memory(Path(temporary))
        else:
            speed(Path(temporary), given)


def speed(folder: Path, given: argparse.Namespace) -> None:
    sizes = write_pictures(folder / "pictures", given.pictures, HEIGHT, WIDTH)
    sides, missing = start_sides(folder, given.tensorflow_python)
    turns: dict[str, list[dict]] = {side.name: [] for side in sides}
    for repetition in range(given.repetitions):
        for side in sides:
            try:
                turns[side.name].append(side.ask(given.seconds))
            except RuntimeError as error:
                raise SystemExit(str(error)) from error
        print(f"repetition {repetition + 1} of {given.repetitions} is done", flush=True)
    for side in sides:
        side.close()
    microseconds = [turn["microseconds"] for turn in turns.pop("profile")]
    rows = {name: summary(name, of_side) for name, of_side in turns.items()}
    result = {
        "machine": machine() | {k: v for side in sides for k, v in side.about["versions"].items()},
        "settings": {
            "pictures": given.pictures,
            "height": HEIGHT,
            "width": WIDTH,
            "mean_bytes": round(statistics.mean(sizes)),
            "seconds": given.seconds,
            "repetitions": given.repetitions,
            "load_average": os.getloadavg()[1],  # beyond the cores, others work here: look at the rates by CPU
        },
        "rows": rows,
        "not_measured": missing,
        "ratios": ratios(rows),
        "profile_microseconds": {
            part: round(statistics.median(m[part] for m in microseconds), 1) for part in microseconds[0]
        },
        "turns": turns,
    }
    report(result)
    (RESULTS / f"input-{os.cpu_count()}-cores.json").write_text(json.dumps(result, indent=2) + "\n")


def start_sides(folder: Path, tensorflow_python: str | None) -> tuple[list[Side], dict[str, str]]:
    """Every side that can be measured here, and why the others can not."""
    pictures, records = folder / "pictures", folder / "records"
    tensorflow = tensorflow_python or sys.executable
    wanted = [
        ("ours, a core", "maect_input.py", pictures, "core", sys.executable),
        ("torchvision, a core", "torchvision_input.py", pictures, "core", sys.executable),
        ("tf.data, a core, decode once", "tfdata_input.py", pictures, "core-once", tensorflow),
        ("tf.data, a core, decode twice", "tfdata_input.py", pictures, "core-twice", tensorflow),
        ("bare simplejpeg, a core", "decode_input.py", pictures, "core-simplejpeg", sys.executable),
        ("ours, threads", "maect_input.py", pictures, "threads", sys.executable),
        ("bare simplejpeg, all cores", "decode_input.py", pictures, "all-simplejpeg", sys.executable),
        ("ours, processes", "maect_input.py", pictures, "processes", sys.executable),
        ("bare Pillow, all cores", "decode_input.py", pictures, "all-pillow", sys.executable),
        ("torchvision, all cores", "torchvision_input.py", pictures, "all", sys.executable),
        ("tf.data, all cores, decode once", "tfdata_input.py", pictures, "all-once", tensorflow),
        ("tf.data, all cores, decode twice", "tfdata_input.py", pictures, "all-twice", tensorflow),
        ("ours, records, a core", "maect_input.py", records, "core", sys.executable),
        ("ours, records, processes", "maect_input.py", records, "processes", sys.executable),
        ("profile", "maect_input.py", pictures, "core-profile", sys.executable),
    ]
    sides, missing = [], {}
    unpacked = pack(pictures, records)
    for name, script, of, mode, python in wanted:
        if of is records and unpacked:
            missing[name] = unpacked
            continue
        try:
            sides.append(Side(name, script, of, mode, python))
        except RuntimeError as error:
            if script == "maect_input.py":
                raise SystemExit(str(error)) from error
            missing[name] = str(error).removeprefix(f"{name}: ")
    return sides, missing


def pack(source: Path, target: Path) -> str | None:
    """Packs the pictures with the shorter side 256; why that did not work, or None."""
    command = [sys.executable, "-m", "maect_jax", "data", "pack", str(source), str(target), "--short-side", "256"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = (done.stderr or done.stdout).strip().splitlines() or ["nothing"]
    return f"data pack: {said[-1]}" if done.returncode else None


def write_pictures(folder: Path, n: int, height: int, width: int) -> list[int]:
    """n JPEGs in train/<class>/; their sizes in bytes."""
    sizes = []
    for i in range(n):
        encoded = simplejpeg.encode_jpeg(picture(i, height, width), quality=QUALITY, colorsubsampling="420")
        path = folder / "train" / f"class{i % CLASSES}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded)
        sizes.append(len(encoded))
    return sizes


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """uint8 [h, w, 3]: amplitudes fall as 1/f, as in photographs, brightness and two smoother fields of colour."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf

    def noise(slope):
        waves = rng.standard_normal((2, *frequency.shape))
        values = np.fft.irfft2((waves[0] + 1j * waves[1]) * frequency**-slope, (height, width))
        return values / values.std()

    bright, red_cyan, blue_yellow = noise(1.1), noise(1.3), noise(1.3)
    colours = np.stack(
        [bright + 0.45 * red_cyan, bright - 0.2 * red_cyan + 0.2 * blue_yellow, bright - 0.45 * blue_yellow], axis=2
    )
    return np.clip(110 + 48 * colours, 0, 255).astype(np.uint8)


def summary(name: str, turns: list[dict]) -> dict:
    """Median rates of a side."""
    per_cpu_second = statistics.median(turn["pictures"] / turn["cpu_seconds"] for turn in turns)
    if "a core" in name:
        return {"core": round(per_cpu_second, 1)}
    per_second = statistics.median(turn["pictures"] / turn["seconds"] for turn in turns)
    return {"all": round(per_second, 1), "all by CPU": round(per_cpu_second * os.cpu_count(), 1)}


def ratios(rows: dict[str, dict]) -> dict[str, dict]:
    """What the targets are about, of the sides that were measured."""
    found = {}
    for name, ours, others, least in TARGETS:
        measured = [rows[other] for other in others if other in rows]
        if ours in rows and measured:
            found[name] = {rate: round(rows[ours][rate] / max(o[rate] for o in measured), 3) for rate in rows[ours]}
            found[name] |= {} if least is None else {"target": least}
    return found


def report(result: dict) -> None:
    """Prints the tables."""
    settings = result["settings"]
    print(f"{settings['pictures']} JPEGs {WIDTH}x{HEIGHT}, {settings['mean_bytes']} bytes, {os.cpu_count()} cores")
    print(f"\n{'images a second, median':42}{'a core':>12}{'all cores':>12}{'by CPU':>12}")
    for name, row in result["rows"].items():
        print(f"{name:42}" + cells(row, "12.0f"))
    for name, why in result["not_measured"].items():
        print(f"{name:42}  not measured: {why}")
    print(f"\n{'ratio':42}{'a core':>12}{'all cores':>12}{'by CPU':>12}{'target':>12}")
    for name, row in result["ratios"].items():
        print(f"{name:42}" + cells(row, "12.2f") + f"{row.get('target', ''):>12}")
    print("\nµs a picture, one core")
    for name, value in result["profile_microseconds"].items():
        print(f"{name:42}{value:12.1f}")


def cells(row: dict, form: str) -> str:
    return "".join(format(row[rate], form) if rate in row else " " * 12 for rate in RATES)


def memory(folder: Path) -> None:
    """Memory of the streamed pipeline with its processes over 100,000 pictures of 96x96."""
    write_pictures(folder / "pictures", 512, 96, 96)
    rows = {}
    for mode in ("threads", "processes"):
        side = Side(mode, "maect_input.py", folder / "pictures", f"memory-{mode}")
        rows[mode] = side.ask(0)
        side.close()
        taken = [(pictures, held) for pictures, held in rows[mode]["bytes"] if pictures >= 20_000]
        rows[mode]["growth_per_picture"] = round(np.polyfit(*zip(*taken), 1)[0], 1)  # of a line through all of them
        print(f"{mode}: {rows[mode]['growth_per_picture']} bytes a picture from 20,000 to 100,000")
        for pictures, held in rows[mode]["bytes"]:
            print(f"{pictures:10} pictures {held / 1e6:10.1f} MB")
    (RESULTS / "input-memory.json").write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")


def machine() -> dict:
    return {
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    main()
