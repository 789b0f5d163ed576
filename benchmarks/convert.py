"""Conversion of a ViT-L on a CPU: time and memory of `python -m maect_jax convert`, beside PyTorch by hand.

    python -m benchmarks.convert

Each case is a process of its own. 'seconds' is from its start to its end, imports, compilation and the proof included
(once without the proof, too). 'anonymous' is the peak of memory that is not a page of some file, sampled; 'resident'
the kernel's own peak, which counts the pages of mapped weights files as well. Both are also given as multiples of the
weights file. 'by hand' is what a PyTorch user writes to bring the same encoder from MAE's file to timm's: `torch.load`,
a strict `load_state_dict`, `safetensors.torch.save_file`, and one forward pass of two pictures as the only check.
Weights are random. Writes `benchmarks/results/convert.json`.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from maect_jax.exchange.mapping import to_layout
from maect_jax.models.mae import Decoder, MaskedAutoencoder
from maect_jax.models.vit import SIZES, ViT

RESULT = Path(__file__).parent / "results" / "convert.json"
PACKAGES = ("jax", "jaxlib", "numpy", "safetensors", "torch", "timm", "transformers", "onnx", "onnxruntime")
CASES = (  # name, weights, form, further options
    ("MAE .pth to timm", "encoder.pth", "timm", ()),
    ("MAE .pth to timm, no proof", "encoder.pth", "timm", ("--no-proof",)),
    ("timm to MAE names", "timm", "mae", ()),
    ("MAE full .pth to ViTMAE", "full.pth", "hf-vitmae", ()),
    ("ViTMAE to MAE names", "hf-vitmae", "mae", ()),
    ("MAE .pth to ONNX", "encoder.pth", "onnx", ()),
)
BY_HAND = """
import sys
import timm
import torch
from safetensors.torch import save_file
state = torch.load(sys.argv[1], weights_only=True)["model"]
model = timm.create_model("vit_large_patch16_224", num_classes=0).eval()
model.load_state_dict(state, strict=True)
with torch.no_grad():
    model(torch.zeros(2, 3, 224, 224))
save_file(model.state_dict(), sys.argv[2])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="L/16", choices=tuple(SIZES), help="of the encoder (default L/16)")
    size = parser.parse_args().size
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_official(folder, size)
        for name, weights, form, options in CASES:
            out = folder / form
            out = out if not out.exists() else folder / f"{form} again"
            convert = [sys.executable, "-m", "maect_jax", "convert", "--to", form, "--weights", str(folder / weights)]
            rows.append(measured(name, [*convert, "--out", str(out), *options], folder / weights))
        if size == "L/16":
            arguments = [
                sys.executable,
                "-c",
                BY_HAND,
                str(folder / "encoder.pth"),
                str(folder / "by_hand.safetensors"),
            ]
            rows.append(measured("MAE .pth to timm, by hand", arguments, folder / "encoder.pth"))
    report(size, rows)


def write_official(folder: Path, size: str) -> None:
    """encoder.pth and full.pth in the form of MAE's released files, with random weights."""
    import torch

    shape = SIZES[size]
    encoder = ViT(shape.width, shape.depth, shape.heads, shape.patch, 224)
    n, values = encoder.grid**2, 3 * shape.patch**2
    model = MaskedAutoencoder(encoder, Decoder(512, 8, 16, encoder.grid, values))
    key, order = jax.random.key(0), jnp.arange(n)[None]
    shapes = jax.eval_shape(lambda: model.init(key, jnp.zeros((1, n // 4, values)), order)["params"])
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda x: 0.02 * rng.standard_normal(x.shape, np.float32), shapes)
    for name, part in (("encoder", {"encoder": tree["encoder"]}), ("full", tree)):
        tensors = to_layout(part, f"mae_official_{name}", patch=shape.patch, grid=encoder.grid)
        torch.save({"model": {key: torch.tensor(np.array(x)) for key, x in tensors.items()}}, folder / f"{name}.pth")


def measured(name: str, command: list[str], weights: Path) -> dict:
    """Runs a command to its end; seconds, and peaks of its memory in bytes."""
    file = weights / "model.safetensors" if weights.is_dir() else weights
    began = time.perf_counter()
    site = Path(__file__).parents[1] / "tests" / "site"  # timm beside a torchvision of another build
    environment = os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak = [0]
    watcher = threading.Thread(target=watch, args=(process.pid, peak))
    watcher.start()
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    watcher.join()
    if status:
        raise SystemExit(f"{name} failed:\n{output}")
    row = {"case": name, "file": file.stat().st_size, "seconds": round(seconds, 1), "anonymous": peak[0]}
    row["resident"] = usage.ru_maxrss * 1024
    row |= {f"{key}_times": round(row[key] / row["file"], 2) for key in ("anonymous", "resident")}
    row["says"] = [line for line in output.splitlines() if line.startswith(("checked", "not checked"))]
    print(row, flush=True)
    return row


def watch(pid: int, peak: list[int]) -> None:
    """Keeps the largest anonymous memory of a process until it ends."""
    while True:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            return
        for line in text.splitlines():
            if line.startswith("Anonymous:"):
                peak[0] = max(peak[0], 1024 * int(line.split()[1]))
        time.sleep(0.02)


def report(size: str, rows: list[dict]) -> None:
    """Prints the table and writes the record."""
    print(f"ViT-{size}, {os.cpu_count()} cores")
    print(f"{'':30}{'file, GB':>10}{'seconds':>10}{'anonymous':>12}{'resident':>12}   multiples of the file")
    for row in rows:
        cells = f"{row['file'] / 1e9:10.2f}{row['seconds']:10.1f}"
        print(f"{row['case']:30}{cells}{row['anonymous_times']:12.2f}{row['resident_times']:12.2f}")
    machine = {
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"machine": machine, "size": size, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
