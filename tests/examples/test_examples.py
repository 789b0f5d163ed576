"""The examples run as their users start them, without JAX, and compute what our models do."""

import importlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from maect_jax.data.host.crops import central_crop
from maect_jax.data.host.decode import decode
from maect_jax.evaluation import pictures as evaluation
from maect_jax.exchange import positions
from maect_jax.exchange.export.package import write_package
from maect_jax.exchange.export.proof import TOLERANCE, difference, ours, pictures
from maect_jax.exchange.export.targets import TARGETS
from maect_jax.models.mae import MaskedAutoencoder
from maect_jax.models.patches import patchify

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
made = runpy.run_path(str(ROOT / "tests" / "exchange" / "models.py"))
random_model, photograph = made["random_model"], made["photograph"]

SIDE = 16  # of the model's pictures
COMMANDS = {
    "features_timm": ("timm", "upright.jpg", "turned.jpg"),
    "reconstruction_transformers": ("hf-vitmae", "turned.jpg", "--seed", "3"),
    "detection_transformers": ("hf-vit", "turned.jpg", "--classes", "7"),
    "segmentation_transformers": ("hf-vit", "turned.jpg", "--classes", "7"),
}


@pytest.fixture(scope="module")
def model():
    return random_model(depth=6, decoder=True, learned_positions=True, pooling="mean", mean=(0.4, 0.5, 0.6))


