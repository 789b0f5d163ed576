"""Two-view crops with torchvision and PIL, as its users write them; one side of `benchmarks.input`."""

from importlib.metadata import version

import serving
import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder


class TwoViews:
    """Two random views of a picture from one decode."""

    def __init__(self, transform):
        self.transform = transform

    def __call__(self, image):
        return self.transform(image), self.transform(image)


def main() -> None:
    given = serving.arguments(__doc__, ("core", "all"))
    torch.set_num_threads(1)
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                serving.SIZE, scale=serving.SCALE, interpolation=transforms.InterpolationMode.BICUBIC
            ),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(serving.MEAN, serving.STD),
        ]
    )
    workers = {} if given.mode == "core" else {"num_workers": given.cores, "persistent_workers": True}
    loader = DataLoader(
        ImageFolder(f"{given.folder}/train", TwoViews(transform)),
        batch_size=serving.BATCH,
        shuffle=True,
        drop_last=True,
        **workers,
    )

    def batches():
        while True:
            for (first, _second), _label in loader:
                yield len(first)

    serving.serve(
        serving.measured(batches()), versions={p: version(p) for p in ("torch", "torchvision", "pillow", "numpy")}
    )


if __name__ == "__main__":
    main()
