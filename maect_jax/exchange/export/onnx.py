"""ONNX: the encoder, with its classifier where there is one, as a graph that needs no Python.

The graph is PyTorch's export of timm's model. A decoder is left out. Weights of more than one gigabyte lie in a second
file: the format ends at two, and one file takes several times its size in memory to write.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from maect_jax.errors import ConfigError
from maect_jax.exchange.export import timm
from maect_jax.exchange.export.target import load_library, write_config
from maect_jax.exchange.model import Model

GRAPH = "model.onnx"
INPUT = "pixel_values"
_OPERATORS = 18  # version of the operator set; every runtime of the last years has it
_ONE_FILE = 1 << 30  # bytes of weights
_NEEDED = ("torch", "timm", "onnx", "onnxscript")


class Onnx:
    """`--to onnx`: see `target.Target`."""

    name = "onnx"
    loader = "onnx"

    def check(self, model: Model) -> None:
        timm.refuse_two_norms(self.name, model)
        try:
            for name in _NEEDED:
                load_library(name)
        except ImportError as error:
            raise ConfigError(
                f"--to {self.name}: {error}; the graph is made with {', '.join(_NEEDED)}: install them with pip"
            ) from None

    def write(self, model: Model, folder: Path, metadata: Mapping[str, str]) -> None:
        torch, names = load_library("torch"), _outputs(model)
        module = timm.empty_module(model)
        tensors = timm.tensors_of(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the arrays are read-only, and nothing writes to them
            timm.load_strictly(module, {name: torch.from_numpy(x) for name, x in tensors.items()})  # copies nothing

        class Graph(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.encoder = module

            def forward(self, images_bchw):
                found = timm.encode(self.encoder, images_bchw, model.has_head)
                return tuple(found[name] for name in names)

        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # PyTorch's, on itself
            program = torch.onnx.export(
                Graph().eval(),
                (torch.zeros(2, model.channels, model.image_size, model.image_size),),
                input_names=[INPUT],
                output_names=names,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=_OPERATORS,
                dynamo=True,
                verbose=False,
            )
        _strip(program.model)
        program.model.metadata_props.update({name: text for name, text in metadata.items() if name != "format"})
        program.save(folder / GRAPH, external_data=sum(x.nbytes for x in tensors.values()) > _ONE_FILE)
        write_config(folder, _settings(model))

    def usage(self, model: Model) -> str:
        size, short = model.image_size, round(model.image_size * model.resize_ratio)
        corner = (short - size) // 2
        box = (corner, corner, corner + size, corner + size)
        found = "[logits]" if model.has_head else "tokens, features"
        return f"""\
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("{GRAPH}")
image = Image.open("picture.jpg").convert("{"L" if model.channels == 1 else "RGB"}")
image = ImageOps.fit(image, ({short}, {short}), Image.Resampling.BICUBIC).crop({box})
values = np.asarray(image).reshape({size}, {size}, {model.channels}) / 255
values = ((values - {list(model.mean)}) / {list(model.std)}).transpose(2, 0, 1)[None]
{found} = session.run(None, {{"{INPUT}": values.astype(np.float32)}})"""

    def outputs(
        self, model: Model, folder: Path, images_bchw: np.ndarray, noise_bn: np.ndarray
    ) -> dict[str, np.ndarray]:
        runtime, names = load_library("onnxruntime"), _outputs(model)
        session = runtime.InferenceSession(folder / GRAPH, providers=["CPUExecutionProvider"])
        return dict(zip(names, session.run(names, {INPUT: images_bchw})))


def _outputs(model: Model) -> list[str]:
    return ["logits"] if model.has_head else ["tokens", "features"]


def _settings(model: Model) -> dict[str, Any]:
    encoder, classes = model.encoder, timm.classes_of(model)
    shapes = {
        "tokens": ["batch", 1 + encoder.grid**2, encoder.width],
        "features": ["batch", encoder.width],
        "logits": ["batch", classes],
    }
    return {
        "inputs": {INPUT: ["batch", model.channels, model.image_size, model.image_size]},
        "outputs": {name: shapes[name] for name in _outputs(model)},
        "pooling": model.pooling,
        "mean": list(model.mean),
        "std": list(model.std),
        **({"label_names": list(model.classes)} if classes and len(model.classes) == classes else {}),
    }


def _strip(model: Any) -> None:
    """Takes out the notes of PyTorch's exporter, which hold the paths and lines of this machine's programs."""
    graph = model.graph
    nodes = list(graph.all_nodes())
    values = [*graph.inputs, *graph.initializers.values(), *(value for node in nodes for value in node.outputs)]
    for part in (model, graph, *nodes, *values):
        part.metadata_props.clear()
        part.doc_string = None


ONNX = Onnx()