@pytest.fixture(scope="module")
def place(model, tmp_path_factory):
    """A folder with the model in three forms, a picture, and one whose camera was turned."""
    place = tmp_path_factory.mktemp("place")
    for form in ("timm", "hf-vit", "hf-vitmae"):
        write_package(model, TARGETS[form], place / form, prove=False)
    photograph().save(place / "upright.jpg", quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph().save(place / "turned.jpg", quality=95, exif=exif)
    return place


@pytest.fixture(scope="module")
def said(place, tmp_path_factory):
    """What each example prints in `place`; where it runs, importing JAX or this package is an error."""
    without = tmp_path_factory.mktemp("without")
    for name in ("jax", "flax", "maect_jax"):
        (without / f"{name}.py").write_text("raise ImportError('an example needs neither JAX nor this package')")
    path = os.pathsep.join([str(without), os.environ["PYTHONPATH"]])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = {
        name: subprocess.Popen(
            [sys.executable, EXAMPLES / f"{name}.py", *arguments],
            cwd=place,
            env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            **pipes,
        )
        for name, arguments in COMMANDS.items()
    }
    ended = {name: (*process.communicate(), process.returncode) for name, process in started.items()}
    for name, (_, errors, status) in ended.items():
        assert status == 0, f"{name}: {errors}"
        assert "Warning" not in errors and "REPORT" not in errors, f"{name}: {errors}"
    return {name: printed for name, (printed, _, _) in ended.items()}


@pytest.fixture(scope="module")
def example():
    """Imports an example by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module


def seen(model, path) -> np.ndarray:
    """A picture as our evaluation cuts it, uint8 [1, size, size, channels]."""
    image = decode(path.read_bytes(), model.channels, str(path))
    return central_crop(image, model.image_size, model.resize_ratio)[None]


def normalised(model, images_bhwc) -> np.ndarray:
    """[batch, channels, size, size]"""
    images_bhwc = (images_bhwc / 255 - np.array(model.mean)) / np.array(model.std)
    return images_bhwc.transpose(0, 3, 1, 2).astype(np.float32)


def test_every_example_is_short_and_its_docstring_holds_the_commands():
    for name, arguments in COMMANDS.items():
        text = (EXAMPLES / f"{name}.py").read_text()
        assert re.search(rf"python -m maect_jax convert --to {arguments[0]} --weights \S+ --out (\S+)\n", text)
        assert f"    python examples/{name}.py exported/" in text
    assert all(len(path.read_text().splitlines()) < 60 for path in EXAMPLES.glob("*.py"))


# ------------------------------------------------------------------------------------------------------------- features


def test_timms_features_of_picture_files_are_ours(model, place, said):
    assert said["features_timm"] == "features.npy: 2 pictures, 48 numbers each\n"
    images_bhwc = np.concatenate([seen(model, place / name) for name in ("upright.jpg", "turned.jpg")])
    expected = ours(model, normalised(model, images_bhwc), pictures(model)[1])["features"]
    assert difference(expected, np.load(place / "features.npy")) <= TOLERANCE
    assert difference(*expected) > 0.01


@pytest.mark.parametrize(
    "kind",
    [
        {"classes": 3, "pooling": "mean"},
        {"classes": 3, "fc_norm": True, "learned_positions": True},
        {"channels": 1, "resize_ratio": 1.0},
    ],
    ids=["probe on the mean", "fine-tuned", "class token, grey"],
)
def test_timms_features_of_the_same_tensor_are_ours(kind, place, example, tmp_path):
    model, features = random_model(**kind), example("features_timm")
    write_package(model, TARGETS["timm"], tmp_path / "exported", prove=False)
    module, data = features.load(str(tmp_path / "exported"))
    images_bchw, noise_bn = pictures(model)
    with torch.inference_mode():
        found = module(torch.from_numpy(images_bchw)).numpy()
    assert difference(ours(model, images_bchw, noise_bn)["features"], found) <= TOLERANCE
    expected = normalised(model, seen(model, place / "turned.jpg"))[0]
    np.testing.assert_allclose(features.prepare(place / "turned.jpg", data), expected, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- reconstruction


def reconstructed(model, images_bhwc, noise_bn, monkeypatch) -> dict[str, np.ndarray]:
    """What our evaluation shows for the given noise."""
    monkeypatch.setattr(evaluation, "mask_noise", lambda keys, patches: jnp.asarray(noise_bn))
    facts = {name: getattr(model, name) for name in ("mask_ratio", "normalised_pixels", "mean", "std")}
    autoencoder = MaskedAutoencoder(model.encoder, model.decoder)
    with jax.default_matmul_precision("highest"):
        return evaluation.reconstruct(autoencoder, model.params, images_bhwc, **facts, seed=0)


@pytest.mark.parametrize("kind", [{}, {"normalised_pixels": False, "mask_ratio": 0.6, "channels": 1}])
def test_reconstruction_is_ours_for_the_same_noise(kind, example, tmp_path, monkeypatch):
    reconstruction, model = example("reconstruction_transformers"), random_model(decoder=True, resize_ratio=1.0, **kind)
    write_package(model, TARGETS["hf-vitmae"], tmp_path / "exported", prove=False)
    mode = "L" if model.channels == 1 else "RGB"
    photograph().resize((SIDE, SIDE)).convert(mode).save(tmp_path / "picture.png")
    arguments = [str(tmp_path / name) for name in ("exported", "picture.png", "strip.png")]
    monkeypatch.setattr(sys, "argv", ["reconstruction", *arguments[:2], "--out", arguments[2]])
    reconstruction.main()

    images_bhwc = seen(model, tmp_path / "picture.png")
    noise_bn = torch.rand(1, 16, generator=torch.Generator().manual_seed(0)).numpy()
    expected = reconstructed(model, images_bhwc, noise_bn, monkeypatch)
    strip = np.asarray(Image.open(tmp_path / "strip.png")).reshape(SIDE, 3, SIDE, -1).astype(int)
    for i, name in enumerate(("original", "masked", "reconstructed")):
        assert np.abs(strip[:, i] - expected[name][0]).max() <= (name != "original"), name  # rounded at another half
    assert np.abs(strip[:, 2] - strip[:, 0]).max() > 10


def test_reconstruction_of_a_picture_file_is_ours(model, place, said, monkeypatch):
    """The picture is resized by another library here, which rounds some values to the one beside."""
    assert said["reconstruction_transformers"] == "reconstruction.png: 75% of 16 patches masked\n"
    noise_bn = torch.rand(1, 16, generator=torch.Generator().manual_seed(3)).numpy()
    expected = reconstructed(model, seen(model, place / "turned.jpg"), noise_bn, monkeypatch)
    strip = np.asarray(Image.open(place / "reconstruction.png")).reshape(SIDE, 3, SIDE, 3).astype(int)
    for i, name in enumerate(("original", "masked", "reconstructed")):
        assert np.abs(strip[:, i] - expected[name][0]).max() <= (2 if name == "reconstructed" else 1), name


def test_reconstruction_without_a_decoder_says_so(place, example, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["reconstruction", str(place / "hf-vit"), str(place / "upright.jpg")])
    with pytest.raises(SystemExit):
        example("reconstruction_transformers").main()
    assert "hf-vit has no decoder; convert the pre-training stage" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- detection and segmentation


def block_map(model, images_bchw, block) -> np.ndarray:
    """Our patch tokens after a block, [batch, width, rows, columns]; learned positions are resized."""
    encoder = model.params["encoder"]
    grid = images_bchw.shape[-1] // model.encoder.patch
    params = {"patch_embed": encoder["patch_embed"], "cls_token": encoder["cls_token"]}
    params["pos_embed"] = positions.resize(np.asarray(encoder["pos_embed"]), grid)
    params["blocks"] = jax.tree.map(lambda x: x[:block], encoder["blocks"])
    module = model.encoder.clone(depth=block, final_norm=False, image_size=images_bchw.shape[-1])
    patches_bnp = patchify(images_bchw.transpose(0, 2, 3, 1), model.encoder.patch)
    with jax.default_matmul_precision("highest"):
        tokens_bnd = np.asarray(jax.jit(module.apply)({"params": params}, patches_bnp))
    return tokens_bnd[:, 1:].swapaxes(1, 2).reshape(len(images_bchw), -1, grid, grid).copy()


def halved(map_bdrc) -> np.ndarray:
    b, d, rows, columns = map_bdrc.shape
    return map_bdrc.reshape(b, d, rows // 2, 2, columns // 2, 2).max(axis=(3, 5))


@pytest.mark.parametrize(
    ("task", "side"), [("segmentation", SIDE), ("segmentation", 2 * SIDE), ("detection", 2 * SIDE)]
)
def test_maps_are_those_of_our_blocks(task, side, model, place, example):
    module = example(f"{task}_transformers")
    if task == "detection":
        network = module.detector(str(place / "hf-vit"), 7).eval()
        backbone, blocks = network.model.backbone.model, {"p3": 6, "p4": 6, "p5": 6}
    else:
        network = module.segmenter(str(place / "hf-vit"), 7).eval()
        backbone, blocks = network.backbone, {"p2": 2, "p3": 3, "p4": 4, "p5": 6}
    images_bchw = np.random.default_rng(0).standard_normal((2, 3, side, side), np.float32)
    with torch.inference_mode():
        found = dict(zip(blocks, backbone(torch.from_numpy(images_bchw)).feature_maps, strict=True))
        maps = {block: block_map(model, images_bchw, block) for block in set(blocks.values())}
        expected = {name: maps[block] for name, block in blocks.items()}
        rescaled = {name: backbone.scales[name](torch.from_numpy(x)).numpy() for name, x in expected.items()}
    assert difference(expected["p4"], found["p4"].numpy()) <= TOLERANCE
    assert difference(halved(expected["p5"]), found["p5"].numpy()) <= TOLERANCE
    shapes = {"p2": (12, side), "p3": (24, side // 2), "p4": (48, side // 4), "p5": (48, side // 8)}
    for name in blocks:
        assert found[name].shape == (2, shapes[name][0], shapes[name][1], shapes[name][1])
        assert difference(rescaled[name], found[name].numpy()) <= TOLERANCE


def test_detection_ends_in_boxes_of_a_picture_twice_as_large(said):
    first, *boxes = said["detection_transformers"].splitlines()
    assert first == "32 x 32 pixels: logits [1, 300, 7], boxes [1, 300, 4]"
    assert len(boxes) == 3
    assert all(
        re.fullmatch(r"class [0-6], score 0\.\d\d, box \[(-?\d+, ){3}-?\d+\] in pixels .*", box) for box in boxes
    )


def test_segmentation_ends_in_classes_of_every_pixel_of_the_picture(said):
    first, second = said["segmentation_transformers"].splitlines()
    assert first == "32 x 32 pixels: logits [1, 7, 32, 32]"
    assert re.fullmatch(r"60 x 80 pixels of the picture: [1-7] classes found", second)


def test_backbone_is_saved_and_loaded_with_its_levels(place, example, tmp_path):
    backbone = example("segmentation_transformers").segmenter(str(place / "hf-vit"), 7).backbone.eval()
    backbone.save_pretrained(tmp_path)
    again = type(backbone).from_pretrained(tmp_path).eval()
    images_bchw = torch.randn(1, 3, SIDE, SIDE)
    with torch.inference_mode():
        pairs = zip(backbone(images_bchw).feature_maps, again(images_bchw).feature_maps, strict=True)
        assert [torch.equal(one, other) for one, other in pairs] == [True] * 4


@pytest.mark.parametrize(
    "name", ["embeddings.position_embeddings", "encoder.layer.5.output.dense.bias", "layernorm.bias"]
)
def test_encoder_that_lacks_a_tensor_is_refused(name, place, example, tmp_path):
    tensors = load_file(place / "hf-vit" / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    for file in ("config.json", "preprocessor_config.json"):
        (tmp_path / file).write_bytes((place / "hf-vit" / file).read_bytes())
    with pytest.raises(ValueError, match="is no folder of `convert --to hf-vit`"):
        example("segmentation_transformers").segmenter(str(tmp_path), 7)
