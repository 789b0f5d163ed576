"""Weights files become models: fitted name for name, and the model computes what it did before."""

import hashlib
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from maect_jax.errors import ConfigError
from maect_jax.exchange import positions
from maect_jax.exchange.files import open_model
from maect_jax.exchange.layouts import ENCODERS
from maect_jax.exchange.mapping import to_layout
from maect_jax.models.vit import ViT
from small import encoder_of
from torch_files import torch
from weight_files import CFG, random_tree, refusal, tensors_of, written

SAME_NAMES = {"timm_mae": "mae_official_encoder"}
HEADS = {"heads": 2, "decoder_heads": 2}


@pytest.fixture(scope="module")
def tree():
    return random_tree()


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        *((layout, "safetensors") for layout in ENCODERS),
        ("mae_official_full", "training"),
        ("mae_official_full", "model"),
        ("mae_finetuned", "model"),
        ("maect_encoder", "state_dict"),
        ("timm_classifier", "flat"),
    ],
)
def test_the_encoder_from_a_file_computes_what_the_original_does(layout, kind, tree, tmp_path):
    path = written(tmp_path, tensors_of(tree, layout), kind)
    opened = open_model(path, **HEADS)
    model = opened.model
    encoder = model.encoder
    sizes = (encoder.width, encoder.depth, encoder.heads, encoder.patch, encoder.image_size, model.channels)
    assert sizes == (24, 3, 2, 8, 32, 3)
    assert opened.layout == SAME_NAMES.get(layout, layout)
    assert opened.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    normed = layout not in ("mae_finetuned", "timm_fc_norm")
    patches = jnp.asarray(np.random.default_rng(1).standard_normal((2, 16, 192)), jnp.float32)
    expected = jax.jit(encoder_of(CFG, final_norm=normed).apply)({"params": tree["encoder"]}, patches)
    np.testing.assert_array_equal(jax.jit(encoder.apply)({"params": model.params["encoder"]}, patches), expected)
    parts = {"decoder": layout.endswith(("full", "pretraining")), "head": layout.endswith(("classifier", "finetuned"))}
    parts["fc_norm"] = not normed
    for part, there in parts.items():
        assert (part in model.params) == there
        if there:
            assert jax.tree.all(jax.tree.map(np.array_equal, model.params[part], tree[part]))
    if parts["decoder"]:
        decoder = model.decoder
        assert (decoder.width, decoder.depth, decoder.heads, decoder.grid, decoder.values) == (16, 2, 2, 4, 192)
    assert any("pooler" in note for note in opened.notes) == layout.endswith("_model")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_short_floats_become_float32(dtype, tree, tmp_path):
    state = {name: torch.tensor(x).to(getattr(torch, dtype)) for name, x in tensors_of(tree, "maect_encoder").items()}
    torch.save(state, tmp_path / "x.th")
    encoder = open_model(tmp_path / "x.th", heads=2).model
    assert not encoder.encoder.learned_positions  # rounded, but the fixed ones
    kernel = encoder.params["encoder"]["blocks"]["fc1"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel[1], state["blocks.1.mlp.fc1.weight"].T.float().numpy())


@pytest.mark.parametrize(("width", "heads"), [(192, 3), (384, 6), (768, 12), (1024, 16), (1280, 16), (64, None)])
def test_heads_are_those_of_the_published_models(width, heads, tmp_path):
    model = ViT(width, 1, heads or 4, 4, 4)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1, 48)))["params"])
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float16), shapes)
    path = tmp_path / "x"
    np.savez(path, **to_layout({"encoder": zeros}, "timm_mae", patch=4, grid=1))
    if heads:
        assert open_model(f"{path}.npz").model.encoder.heads == heads
    else:
        assert "no number of heads is published" in refusal(open_model, f"{path}.npz", ConfigError)


def test_heads_and_picture_size_are_checked_against_the_file(tree, tmp_path):
    path = written(tmp_path, tensors_of(tree, "mae_official_full"), "safetensors")
    assert "heads: " in refusal(open_model, path, ConfigError)
    assert "5 does not divide" in refusal(open_model, path, ConfigError, heads=5)
    assert "decoder_heads: " in refusal(open_model, path, ConfigError, heads=2)
    assert "decoder_heads: 3 does not divide" in refusal(open_model, path, ConfigError, heads=2, decoder_heads=3)
    assert "image_size: 30" in refusal(open_model, path, ConfigError, image_size=30, **HEADS)
    model = open_model(path, image_size=64, **HEADS).model
    assert model.encoder.image_size == 64 and model.decoder.grid == 8


