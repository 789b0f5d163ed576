"""Features of pictures by timm: a row of `features.npy` a picture.

    python -m maect_jax convert --to timm --weights runs/digits --out exported/digits
    python examples/features_timm.py exported/digits first.jpg second.png

The first command needs JAX, the second one only timm. The folder says how a picture is cut and normalised, and whether
its feature is the class token or the mean of the patch tokens.
"""

import argparse

import numpy as np
import timm
import torch
from PIL import Image, ImageOps


def load(folder: str) -> tuple[torch.nn.Module, dict]:
    """The encoder without a classifier, and how its pictures are prepared."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    return model, timm.data.resolve_model_data_config(model)


def prepare(path: str, data: dict) -> torch.Tensor:
    """A picture as the model sees it, [channels, size, size]."""
    channels, *_ = data["input_size"]
    image = ImageOps.exif_transpose(Image.open(path)).convert("L" if channels == 1 else "RGB")
    return timm.data.create_transform(**data)(image)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="that `convert --to timm` wrote")
    parser.add_argument("pictures", nargs="+")
    parser.add_argument("--out", default="features.npy")
    arguments = parser.parse_args()
    model, data = load(arguments.folder)
    with torch.inference_mode():
        rows = [model(prepare(path, data)[None])[0] for path in arguments.pictures]
    features = torch.stack(rows).numpy()
    np.save(arguments.out, features)
    print(f"{arguments.out}: {features.shape[0]} pictures, {features.shape[1]} numbers each")


if __name__ == "__main__":
    main()
