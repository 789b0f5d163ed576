"""Object detection with the exported encoder, by transformers: one forward pass of a detector that is to be trained.

    python -m maect_jax convert --to hf-vit --weights runs/digits --out exported/vit
    python examples/detection_transformers.py exported/vit picture.jpg

The first command needs JAX, the second one only transformers. Deformable DETR takes p3, p4 and p5 of ViTDet's pyramid,
all three from the last block, and makes a coarser map of them itself. Exact: the encoder, see
`backbone_transformers.py`. New and random: the detector, so that its boxes mean nothing yet.
"""

import argparse

import numpy as np
import torch
from backbone_transformers import ViTPyramidConfig
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, DeformableDetrConfig, DeformableDetrForObjectDetection, ViTConfig
from transformers import DeformableDetrImageProcessor as Boxes


def detector(folder: str, classes: int) -> DeformableDetrForObjectDetection:
    """A detector of so many classes on the folder's encoder, to be trained."""
    settings = ViTConfig.from_pretrained(folder).to_dict() | {"model_type": "vit_pyramid"}
    backbone = ViTPyramidConfig.from_dict(settings, out_features=["p3", "p4", "p5"])
    model = DeformableDetrForObjectDetection(DeformableDetrConfig(backbone_config=backbone, num_labels=classes))
    model.model.backbone.model.load_encoder(folder)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="that `convert --to hf-vit` wrote")
    parser.add_argument("picture")
    parser.add_argument("--classes", type=int, default=80, help="of the detector; COCO has 80")
    arguments = parser.parse_args()

    model = detector(arguments.folder, arguments.classes).eval()
    vit = model.config.backbone_config
    mode = "L" if vit.num_channels == 1 else "RGB"
    image = ImageOps.exif_transpose(Image.open(arguments.picture)).convert(mode)
    side = 2 * vit.image_size  # twice as large as in pre-training, the whole picture
    processor = AutoImageProcessor.from_pretrained(arguments.folder, do_center_crop=False)
    pixels = np.atleast_3d(np.array(image))
    inputs = processor(pixels, size={"height": side, "width": side}, return_tensors="pt")
    with torch.inference_mode():
        outputs = model(**inputs)
    print(f"{side} x {side} pixels: logits {list(outputs.logits.shape)}, boxes {list(outputs.pred_boxes.shape)}")
    found = Boxes().post_process_object_detection(outputs, threshold=0, target_sizes=[(image.height, image.width)])[0]
    for label, score, box in zip(found["labels"][:3], found["scores"], found["boxes"]):
        print(f"class {label}, score {score:.2f}, box {[round(x) for x in box.tolist()]} in pixels of the picture")


if __name__ == "__main__":
    main()
