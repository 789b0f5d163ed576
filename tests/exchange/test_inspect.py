"""python -m maect_jax inspect: a weights file of any layout is told in full, and nothing in it reaches the terminal."""

import argparse
import hashlib
import json
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from maect_jax.commands import inspect
from maect_jax.errors import CheckpointError, ConfigError
from maect_jax.exchange.files import open_model
from maect_jax.exchange.layouts import ENCODERS, LAYOUTS
from maect_jax.exchange.mapping import to_layout
from maect_jax.exchange.provenance import Provenance
from maect_jax.inspection.facts import facts_of
from maect_jax.inspection.text import as_text
from small import head_tree
from torch_files import torch
from weight_files import random_tree, refusal, tensors_of, written

SAME_NAMES = {"timm_mae": "mae_official_encoder"}
KINDS = ("safetensors", "flat", "npz")


@pytest.fixture(scope="module")
def tree():
    return random_tree()


def tensors_in(layout, tree):
    if layout in ENCODERS:
        return tensors_of(tree, layout)
    if layout == "maect_probe":
        probe = {"mean": np.zeros(24), "var": np.ones(24), "kernel": np.zeros((24, 5)), "bias": np.zeros(5)}
        return to_layout({"probe": probe}, layout)
    shapes = jax.eval_shape(lambda: head_tree(24, hidden=16, out=8, predictor_hidden=32, queue=64))
    head = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    if layout == "maect_head_stage2":
        del head["target"]
    return to_layout(head, layout)


def shown(capsys, path, *options) -> str:
    """What the command prints."""
    parser = argparse.ArgumentParser()
    inspect.add_arguments(parser)
    inspect.main(parser.parse_args([str(path), *options]))
    return capsys.readouterr().out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_told_with_its_architecture_and_every_tensor(layout, tree, tmp_path, capsys):
    tensors = tensors_in(layout, tree)
    path = written(tmp_path, tensors, KINDS[ENCODERS.index(layout) % 3] if layout in ENCODERS else "flat")
    facts = json.loads(shown(capsys, path, "--json"))
    table = {item["name"]: (item["shape"], item["dtype"], item["bytes"]) for item in facts["tensors"]}
    assert table == {name: (list(x.shape), x.dtype.name, x.nbytes) for name, x in tensors.items()}
    assert facts["layout"] == SAME_NAMES.get(layout, layout)
    content = path.read_bytes()
    assert facts["sha256"] == hashlib.sha256(content).hexdigest() and facts["bytes"] == len(content)
    assert facts["md5"] == hashlib.md5(content).hexdigest()
    if layout in ENCODERS:
        encoder = facts["encoder"]
        keys = ("width", "depth", "mlp_width", "patch", "image_size", "channels", "positions", "final_norm")
        expected = (24, 3, 96, 8, 32, 3, "fixed", layout not in ("mae_finetuned", "timm_fc_norm"))
        assert tuple(encoder[key] for key in keys) == expected
        tables = ("pos_embed", "position_embeddings")
        trained = sum(x.size for name, x in tensors.items() if not name.endswith(tables))
        assert sum(facts["parameters"].values()) == trained
        assert facts["problems"] == []
    assert ("decoder" in facts) == layout.endswith(("_full", "_pretraining"))
    if "decoder" in facts:
        assert [facts["decoder"][key] for key in ("width", "depth", "mlp_width", "values")] == [16, 2, 64, 192]
    assert ("head" in facts) == layout.endswith(("_classifier", "_finetuned", "_probe"))
    assert facts.get("head", {}).get("classes", 5) == 5
    if "_head_" in layout:
        assert facts["nnclr"] == {"width": 24, "hidden": 16, "out": 8, "predictor_hidden": 32, "queue": 64}
        assert facts["kind"].endswith(layout[-1])
    text = shown(capsys, path)
    assert facts["layout"] in text and facts["sha256"] in text and facts["license"] in text


def test_blocks_are_folded_unless_all_are_asked_for(tree, tmp_path, capsys):
    tensors = tensors_of(tree, "timm_mae")
    path = written(tmp_path, tensors, "safetensors")
    table = shown(capsys, path).split("\n\n")[1].splitlines()
    assert len([line for line in table if line.startswith("blocks.{0..2}.")]) == 12
    assert not any(line.startswith(("blocks.0", "blocks.1", "blocks.2")) for line in table)
    row = next(line.split() for line in table if "fc1.weight" in line)
    assert row == ["blocks.{0..2}.mlp.fc1.weight", "96", "x", "24", "float32", "27.0", "KiB"]
    assert table[-1] == f"{len(tensors)} tensors, {sum(x.nbytes for x in tensors.values()) / 1024:.1f} KiB"
    names = [line.split()[0] for line in shown(capsys, path, "--all").split("\n\n")[1].splitlines()]
    assert sorted(names[1:-1]) == sorted(tensors)