def test_what_differs_from_the_nearest_layout_is_counted_and_listed(tree, tmp_path):
    tensors = tensors_of(tree, "mae_official_encoder")
    other = {name: x for name, x in tensors.items() if not name.startswith("norm.")}
    text = refusal(open_model, written(tmp_path, other | {"gamma": np.ones(24, np.float32)}, "training"))
    assert "mae_official_encoder: 2 missing: norm.bias, norm.weight; 1 unexpected: gamma" in text
    prefixed = {f"module.{name}": x for name, x in tensors.items()}
    text = refusal(open_model, written(tmp_path, prefixed, "flat"))
    assert "42 unexpected: module.blocks.0.attn.proj.bias" in text and "and 38 more" in text
    assert text.endswith("`python -m maect_jax inspect` lists all")
    narrow = tensors | {"blocks.1.mlp.fc1.bias": np.ones(95, np.float32)}
    text = refusal(open_model, written(tmp_path, narrow, "npz"))
    assert "1 misshaped: blocks.1.mlp.fc1.bias: (95,), expected (96,)" in text


def test_only_whole_parts_may_be_missing_and_only_where_allowed(tree, tmp_path):
    tensors = tensors_of(tree, "hf4_pretraining")
    encoder = {name: x for name, x in tensors.items() if name.startswith("vit.")}
    path = written(tmp_path, encoder, "npz")
    assert "2 missing: classifier.bias" in refusal(open_model, path, heads=2)
    opened = open_model(path, heads=2, allow_missing=["decoder/*"])
    assert opened.model.decoder is None and "decoder" not in opened.model.params
    assert any("left out decoder, allowed to be missing" in note for note in opened.notes)
    headless = {name: x for name, x in tensors.items() if "decoder_pred" not in name}
    opened = open_model(written(tmp_path, headless, "npz"), heads=2, allow_missing=["decoder/*"])
    assert "decoder" not in opened.model.params and "decoder.decoder_pred.bias" in opened.notes[0]
    normless = {name: x for name, x in tensors_of(tree, "timm_mae").items() if not name.startswith("norm")}
    opened = open_model(written(tmp_path, normless, "npz"), heads=2, allow_missing=["encoder/norm/*"])
    assert "norm" not in opened.model.params["encoder"] and not opened.model.encoder.final_norm
    del normless["cls_token"]
    path = written(tmp_path, normless, "npz")
    assert "no encoder can do without: cls_token" in refusal(open_model, path, heads=2, allow_missing=["*"])


