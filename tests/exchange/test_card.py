"""What the model card tells of a model: facts, use, training, licence, files, proof."""

import dataclasses
import hashlib
import importlib.metadata

import numpy as np
import pytest
import yaml
from cards import TITLES, Shown, filled, parts, render

from maect_jax.exchange.export.proof import Proof
from maect_jax.exchange.export.targets import TARGETS
from maect_jax.exchange.provenance import NONE_STATED, OWN, UNKNOWN, Provenance
from models import random_model, weightless_model


@pytest.fixture
def folder(tmp_path):
    return filled(tmp_path)


def test_card_tells_what_the_model_is_and_how_to_use_it(folder):
    model = weightless_model("B/16")
    head = {"kernel": np.zeros((768, 4)), "bias": np.zeros(4)}
    model = dataclasses.replace(model, name="digits-tune", params=model.params | {"head": head})
    front, body = parts(render(folder, model))
    assert front == {
        "license": "unknown",
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["vision-transformer"],
    }
    shown = Shown(body)
    assert shown.headings == [("h1", "digits-tune"), *(("h2", title) for title in TITLES)]
    # 85,647,360 without its fixed table of positions, and the head's 3,076
    assert "A Vision Transformer of 85.7 million parameters with a classifier of 4 classes" in shown.text
    size = "ViT-B/16: width 768, 12 blocks, 12 heads, patches of 16 x 16 pixels"
    assert ["architecture", size] in shown.rows
    assert ["pictures", "224 x 224 pixels, 3 channels"] in shown.rows
    assert ["feature of a picture", "class token, after the final norm"] in shown.rows
    assert shown.fences["python"].rstrip() == TARGETS["timm"].usage(model).rstrip()
    assert "brought to 256 pixels" in shown.text and "0.485, 0.456, 0.406" in shown.text
    assert "None are known of these weights." in shown.text
    assert "Not checked: no library." in shown.text
    assert "html_block" not in shown.types


def test_feature_is_named(folder):
    for changes, feature in (
        (dict(pooling="mean"), "mean of the patch tokens, after the final norm"),
        (dict(fc_norm=True), "mean of the patch tokens, then a norm"),
    ):
        shown = Shown(parts(render(folder, random_model(**changes)))[1])
        assert ["feature of a picture", feature] in shown.rows


@pytest.mark.parametrize(
    ("normalised", "says"),
    [
        (True, "Pixels normalised patch by patch"),
        (False, "Pixels of the preprocessed picture, not normalised patch by patch"),
        (None, "It is not known whether it predicts"),
    ],
)
def test_pixels_that_the_decoder_predicts_are_named(normalised, says, folder):
    model = random_model(decoder=True, normalised_pixels=normalised, mask_ratio=0.6)
    shown = Shown(parts(render(folder, model, "mae"))[1])
    chapter = shown.headings.index(("h2", "What the decoder predicts"))
    assert shown.headings[chapter - 1] == ("h2", "Preprocessing")
    assert sum(text in shown.text for text in ("Pixels normalised", "Pixels of the", "It is not known")) == 1
    assert says in shown.text
    assert ["decoder", "width 32, 2 blocks, 4 heads; 60 % of the patches are removed"] in shown.rows


@pytest.mark.parametrize(
    ("license", "front"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("CC-BY-NC-4.0", {"license": "cc-by-nc-4.0"}),
        ("GPL-3.0-or-later", {"license": "gpl-3.0"}),
        (UNKNOWN, {"license": "unknown"}),
        (NONE_STATED, {"license": "other", "license_name": "none-stated"}),
        (OWN, {"license": "other", "license_name": "unstated"}),
        ("Our Licence, v2: 'no' harm\n---\n", {"license": "other", "license_name": "our-licence-v2-no-harm"}),
    ],
)
def test_licence_is_spelled_as_the_hub_spells_it_and_told_in_full(license, front, folder):
    origin = Provenance(license=license, license_source="its owner")
    found, body = parts(render(folder, random_model(provenance=origin)))
    assert {name: text for name, text in found.items() if name.startswith("license")} == front
    assert f"{' '.join(license.split())} (its owner)" in Shown(body).text


