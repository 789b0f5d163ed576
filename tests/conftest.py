"""Every test sees eight simulated CPU devices; those that need one take `jax.devices()[:1]`.

Compiled programs are kept in the temporary folder, so that a second run is faster.

timm and transformers import torchvision, whose own import asks for operators that its binary registers. A binary for
another build of PyTorch than the one installed, such as CUDA's beside that for the CPU, does not load; then the two
operators are declared. Nothing calls them.
"""

import getpass
import importlib.abc
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update(
    "jax_compilation_cache_dir", str(Path(tempfile.gettempdir()) / f"maect_jax_tests_{getpass.getuser()}")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


class TorchvisionFinder(importlib.abc.MetaPathFinder):
    """Declares torchvision's operators when it is first looked for, so that no other test imports PyTorch."""

    library = None  # holds the declarations

    def find_spec(self, name, path, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            found = importlib.util.find_spec(name)
            if found is not None:
                self.declare(Path(found.origin).parent)

    def declare(self, folder: Path) -> None:
        import torch

        try:
            for binary in folder.glob("_C*.so"):
                torch.ops.load_library(binary)
        except OSError:
            TorchvisionFinder.library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, TorchvisionFinder())
