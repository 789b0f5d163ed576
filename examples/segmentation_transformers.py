"""Semantic segmentation with the exported encoder, by transformers: one forward pass of a model that is to be trained.

    python -m maect_jax convert --to hf-vit --weights runs/digits --out exported/vit
    python examples/segmentation_transformers.py exported/vit picture.jpg

The first command needs JAX, the second one only transformers. UperNet takes four maps, from a third, half, two thirds
and all of the blocks, as MAE's segmentation does (blocks 4, 6, 8 and 12 of a ViT-B). Exact: the encoder, see
`backbone_transformers.py`. New and random: UperNet, so that its classes mean nothing yet.
"""

import argparse

import numpy as np
import torch
from backbone_transformers import ViTPyramidConfig
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, UperNetConfig, UperNetForSemanticSegmentation, ViTConfig


def segmenter(folder: str, classes: int) -> UperNetForSemanticSegmentation:
    """A segmenter of so many classes on the folder's encoder, to be trained."""
    settings = ViTConfig.from_pretrained(folder).to_dict() | {"model_type": "vit_pyramid"}
    levels = {"out_features": ["p2", "p3", "p4", "p5"], "depths": [1 / 3, 1 / 2, 2 / 3, 1]}
    backbone = ViTPyramidConfig.from_dict(settings, **levels)
    model = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, num_labels=classes))
    model.backbone.load_encoder(folder)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="that `convert --to hf-vit` wrote")
    parser.add_argument("picture")
    parser.add_argument("--classes", type=int, default=150, help="of the segmenter; ADE20K has 150")
    arguments = parser.parse_args()

    model = segmenter(arguments.folder, arguments.classes).eval()
    vit = model.config.backbone_config
    mode = "L" if vit.num_channels == 1 else "RGB"
    image = ImageOps.exif_transpose(Image.open(arguments.picture)).convert(mode)
    side = 2 * vit.image_size  # twice as large as in pre-training, the whole picture
    processor = AutoImageProcessor.from_pretrained(arguments.folder, do_center_crop=False)
    pixels = np.atleast_3d(np.array(image))
    inputs = processor(pixels, size={"height": side, "width": side}, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**inputs).logits
    print(f"{side} x {side} pixels: logits {list(logits.shape)}")
    logits = torch.nn.functional.interpolate(logits, size=(image.height, image.width), mode="bilinear")
    classes = logits.argmax(dim=1)[0]
    print(f"{image.width} x {image.height} pixels of the picture: {len(classes.unique())} classes found")


if __name__ == "__main__":
    main()