def test_training_and_what_the_weights_were_made_from_are_told(folder):
    recipe = {"seed": 3, "model": {"width": 48, "names": ["a", None]}, "rate": 1e-3, "text": "ü: -"}
    chain = (
        {"name": "mine", "stage": "pretrain", "sha256": "1" * 64, "license": OWN},
        {"name": "mae.pth", "layout": "mae_official_full", "sha256": "2" * 64, "license": "CC-BY-NC-4.0"},
    )
    origin = Provenance(
        derived_from=chain, recipe=recipe, stage="tune", step=300, average="exponential, 0.99", trained_on="digits"
    )
    shown = Shown(parts(render(folder, random_model(provenance=origin)))[1])
    rows = [
        ["stage", "tune"],
        ["step", "300"],
        ["average of the weights", "exponential, 0.99"],
        ["trained on", "digits"],
        ["mine", "pretrain", OWN, "1" * 64],
        ["mae.pth", "mae_official_full", "CC-BY-NC-4.0", "2" * 64],
    ]
    assert [row for row in shown.rows if row in rows] == rows
    assert yaml.safe_load(shown.fences["yaml"]) == recipe
    assert shown.html == ["<details><summary>Settings</summary>", "</details>"]


MAECT, MAE = ([f"https://arxiv.org/abs/{number}"] for number in ("2304.10520", "2111.06377"))
MASKED = ["masked-autoencoder", "self-supervised-learning"]
EARLIER = {"name": "mine", "stage": "pretrain"}


@pytest.mark.parametrize(
    ("stage", "origins", "learned", "made", "tags", "links"),
    [
        ("pretrain", (), False, "pre-trained as a masked autoencoder, the first", MASKED, MAECT),
        ("control", (EARLIER,), False, "trained on as a masked autoencoder, for", MASKED, MAECT),
        ("head", (EARLIER,), False, "pre-trained as a masked autoencoder, the first", MASKED, MAE),
        ("tune", (EARLIER,), False, "trained by MAE-CT", ["mae-ct", *MASKED], MAECT),
        ("tune, raw", (EARLIER,), False, "trained by MAE-CT", ["mae-ct", *MASKED], MAECT),
        ("tune", ({"layout": "timm_classifier"},), True, "trained by MAE-CT", ["mae-ct", MASKED[1]], MAECT),
        ("", ({"layout": "maect_encoder"},), False, "converted from weights of MAE-CT", ["mae-ct", *MASKED], MAECT),
        ("", ({"layout": "mae_official_full"},), False, "converted from weights of a masked", MASKED, MAE),
        ("", ({"layout": "mae_official_encoder"},), False, "converted from weights of a masked", MASKED, MAE),
        ("", ({"layout": "mae_finetuned"},), True, "converted from weights of a masked", MASKED, MAE),
        ("", ({"layout": "hf4_pretraining"},), False, "converted from weights of a masked", MASKED, MAE),
        ("", ({"layout": "mae_official_encoder"},), True, "converted from weights of others", [], []),
        ("", ({"layout": "timm_classifier"},), True, "converted from weights of others", [], []),
        ("", ({"layout": "hf5_classifier"},), True, "converted from weights of others", [], []),
        ("", (), False, "converted from weights of others", [], []),
        ("mae-finetune", ({"stage": "tune"}, EARLIER), True, "from weights of MAE-CT", ["mae-ct", *MASKED], MAECT),
        ("finetune-1pct", (EARLIER,), True, "('finetune-1pct') from weights of a masked", MASKED, MAE),
        ("mae-finetune", ({"layout": "timm_classifier"},), True, "('mae-finetune') from weights of others", [], []),
    ],
)
def test_only_what_the_provenance_tells_is_claimed(stage, origins, learned, made, tags, links, folder):
    model = random_model(provenance=Provenance(stage=stage, derived_from=origins), learned_positions=learned)
    front, body = parts(render(folder, model))
    shown = Shown(body)
    assert made in shown.text
    assert front["tags"] == [*tags, "vision-transformer"] and shown.links == links
    assert ("fine-tuned with labels" in shown.text) == ("finetune" in stage)
    assert ("MAE-CT" in shown.text) == (links == MAECT or stage == "head")


EMAE, DMJD = ([f"https://arxiv.org/abs/{number}"] for number in ("2302.14431", "2301.00230"))
SELF_CONSISTENT = ["masked-autoencoder", "emae", "self-supervised-learning"]
TUNED = {"stages": ["head", "tune"], "init_from": ""}