def test_learned_positions_are_held_and_resized_only_when_another_size_is_asked_for(tree, tmp_path):
    table = np.random.default_rng(3).standard_normal((1, 17, 24)).astype(np.float32)
    path = written(tmp_path, tensors_of(tree, "timm_mae") | {"pos_embed": table}, "safetensors")
    opened = open_model(path, heads=2)
    assert opened.model.encoder.learned_positions and "ImageNet's are taken" in opened.notes[0]
    np.testing.assert_array_equal(opened.model.params["encoder"]["pos_embed"], table)
    opened = open_model(path, heads=2, image_size=56)
    assert opened.model.encoder.grid == 7
    assert opened.notes[0] == f"learned positions resized from 4 x 4 to 7 x 7 patches: {positions.RESIZED}"
    rows = torch.tensor(table[0, 1:]).double().T.reshape(1, 24, 4, 4)
    expected = torch.nn.functional.interpolate(rows, size=(7, 7), mode="bicubic", align_corners=False)
    found = opened.model.params["encoder"]["pos_embed"]
    np.testing.assert_allclose(found[0, 1:], expected.reshape(24, 49).T, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(found[0, 0], table[0, 0])


def test_positions_within_rounding_of_the_fixed_ones_are_the_fixed_ones(tree, tmp_path):
    tensors = tensors_of(tree, "hf4_encoder")
    table = "embeddings.position_embeddings"
    close = tensors | {table: tensors[table] + np.float32(5e-6)}
    assert not open_model(written(tmp_path, close, "npz"), heads=2).model.encoder.learned_positions
    far = tensors | {table: tensors[table] + np.float32(2e-5)}
    assert open_model(written(tmp_path, far, "npz"), heads=2).model.encoder.learned_positions


def test_weights_that_the_model_would_not_compute_with_are_refused(tree, tmp_path):
    tensors = tensors_of(tree, "hf4_pretraining")
    integers = tensors | {"vit.layernorm.bias": np.zeros(24, np.int64)}
    assert "no real numbers: vit.layernorm.bias" in refusal(open_model, written(tmp_path, integers, "flat"), **HEADS)
    moved = tensors | {"decoder.decoder_pos_embed": np.zeros((1, 17, 16), np.float32)}
    text = refusal(open_model, written(tmp_path, moved, "flat"), **HEADS)
    assert "decoder.decoder_pos_embed differs from the fixed" in text
    tensors = tensors_of(tree, "timm_mae")
    odd = {n: x[..., :60] if "fc2.w" in n else x[:60] for n, x in tensors.items() if "fc1" in n or "fc2.w" in n}
    assert "an MLP of 60 channels" in refusal(open_model, written(tmp_path, tensors | odd, "npz"), heads=2)


def test_an_mlp_of_another_ratio_is_computed_with(tree, tmp_path):
    tensors = tensors_of(tree, "timm_mae")
    double = {n: np.repeat(x, 2, axis=int("fc2" in n)) for n, x in tensors.items() if "fc1" in n or "fc2.w" in n}
    assert open_model(written(tmp_path, tensors | double, "npz"), heads=2).model.encoder.mlp_ratio == 8


def test_files_of_heads_alone_say_what_they_are(tmp_path):
    probe = {
        "probe": {"mean": np.zeros(24), "var": np.ones(24), "kernel": np.zeros((24, 5)), "bias": np.zeros(5)},
    }
    path = written(tmp_path, to_layout(probe, "maect_probe"), "state_dict")
    assert "holds no encoder but a linear probe; give it to convert as --head" in refusal(open_model, path)


def test_a_folder_is_its_weights_with_what_is_said_beside_them(tree, tmp_path):
    written(tmp_path, tensors_of(tree, "timm_classifier"), "safetensors").rename(tmp_path / "model.safetensors")
    config = {
        "model_args": {"num_heads": 3},
        "global_pool": "avg",
        "pretrained_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3], "crop_pct": 0.8, "license": "mit"},
        "label_names": ["a", "b", "c", "d", "e"],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = open_model(tmp_path).model
    assert (model.encoder.heads, model.pooling, model.mean, model.resize_ratio) == (3, "mean", (0.5, 0.4, 0.3), 1.25)
    assert model.classes == ("a", "b", "c", "d", "e") and model.provenance.license == "mit"
    assert model.name == tmp_path.name
    assert open_model(tmp_path, heads=4).model.encoder.heads == 4


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        "[" * 100_000,
        '{"a":' * 500 + "1" + "}" * 500,
        '{"model_args": 3, "pretrained_cfg": []}',
        '{"num_attention_heads": 1e400}',
    ],
)
def test_nonsense_beside_the_weights_counts_as_nothing_said(text, tree, tmp_path):
    written(tmp_path, tensors_of(tree, "timm_mae"), "safetensors").rename(tmp_path / "model.safetensors")
    for name in ("config.json", "preprocessor_config.json", "README.md"):
        (tmp_path / name).write_text(text)
    refusal(open_model, tmp_path, ConfigError)
    assert open_model(tmp_path, heads=2).model.provenance.license == "unknown"


def test_a_pipe_beside_the_weights_is_not_waited_for(tree, tmp_path):
    written(tmp_path, tensors_of(tree, "timm_mae"), "safetensors").rename(tmp_path / "model.safetensors")
    os.mkfifo(tmp_path / "config.json")
    assert open_model(tmp_path, heads=2).model.encoder.heads == 2


def test_a_folder_without_weights_or_with_split_ones_is_refused(tmp_path):
    assert "nor a folder with model.safetensors" in refusal(open_model, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert "split over several files" in refusal(open_model, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"pos_embed": np.zeros((1, 17, 0), np.float32)},
        {"pos_embed": np.zeros((17, 24), np.float32)},
        {"pos_embed": np.zeros((1, 20, 24), np.float32)},
        {"patch_embed.proj.weight": np.zeros((24, 3, 0, 0), np.float32)},
        {"patch_embed.proj.weight": np.zeros((24, 3, 8, 4), np.float32)},
        {"blocks.999.norm1.bias": np.zeros(24, np.float32)},
        {f"blocks.{'9' * 200}.norm1.bias": np.zeros(24, np.float32)},
        {"cls_token": np.zeros((), np.float32)},
    ],
    ids=lambda changes: next(iter(changes))[:30],
)
def test_shapes_and_names_made_to_confuse_are_refused(changes, tree, tmp_path):
    path = written(tmp_path, tensors_of(tree, "timm_mae") | changes, "npz")
    assert "fits no known layout" in refusal(open_model, path, heads=2)


