"""Weights come through a conversion byte for byte: published file -> package of its form, package -> package."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors

from maect_jax.exchange.export.package import write_package
from maect_jax.exchange.export.targets import TARGETS
from maect_jax.exchange.files import open_model
from maect_jax.exchange.provenance import Provenance
from models import random_model
from torch_files import torch

WIDTH, GRID, PATCH, DECODER = 128, 4, 8, 32


def convert(source: Path, name: str, out: Path, **options) -> Path:
    """The package that a file, or the one in a folder, becomes; its file of weights."""
    write_package(open_model(source, **options).model, TARGETS[name], out, prove=False)
    return out / "model.safetensors"


def read(file: Path) -> dict[str, np.ndarray]:
    with safetensors.safe_open(file, "np") as content:
        return {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118


def assert_same_bytes(tensors, expected) -> None:
    """Names, types, shapes and bytes."""
    expected = {name: np.asarray(x) for name, x in expected.items()}
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape), name
        assert tensor.tobytes() == expected[name].tobytes(), name


# ------------------------------------------------------------------------------------------------------ published files


def table(width: int, grid: int = GRID):
    """The fixed position table with the class token's row, as the paper's formula has it: columns before rows."""
    frequency = 1 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4))
    column, row = (x.reshape(-1, 1) * frequency for x in np.meshgrid(np.arange(grid), np.arange(grid)))
    rows = np.concatenate([np.sin(column), np.cos(column), np.sin(row), np.cos(row)], axis=1)
    return torch.from_numpy(np.concatenate([np.zeros((1, width)), rows])[None].astype(np.float32))


class Published:
    """Random tensors by the names that published files have."""

    def __init__(self):
        self.random, self.tensors = torch.Generator().manual_seed(0), {}

    def add(self, name: str, *shape: int) -> None:
        self.tensors[name] = torch.randn(*shape, generator=self.random)

    def affine(self, name: str, *shape: int) -> None:
        self.add(f"{name}.weight", *shape)
        self.add(f"{name}.bias", shape[0])

    def blocks(self, name: str, depth: int, d: int) -> None:
        for i in range(depth):
            self.affine(f"{name}.{i}.norm1", d)
            self.affine(f"{name}.{i}.attn.qkv", 3 * d, d)
            self.affine(f"{name}.{i}.attn.proj", d, d)
            self.affine(f"{name}.{i}.norm2", d)
            self.affine(f"{name}.{i}.mlp.fc1", 4 * d, d)
            self.affine(f"{name}.{i}.mlp.fc2", d, 4 * d)


def encoder(normed: bool = True) -> Published:
    made = Published()
    made.add("cls_token", 1, 1, WIDTH)
    made.tensors["pos_embed"] = table(WIDTH)
    made.affine("patch_embed.proj", WIDTH, 3, PATCH, PATCH)
    made.blocks("blocks", 3, WIDTH)
    if normed:
        made.affine("norm", WIDTH)
    return made


def full() -> dict:
    made = encoder()
    made.add("mask_token", 1, 1, DECODER)
    made.tensors["decoder_pos_embed"] = table(DECODER)
    made.affine("decoder_embed", DECODER, WIDTH)
    made.blocks("decoder_blocks", 2, DECODER)
    made.affine("decoder_norm", DECODER)
    made.affine("decoder_pred", 3 * PATCH**2, DECODER)
    return made.tensors


def finetuned() -> dict:
    made = encoder(normed=False)
    made.add("pos_embed", 1, 1 + GRID**2, WIDTH)  # learned
    made.affine("fc_norm", WIDTH)
    made.affine("head", 7, WIDTH)
    return made.tensors


def maect() -> dict:
    tensors = encoder().tensors
    return tensors | {"pos_embed": tensors["pos_embed"][:, 1:].clone()}


FILES = {  # form of the package, tensors, what torch.save is given
    "MAE, encoder": ("mae", lambda: encoder().tensors, lambda state: {"model": state}),
    "MAE, with decoder": ("mae", full, lambda state: {"model": state}),
    "MAE, training": ("mae", full, lambda state: {"model": state, "optimizer": {"lr": 0.1}, "epoch": 399}),
    "MAE, fine-tuned": ("mae", finetuned, lambda state: {"model": state}),
    "MAE-CT": ("maect", maect, lambda state: {"state_dict": state, "ctor_kwargs": {"depth": 3}}),
    "MAE-CT, flat": ("maect", maect, lambda state: state),
    "timm": ("timm", lambda: encoder().tensors, lambda state: state),
}


@pytest.mark.parametrize("kind", FILES)
def test_published_file_comes_out_with_the_same_tensors(kind, tmp_path):
    name, make, wrapped = FILES[kind]
    tensors = make()
    torch.save(wrapped(tensors), tmp_path / "published.th")
    options = {"heads": 4} | ({"decoder_heads": 4} if "decoder_norm.bias" in tensors else {})
    file = convert(tmp_path / "published.th", name, tmp_path / "out", **options)
    assert_same_bytes(read(file), tensors)
    assert len(tensors) > 40


def test_encoder_comes_through_all_forms_with_the_same_tensors(tmp_path):
    tensors = full()
    torch.save({"model": tensors}, tmp_path / "published.pth")
    source = tmp_path / "published.pth"
    for i, name in enumerate(("timm", "hf-vitmae", "maect", "hf-vit", "mae")):
        source = convert(source, name, tmp_path / str(i), **({"heads": 4, "decoder_heads": 4} if i == 0 else {}))
    left_out = ("decoder", "mask_token")
    assert_same_bytes(read(source), {name: x for name, x in tensors.items() if not name.startswith(left_out)})


def test_decoder_comes_through_transformers_form_with_the_same_tensors(tmp_path):
    tensors = full()
    torch.save({"model": tensors}, tmp_path / "published.pth")
    between = convert(tmp_path / "published.pth", "hf-vitmae", tmp_path / "between", heads=4, decoder_heads=4)
    assert_same_bytes(read(convert(between, "mae", tmp_path / "out")), tensors)


# ------------------------------------------------------------------------------------------------------------- packages

# Widths of 48 and 32 tell nobody their heads: only the note in the header does.
MODELS = {
    "features": dict(),
    "decoder": dict(decoder=True, mask_ratio=0.6, normalised_pixels=False),
    "decoder of unknown pixels": dict(decoder=True, normalised_pixels=None),
    "learned positions, mean": dict(learned_positions=True, pooling="mean"),
    "grey": dict(channels=1, mean=(0.3,), std=(0.25,), resize_ratio=1.0),
    "classifier": dict(classes=3, classes_named=("cat", "Хлеб", "a|b`c\n---")),
    "classifier of means": dict(classes=5, pooling="mean"),
    "fine-tuned": dict(classes=7, fc_norm=True, learned_positions=True),
}
NOT_EXPRESSED = {
    "hf-vit": ("classifier of means", "fine-tuned"),
    "hf-vitmae": ("classifier", "classifier of means", "fine-tuned"),
    "maect": ("classifier", "classifier of means", "fine-tuned"),
}
FORMS = ("timm", "hf-vit", "hf-vitmae", "mae", "maect")


def origin() -> Provenance:
    chain = ({"name": "mae.pth", "sha256": "0" * 64, "layout": "mae_official_full", "license": "CC-BY-NC-4.0"},)
    return Provenance(
        license="CC-BY-NC-4.0",
        license_source="published with mae.pth",
        derived_from=chain,
        trained_on="Brötchen",
        recipe={"seed": 1, "rate": 1.5e-4, "stages": ["pretrain", "tune"], "model": {"remat": False, "size": None}},
        stage="tune",
        step=300,
        average="exponential, 0.9999",
        code_version="0.1.0",
    )


def the_model(classes_named=(), **shape):
    return dataclasses.replace(random_model(provenance=origin(), **shape), classes=tuple(classes_named))


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in FORMS for kind in MODELS if kind not in NOT_EXPRESSED.get(name, ())]
)
def test_package_comes_back_byte_for_byte(name, kind, tmp_path):
    model = the_model(**MODELS[kind])
    write_package(model, TARGETS[name], tmp_path / "first", prove=False)
    opened = open_model(tmp_path / "first").model
    assert opened.provenance == model.provenance
    assert opened.encoder == model.encoder
    again = convert(tmp_path / "first", name, tmp_path / "again")
    for file in ("model.safetensors", "config.json", "preprocessor_config.json"):
        assert (again.parent / file).read_bytes() == (tmp_path / "first" / file).read_bytes(), file


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_package_of_a_short_type_comes_back_byte_for_byte(dtype, tmp_path):
    for name in FORMS:
        write_package(the_model(decoder=True), TARGETS[name], tmp_path / name, dtype=dtype, prove=False)
        opened = open_model(tmp_path / name).model
        assert not opened.encoder.learned_positions
        write_package(opened, TARGETS[name], tmp_path / f"{name}2", dtype=dtype, prove=False)
        file = Path("model.safetensors")
        assert (tmp_path / f"{name}2" / file).read_bytes() == (tmp_path / name / file).read_bytes(), name


def test_note_is_what_tells_heads_that_no_width_tells(tmp_path):
    write_package(random_model(heads=2, width=40), TARGETS["maect"], tmp_path / "out", prove=False)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_heads"] == 2
    assert open_model(tmp_path / "out").model.encoder.heads == 2