@pytest.mark.parametrize(
    ("stage", "method", "settings", "made", "tags", "links"),
    [
        ("pretrain", "emae", {}, "a self-consistent masked autoencoder (EMAE), the", SELF_CONSISTENT, MAECT + EMAE),
        ("control", "emae", {"init_from": "x"}, "autoencoder (EMAE), for comparison", SELF_CONSISTENT, MAECT + EMAE),
        ("head", "emae", TUNED, "masked autoencoder (EMAE), the first", SELF_CONSISTENT, MAE + EMAE),
        ("tune", "emae", TUNED, "trained by EMAE-CT", ["mae-ct", *SELF_CONSISTENT], MAECT + EMAE),
        ("tune, raw", "emae", TUNED, "trained by EMAE-CT", ["mae-ct", *SELF_CONSISTENT], MAECT + EMAE),
        (
            "tune",
            "emae",
            {"stages": ["pretrain", "head", "tune"], "init_from": "mae.pth"},
            "trained by EMAE-CT",
            ["mae-ct", *SELF_CONSISTENT],
            MAECT + EMAE,
        ),
        ("pretrain", "disjoint", {}, "a masked autoencoder with disjoint masks, the first", MASKED, MAECT + DMJD),
        ("tune", "disjoint", TUNED, "trained by MAE-CT", ["mae-ct", *MASKED], MAECT + DMJD),
        ("tune", "mae", TUNED, "trained by MAE-CT", ["mae-ct", *MASKED], MAECT),
        # pre-trained by another run, whose settings these are not
        ("tune", "emae", TUNED | {"init_from": "earlier"}, "trained by MAE-CT", ["mae-ct", *MASKED], MAECT),
        ("tune", ["emae"], {"stages": 3}, "trained by MAE-CT", ["mae-ct", *MASKED], MAECT),
        ("pretrain", "{masked}<script>", {}, "pre-trained as a masked autoencoder, the first", MASKED, MAECT),
    ],
)
def test_the_way_of_pretraining_is_the_one_of_the_recipe(stage, method, settings, made, tags, links, folder):
    earlier = () if stage == "pretrain" else (EARLIER,)
    origin = Provenance(stage=stage, derived_from=earlier, recipe={"pretrain": {"method": method}} | settings)
    front, body = parts(render(folder, random_model(provenance=origin)))
    shown = Shown(body)
    assert made in shown.text and front["tags"] == [*tags, "vision-transformer"] and shown.links == links
    assert ("EMAE" in shown.text) == (EMAE[0] in links) and shown.html == [
        "<details><summary>Settings</summary>",
        "</details>",
    ]


@pytest.mark.parametrize(
    ("stage", "recipe", "made"),
    [
        ("tune", {"pretrain": {"method": "mae"}, "init_from": "earlier", "stages": ["head", "tune"]}, "EMAE-CT"),
        ("mae-finetune", {"name": "mae-finetune"}, "fine-tuned with labels"),
    ],
)
def test_the_way_of_pretraining_is_known_of_weights_that_another_run_pretrained(stage, recipe, made, folder):
    origin = Provenance(stage=stage, derived_from=(EARLIER | {"method": "emae"},), recipe=recipe)
    front, body = parts(render(folder, random_model(provenance=origin)))
    assert "emae" in front["tags"] and made in Shown(body).text and EMAE[0] in Shown(body).links


def test_a_decoder_tells_a_masked_autoencoder(folder):
    front, body = parts(render(folder, random_model(decoder=True), "mae"))
    assert front["tags"] == [*MASKED, "vision-transformer"] and Shown(body).links == MAE


def test_files_stand_with_size_and_sha256(folder):
    shown = Shown(parts(render(folder, random_model()))[1])
    for path in folder.iterdir():
        size, sha256 = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
        assert [path.name, str(size), sha256] in shown.rows


def test_proof_is_told_with_versions_and_definition(folder):
    version = importlib.metadata.version("timm")
    proof = Proof({"tokens": 3.21e-7, "loss": 0.0})
    body = parts(render(folder, random_model(), proof=proof, dtype="bfloat16"))[1]
    shown = Shown(body)
    assert ["tokens", "3.2e-07"] in shown.rows and ["loss", "0.0e+00"] in shown.rows
    assert f"timm {version}, torch 2" in shown.text and "max|a − b| / max|b|" in shown.text
    assert "from the weights rounded to bfloat16" in shown.text and ["weights", "bfloat16"] in shown.rows
    assert "Not checked" not in shown.text


@pytest.mark.parametrize(
    "reason",
    [
        "timm can not be imported (OSError: /home/John Doe/lib/x.so: cannot open shared object file)",
        r"timm can not be imported (OSError: C:\Users\Doe\x.dll)",
        "timm can not be imported (ImportError: '../Doe/x' is broken)",
    ],
)
def test_reason_for_no_proof_holds_no_path(reason, folder):
    text = Shown(parts(render(folder, random_model(), proof=Proof(None, reason)))[1]).text
    assert "Not checked: timm can not be imported" in text
    assert "Doe" not in text and "…." in text
