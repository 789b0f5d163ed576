"""Results in the model card: those of these weights, and with a word where they were measured otherwise."""

import dataclasses

import pytest
from cards import MINE, Shown, filled, parts, record, render

from maect_jax.exchange.export import card
from maect_jax.exchange.provenance import Provenance
from models import random_model


@pytest.fixture
def folder(tmp_path):
    return filled(tmp_path)


def shown_results(folder, *records, model=None) -> Shown:
    model = model or random_model()
    entries = card.results_of(records, MINE, model.provenance)
    return Shown(parts(render(folder, model, entries=entries))[1])


def result_rows(folder, *records, model=None) -> list[list[str]]:
    rows = shown_results(folder, *records, model=model).rows
    titles = ["evaluation", "protocol", "trained on", "tested on", "metric", "value"]
    return [row for row in rows if len(row) == len(titles) and row != titles]


def test_results_stand_in_groups_with_protocol_pictures_and_interval(folder):
    rows = result_rows(
        folder,
        record("cluster", "nmi", 0.5, interval=None, std=0.0123),
        record("knn"),
        record("mine", "effective_rank", 123.456, unit="", interval=None),
        record("knn", protocol={"name": "maect-knn-std"}, value=1.0, interval=(1.0, 1.0)),
    )
    data = ["digits train", "digits test"]
    assert rows == [
        ["Nearest neighbours vote (k-NN)", "preset-knn", *data, "accuracy", "85.3 % [84.1, 86.6]"],
        ["", "maect-knn-std", *data, "accuracy", "100.0 % [100.0, 100.0]"],
        ["Clusters found without labels (k-means)", "preset-cluster", *data, "NMI", "50.0 % ± 1.2"],
        ["mine", "preset-mine", *data, "effective rank", "123.5"],
    ]


def test_only_numbers_of_these_weights_are_shown_and_the_newest_of_each(folder):
    rows = result_rows(
        folder,
        record(value=0.1),
        record(value=0.2, sha256="b" * 64, stage="pretrain"),
        record(value=0.3, weights={}, stage="control"),
        record("knn_layers", value=0.4),
        record(value=0.5),
    )
    assert [row[-1] for row in rows] == ["50.0 % [84.1, 86.6]"]


def test_numbers_of_rounded_weights_are_not_claimed(folder):
    entries = card.results_of([record()], MINE, Provenance())
    for dtype, told in (("bfloat16", True), ("float32", False)):
        text = Shown(parts(render(folder, random_model(), entries=entries, dtype=dtype))[1]).text
        assert ("Of the encoder, before its weights were rounded to bfloat16." in text) == told


# --------------------------------------------------------------------------------------- measured otherwise, fine-tuned

TRANSFORM = {"image_size": 16, "resize_ratio": 1.142857, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"image_size": 32}, "1 of these 3 numbers with pictures of side 32."),
        ({"mean": [0.5] * 3, "std": [0.25] * 3}, "with mean [0.5, 0.5, 0.5], deviation [0.25, 0.25, 0.25]."),
        ({"resize_ratio": 1.0}, "with shorter side over crop 1.0."),
    ],
)
def test_results_on_pictures_of_another_form_are_said_to_be(folder, changes, says):
    records = [
        record("linear", protocol={"transform": TRANSFORM}),
        record("knn", protocol={"transform": TRANSFORM | changes}),
        record("ridge"),  # of an older version, which did not say
    ]
    shown = shown_results(folder, *records)
    assert ("prepared in another way than above" in shown.text) == (says is not None)
    assert says is None or says in shown.text


def test_a_feature_that_is_not_the_models_own_is_named(folder):
    records = [
        record("knn", protocol={"name": "a", "feature": "cls"}),
        record("knn", protocol={"name": "b", "feature": "mean"}),
        record("linear", protocol={"name": "c"}, found={"feature": "cls@last4+mean"}),
        record("ridge", protocol={"name": "d"}),
    ]
    for pooling, names in (
        ("cls", ["a", "b, on mean", "c, on cls@last4+mean", "d"]),
        ("mean", ["a, on cls", "b", "c, on cls@last4+mean", "d"]),
    ):
        assert [row[1] for row in result_rows(folder, *records, model=random_model(pooling=pooling))] == names


def of_finetuning(place: str, value: float, name="mae-finetune") -> dict:
    return record("finetune", value=value, found={"weights": f"/runs/{place}"}, protocol={"name": name})


def test_a_fine_tuned_model_has_the_numbers_of_its_fine_tuning_and_no_others(folder):
    head = {"name": "mae-finetune_1", "layout": "maect_jax_finetuned"}
    encoder = {"name": "mine", "stage": "tune", "sha256": MINE}
    origin = Provenance(stage="mae-finetune", step=12, derived_from=(head, encoder))
    model = random_model(fc_norm=True, classes=3, provenance=origin)
    records = [
        record("knn", value=0.1),
        of_finetuning("finetune/mae-finetune_1/chosen/12", 0.5),
        of_finetuning("finetune/mae-finetune_1/chosen/6", 0.2, "another step"),
        of_finetuning("finetune/mae-finetune_2/chosen/12", 0.3),  # the newest of its name
        record("finetune", value=0.4, protocol={"name": "mae-finetune, selected on test"}, found={"epoch": 2}),
    ]
    shown = shown_results(folder, *records, model=model)
    rows = [row for row in shown.rows if row[0] == "Fine-tuning"]
    data = ["digits train", "digits test"]
    assert rows == [["Fine-tuning", "mae-finetune", *data, "accuracy", "50.0 % [84.1, 86.6]"]]
    assert len(result_rows(folder, *records, model=model)) == 1
    assert "Of this classifier, at the epoch that held-out training pictures chose." in shown.text
    assert "None are known" not in shown.text
    others = dataclasses.replace(origin, step=6)
    shown = shown_results(folder, *records[:2], model=dataclasses.replace(model, provenance=others))
    assert "None are known of these weights." in shown.text
