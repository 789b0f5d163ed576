"""timm and transformers can be imported beside a torchvision of another PyTorch build.

Both import torchvision, whose own import asks for operators that its binary registers. A binary for another build of
PyTorch than the one installed, such as CUDA's beside that for the CPU, does not load; then the two operators are
declared. Nothing calls them. Python imports this module at its start where this folder is on PYTHONPATH (the processes
that tests start); `conftest` imports it for the tests themselves.
"""

import importlib.abc
import importlib.util
import sys
from pathlib import Path


class TorchvisionFinder(importlib.abc.MetaPathFinder):
    """Declares torchvision's operators when it is first looked for, so that nothing else imports PyTorch."""

    declared = None  # holds the declarations

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
            TorchvisionFinder.declared = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                TorchvisionFinder.declared.define(
                    f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )


sys.meta_path.insert(0, TorchvisionFinder())
