import torchvision_finder  # noqa: F401 (its import is all it is for)
