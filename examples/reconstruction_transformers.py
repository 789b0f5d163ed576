"""What a masked autoencoder sees and what it makes of it, by transformers: original | masked | reconstruction.

    python -m maect_jax convert --to hf-vitmae --weights runs/digits/pretrain --out exported/autoencoder
    python examples/reconstruction_transformers.py exported/autoencoder picture.jpg

The first command needs JAX, the second one only transformers. The folder says how a picture is cut and normalised,
which share of its patches is masked, and whether the decoder predicts pixels that were normalised patch by patch.
"""

import argparse

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, ViTMAEForPreTraining


def reconstruct(model: ViTMAEForPreTraining, pixels: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Completed pictures, and 1 where they were masked, as `pixels` [b, c, h, w]; the least noise [b, n] is visible."""
    with torch.inference_mode():
        output = model(pixels, noise=noise)
    patches, predicted = model.patchify(pixels), output.logits
    if model.config.norm_pix_loss:  # each patch was predicted without its own mean and deviation: put them back
        deviation = (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        predicted = predicted * deviation + patches.mean(dim=-1, keepdim=True)
    masked = output.mask[..., None].expand_as(patches)
    return model.unpatchify(torch.where(masked == 1, predicted, patches)), model.unpatchify(masked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="that `convert --to hf-vitmae` wrote, with a decoder")
    parser.add_argument("picture")
    parser.add_argument("--out", default="reconstruction.png")
    parser.add_argument("--seed", type=int, default=0, help="of the mask")
    arguments = parser.parse_args()
    model, report = ViTMAEForPreTraining.from_pretrained(arguments.folder, output_loading_info=True)
    if report["missing_keys"]:
        parser.error(f"{arguments.folder} has no decoder; convert the pre-training stage")
    processor = AutoImageProcessor.from_pretrained(arguments.folder)
    mode = "L" if model.config.num_channels == 1 else "RGB"
    image = ImageOps.exif_transpose(Image.open(arguments.picture)).convert(mode)
    pixels = processor(np.atleast_3d(np.array(image)), return_tensors="pt").pixel_values
    patches = (model.config.image_size // model.config.patch_size) ** 2
    noise = torch.rand(1, patches, generator=torch.Generator().manual_seed(arguments.seed))
    completed, masked = reconstruct(model.eval(), pixels, noise)

    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    original, completed = pixels * std + mean, completed * std + mean
    strip = torch.cat([original, torch.where(masked == 1, 0.5, original), completed], dim=-1)[0]
    strip = (strip.clip(0, 1) * 255).round().byte().permute(1, 2, 0)
    Image.fromarray(strip.squeeze(2).numpy()).save(arguments.out)
    print(f"{arguments.out}: {model.config.mask_ratio:.0%} of {patches} patches masked")


if __name__ == "__main__":
    main()