def test_a_note_nested_too_deep_says_nothing(tree, tmp_path):
    deep: dict = {}
    for _ in range(900):
        deep = {"recipe": deep}
    tensors = {name: np.ascontiguousarray(x) for name, x in tensors_of(tree, "timm_mae").items()}
    note = json.dumps({"heads": 2, "provenance": {"license": "mit", "recipe": deep}})
    safetensors.numpy.save_file(tensors, tmp_path / "x", {"maect_jax": note})
    model = open_model(tmp_path / "x", heads=2).model
    assert model.provenance.license == "unknown" and model.provenance.as_dict()["recipe"] == {}


def test_the_licence_of_a_card_is_read_and_of_other_its_name(tree, tmp_path):
    written(tmp_path, tensors_of(tree, "timm_mae"), "safetensors").rename(tmp_path / "model.safetensors")
    for front, license in (
        ("license: apache-2.0", "apache-2.0"),
        ("license: other\nlicense_name: none-stated", "none-stated"),
        ("license: other", "other"),
        ("tags:\n- mae", "unknown"),
    ):
        (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# x\nlicense: mit\n")
        assert open_model(tmp_path, heads=2).model.provenance.license == license


def test_what_transformers_says_beside_the_weights_is_taken(tree, tmp_path):
    tensors = tensors_of(tree, "hf4_classifier")
    written(tmp_path, tensors, "safetensors").rename(tmp_path / "model.safetensors")
    config = {"num_attention_heads": 3, "hidden_act": "gelu", "id2label": {str(i): f"class {i}" for i in range(5)}}
    processor = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    processor |= {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    model = open_model(tmp_path).model
    assert (model.encoder.heads, model.mean, model.std, model.resize_ratio) == (3, (0.5,) * 3, (0.25,) * 3, 1.25)
    assert model.classes[4] == "class 4"
    whole = {"image_mean": [0.5] * 3, "size": {"height": 32, "width": 32}}  # squashed, neither cut nor normalised
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(whole | {"do_normalize": False}))
    model = open_model(tmp_path).model
    assert (model.mean, model.std, model.resize_ratio) == ((0.0,) * 3, (1.0,) * 3, 1.0)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"hidden_act": "gelu_new"}, "hidden_act 'gelu_new'"),
        ({"model_args": {"act_layer": "relu"}}, "act_layer 'relu'"),
        ({"model_args": {"norm_layer": "rmsnorm", "img_size": 32}}, "norm_layer 'rmsnorm'"),
        ({"global_pool": "avgmax"}, "global_pool 'avgmax'"),
    ],
)
def test_settings_that_compute_something_else_are_refused(config, why, tree, tmp_path):
    written(tmp_path, tensors_of(tree, "timm_classifier"), "safetensors").rename(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert f"config.json says {why}, with which our models do not compute" in refusal(open_model, tmp_path, heads=2)


def test_what_is_done_otherwise_than_a_file_says_is_noted(tree, tmp_path):
    written(tmp_path, tensors_of(tree, "hf4_model"), "safetensors").rename(tmp_path / "model.safetensors")
    for epsilon, noted in ((1e-6, False), (1e-12, False), (1e-2, True)):
        (tmp_path / "config.json").write_text(json.dumps({"layer_norm_eps": epsilon}))
        notes = open_model(tmp_path, heads=2).notes
        assert any("layer_norm_eps 0.01; computed here is 1e-6" in note for note in notes) == noted
    state = {name: torch.tensor(x) for name, x in tensors_of(tree, "timm_mae").items()}
    torch.save({"model": state, "model_ema": state, "optimizer": {}}, tmp_path / "x.pth")
    assert "beside the weights lies 'model_ema', which is not read" in open_model(tmp_path / "x.pth", heads=2).notes[0]


def test_mean_and_deviation_may_be_given(tree, tmp_path):
    learned = tensors_of(tree, "timm_mae") | {"pos_embed": np.ones((1, 17, 24), np.float32)}
    path = written(tmp_path, learned, "npz")
    given = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    opened = open_model(path, heads=2, **given)
    assert opened.notes == () and (opened.model.mean, opened.model.std) == ((0.5,) * 3, (0.25,) * 3)
    assert "mean: 1 values" in refusal(open_model, path, ConfigError, heads=2, mean=(0.5,))


def test_patterns_that_name_no_part_are_refused(tree, tmp_path):
    path = written(tmp_path, tensors_of(tree, "timm_mae"), "npz")
    with pytest.raises(ConfigError, match=r"'decodr/\*' is no part .* 'decoder/\*'"):
        open_model(path, heads=2, allow_missing=["decodr/*"])