def test_only_consecutive_blocks_of_one_shape_and_type_are_folded(tmp_path, capsys):
    tensors = {f"a.{i}.w": np.zeros(3, np.float32) for i in (0, 1, 2, 4, 5, 9, 10, 11)}
    tensors |= {"a.6.w": np.zeros(4, np.float32), "a.7.w": np.zeros(3, np.float64), "a.07.w": np.zeros(3, np.float32)}
    text = shown(capsys, written(tmp_path, tensors, "flat"))
    names = [line.split()[0] for line in text.split("\n\n")[1].splitlines()[1:-1]]
    assert set(names) == {"a.{0..2}.w", "a.{4..5}.w", "a.{9..11}.w", "a.6.w", "a.7.w", "a.07.w"}


def test_heads_are_said_published_or_unknown(tree, tmp_path, capsys):
    path = written(tmp_path, tensors_of(tree, "timm_classifier"), "safetensors")
    assert "heads unknown" in shown(capsys, path)
    assert facts_of(path)["encoder"]["heads"] is None
    folder = tmp_path / "hub"
    folder.mkdir()
    path.rename(folder / "model.safetensors")
    config = {"model_args": {"num_heads": 3}, "global_pool": "avg", "label_names": ["a", "b", "c", "d", "<e>"]}
    (folder / "config.json").write_text(json.dumps(config))
    facts = facts_of(folder)
    assert (facts["encoder"]["heads"], facts["encoder"]["heads_source"]) == (3, "said")
    assert facts["head"]["names"] == ["a", "b", "c", "d", "<e>"] and facts["pooling"] == "mean"
    assert "3 heads (said" in shown(capsys, folder) and "a, b, c, d, <e>" in shown(capsys, folder)
    (folder / "config.json").write_text(json.dumps(config | {"model_args": {"num_heads": 5}}))
    assert "5 heads do not divide the width 24" in shown(capsys, folder)
    arguments = {"num_heads": 3, "init_values": 0.1}
    (folder / "config.json").write_text(json.dumps(config | {"model_args": arguments}))
    assert "config.json says init_values 0.1" in shown(capsys, folder)


def test_a_published_size_has_its_name_and_heads(tmp_path, capsys):
    shapes = {"cls_token": (1, 1, 768), "pos_embed": (1, 197, 768), "patch_embed.proj.weight": (768, 3, 16, 16)}
    shapes |= {
        f"{name}.{kind}": (768,) for name in ("norm", "patch_embed.proj") for kind in ("weight", "bias")
    } | shapes
    sizes = {"attn.qkv": (2304, 768), "attn.proj": (768, 768), "mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072)}
    for i in range(12):
        inside = f"blocks.{i}."
        shapes |= {f"{inside}{norm}.{kind}": (768,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
        shapes |= {f"{inside}{name}.weight": size for name, size in sizes.items()}
        shapes |= {f"{inside}{name}.bias": size[:1] for name, size in sizes.items()}
    zero = torch.zeros(3072 * 768, dtype=torch.float16)
    tensors = {name: zero[: int(np.prod(shape))].reshape(shape) for name, shape in shapes.items()}
    torch.save({"model": tensors}, tmp_path / "x.pth")
    text = shown(capsys, tmp_path / "x.pth")
    assert "ViT-B/16: width 768, depth 12, 12 heads (as published" in text
    assert "pictures of 224 x 224 pixels" in text and "learned positions" in text
    assert facts_of(tmp_path / "x.pth")["parameters"] == {"encoder": 85_798_656}  # timm's


def test_learned_positions_are_told_apart_from_the_fixed_ones(tree, tmp_path):
    table = np.random.default_rng(0).standard_normal((1, 17, 24)).astype(np.float32)
    tensors = tensors_of(tree, "mae_official_full")
    facts = facts_of(written(tmp_path, tensors | {"pos_embed": table}, "npz"))
    assert facts["encoder"]["positions"] == "learned" and facts["problems"] == []
    facts = facts_of(written(tmp_path, tensors | {"decoder_pos_embed": table[..., :16]}, "npz"))
    assert facts["encoder"]["positions"] == "fixed" and "decoder's positions" in facts["problems"][0]


def test_short_floats_and_what_is_no_real_number_are_named(tree, tmp_path):
    tensors = tensors_of(tree, "timm_mae")
    short = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}
    facts = facts_of(written(tmp_path, short, "safetensors"))
    assert {shape.dtype for shape in facts["tensors"].values()} == {"bfloat16"}
    assert facts["encoder"]["positions"] == "fixed" and facts["problems"] == []
    eight = {"norm.bias": tensors["norm.bias"].astype(ml_dtypes.float8_e4m3fn)}
    facts = facts_of(written(tmp_path, tensors | eight, "safetensors"))
    shape = facts["tensors"]["norm.bias"]
    assert (shape.shape, shape.dtype, shape.bytes) == ((24,), "float8_e4m3", 24)
    assert facts["problems"] == ["weights that are no real numbers: norm.bias"]


def test_all_that_differs_from_the_nearest_layout_is_listed(tree, tmp_path, capsys):
    tensors = tensors_of(tree, "mae_official_full")
    kept = {name: x for name, x in tensors.items() if "norm2" not in name}
    others = {f"adapter.{i}.gamma": np.ones(3, np.float32) for i in range(20)}
    path = written(tmp_path, kept | others | {"decoder_pred.bias": np.ones(7, np.float32)}, "training")
    text = shown(capsys, path)
    assert "the nearest is mae_official_full" in text
    for line in ("10 missing:", "20 unexpected:", "1 misshaped:", "blocks.{0..2}.norm2.bias", "adapter.{0..19}.gamma"):
        assert line in text
    assert "decoder_pred.bias: (7,), expected (192,)" in text
    facts = json.loads(shown(capsys, path, "--json"))
    assert set(facts["differences"]["missing"]) == tensors.keys() - kept.keys()
    assert set(facts["differences"]["unexpected"]) == others.keys()
    assert len(facts["tensors"]) == len(kept) + len(others)
    assert "optimizer: dict" in text


def test_an_encoder_with_few_of_its_tensors_is_compared_with_an_encoder(tmp_path, capsys):
    """As `convert` compares it, and not with the layout of fewest tensors."""
    tensors = {"cls_token": np.ones((1, 1, 24), np.float32), "norm.weight": np.ones(24, np.float32)}
    path = written(tmp_path, tensors | {"adapter.weight": np.ones((3, 24), np.float32)}, "safetensors")
    assert "compared with the nearest, mae_official_encoder" in refusal(open_model, path)
    assert "the nearest is mae_official_encoder" in shown(capsys, path)


def test_a_table_that_is_not_finite_is_told_as_learned_without_a_warning(tree, tmp_path):
    tensors = tensors_of(tree, "mae_official_encoder")
    for dtype in (np.float16, np.float32, ml_dtypes.bfloat16):
        for value in (np.nan, np.inf):
            table = np.full((1, 17, 24), value, dtype)
            path = written(tmp_path, tensors | {"pos_embed": table}, "safetensors")
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert facts_of(path)["encoder"]["positions"] == "learned"


def test_a_training_checkpoint_tells_its_epoch_and_what_lies_beside(tree, tmp_path, capsys):
    facts = facts_of(written(tmp_path, tensors_of(tree, "mae_official_full"), "training"))
    assert facts["beside"] == {"optimizer": "dict", "epoch": 3, "scaler": "dict", "args": "argparse.Namespace"}
    assert facts["stage"] == "epoch 3" and facts["license"] == "unknown"
    text = shown(capsys, facts["path"])
    assert "epoch 3" in text and "argparse.Namespace" in text
    assert f"{facts['md5'][:6]}…" in text


def noted(path, tensors, note):
    safetensors.numpy.save_file(tensors, path, {"maect_jax": json.dumps(note)})
    return path


def test_provenance_that_a_file_carries_is_told_with_its_chain(tree, tmp_path, capsys):
    chain = [{"name": "digits", "stage": "head", "step": 40, "sha256": "a" * 64, "license": "CC-BY-NC-4.0"}]
    told = Provenance(
        "CC-BY-NC-4.0", "MAE says so", tuple(chain), "digits", {"seed": 3}, "tune", 120, "exponential, 0.9"
    )
    tensors = tensors_of(tree, "timm_mae")
    path = noted(tmp_path / "x.safetensors", tensors, {"heads": 2, "provenance": told.as_dict()})
    facts = json.loads(shown(capsys, path, "--json"))
    assert {key: facts[key] for key in told.as_dict()} == told.as_dict()
    text = shown(capsys, path)
    lines = (
        "tune",
        "120",
        "exponential, 0.9",
        "digits",
        "CC-BY-NC-4.0 (MAE says so)",
        "stage head",
        "a" * 64,
        "2 heads",
    )
    assert all(line in text for line in lines)


def test_a_probe_that_an_evaluation_has_kept_is_told_with_its_note(tmp_path, capsys):
    sizes = {"mean": (24,), "var": (24,), "kernel": (24, 3), "bias": (3,)}
    note = {"feature": "cls", "classes": ["x", "y", "z"], "encoder_sha256": "b" * 64, "test_accuracy": 0.75}
    path = noted(tmp_path / "p", {name: np.zeros(size, np.float32) for name, size in sizes.items()}, note)
    text = shown(capsys, path)
    for words in ("linear probe", "3 classes on 24 channels; names: x, y, z", "b" * 64, "test_accuracy: 0.75"):
        assert words in text


STEERING = "\x1b[2J\x1b]0;title\x07\r\n\u202e\u2028\x9b31m\x00"


def test_nothing_in_a_file_steers_the_terminal(tree, tmp_path, capsys):
    provenance = dict.fromkeys(("license", "license_source", "stage", "average", "trained_on"), STEERING)
    provenance["derived_from"] = [{"name": STEERING, STEERING: STEERING}]
    tensors = tensors_of(tree, "timm_classifier")
    note = {"provenance": provenance, "classes": [STEERING] * 5, STEERING: STEERING}
    files = [noted(tmp_path / "said", tensors, note)]
    state = {name: torch.tensor(x) for name, x in tensors.items()}
    torch.save({"model": state | {STEERING[:-1]: torch.ones(3)}, STEERING[:-1]: STEERING[:-1]}, tmp_path / "named")
    files.append(tmp_path / "named")
    for path in files:
        for options in ((), ("--all",), ("--json",)):
            text = shown(capsys, path, *options)
            assert text.replace("\n", "").isprintable() and "1b[2J" in text
        json.loads(shown(capsys, path, "--json"))


def test_notes_that_nest_without_end_say_nothing_and_numbers_that_json_lacks_are_told(tree, tmp_path, capsys):
    deep: list = []
    for _ in range(400):
        deep = [deep]
    tensors = tensors_of(tree, "timm_mae")
    note = {"provenance": {"license": "mit", "recipe": {"deep": deep}}}
    facts = json.loads(shown(capsys, noted(tmp_path / "x", tensors, note), "--json"))
    assert facts["recipe"] == {} and facts["license"] == "unknown"  # such a note says nothing
    state = {name: torch.tensor(x) for name, x in tensors.items()}
    torch.save({"model": state, "loss": float("nan"), "best": float("inf")}, tmp_path / "y")

    def refuse(constant):
        raise AssertionError(constant)

    facts = json.loads(shown(capsys, tmp_path / "y", "--json"), parse_constant=refuse)
    assert facts["beside"] == {"loss": "nan", "best": "inf"}


def test_a_long_name_is_cut_in_text_and_whole_in_json(tmp_path, capsys):
    path = written(tmp_path, {"n" * 5000: np.ones(3, np.float32)}, "safetensors")
    assert max(map(len, shown(capsys, path).splitlines())) < 300
    assert json.loads(shown(capsys, path, "--json"))["tensors"][0]["name"] == "n" * 5000


@pytest.mark.parametrize("kind", ["safetensors", "flat", "npz"])
@pytest.mark.parametrize("damage", ["half", "nothing", "noise"])
def test_a_damaged_file_is_refused_in_one_line(kind, damage, tree, tmp_path):
    path = written(tmp_path, tensors_of(tree, "timm_mae"), kind)
    content = path.read_bytes()
    path.write_bytes({"half": content[: len(content) // 2], "nothing": b"", "noise": bytes(range(256)) * 9}[damage])

    def read(path):
        inspect.main(argparse.Namespace(file=str(path), all=False, json=False))

    assert refusal(read, path, CheckpointError).startswith(str(path))


def test_a_path_with_nothing_or_nothing_known_is_refused(tmp_path):
    assert "FILE: nothing at" in refusal(facts_of, tmp_path / "no", ConfigError)
    assert "is neither a work folder" in refusal(facts_of, tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "flat"])
def test_large_tensors_are_not_read_into_memory(kind, tree, tmp_path):
    large = {"large": np.zeros((64, 1 << 18), np.float32)}  # 64 MiB
    path = written(tmp_path, tensors_of(tree, "timm_mae") | large, kind)
    tracemalloc.start()
    try:
        text = as_text(facts_of(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "64 x 262144" in text and peak < 24 << 20


def test_the_program_prints_a_file_of_no_known_layout_and_exits_well(tree, tmp_path):
    path = written(tmp_path, tensors_of(tree, "timm_mae") | {"more": np.ones(3, np.float32)}, "safetensors")
    done = subprocess.run(
        [sys.executable, "-m", "maect_jax", "inspect", path],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 unexpected:" in done.stdout and "more " in done.stdout
