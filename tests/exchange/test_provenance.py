"""Licences are told by what weights are, travel with them, and are loosened only with a reason."""

import pytest

from maect_jax.errors import ConfigError
from maect_jax.exchange.licenses import license_of
from maect_jax.exchange.provenance import Provenance, from_dict, stated, strictest, strictness, trained, without_place
from maect_jax.models.vit import ViT

LARGE = ViT(1024, 24, 16, 16, 224)


@pytest.mark.parametrize(
    ("layout", "encoder", "said", "notes", "md5", "license"),
    [
        ("mae_official_encoder", LARGE, None, {}, "b8b06e" + 26 * "0", "CC-BY-NC-4.0"),
        ("mae_official_encoder", LARGE, "mit", {}, "b8b06e" + 26 * "0", "CC-BY-NC-4.0"),
        ("mae_official_encoder", LARGE, "mit", {}, 32 * "0", "mit"),
        ("mae_official_encoder", LARGE, None, {}, 32 * "0", "CC-BY-NC-4.0"),
        ("mae_official_encoder", LARGE, None, {"optimizer": "dict"}, 32 * "0", "unknown"),
        ("mae_official_encoder", LARGE.clone(learned_positions=True), None, {}, 32 * "0", "unknown"),
        ("mae_official_encoder", ViT(96, 2, 3, 16, 224), None, {}, 32 * "0", "unknown"),
        ("mae_finetuned", LARGE.clone(learned_positions=True), None, {}, 32 * "0", "CC-BY-NC-4.0"),
        ("hf4_pretraining", LARGE, None, {}, 32 * "0", "CC-BY-NC-4.0"),
        ("maect_encoder", LARGE, None, {}, 32 * "0", "none stated"),
    ],
)
def test_licences_of_others_follow_from_what_the_file_is(layout, encoder, said, notes, md5, license):
    assert license_of(layout, encoder, said, notes, md5)[0] == license


def test_licences_are_ordered_from_own_weights_to_none_stated():
    order = ["unstated", "Apache-2.0", "unknown", "CC-BY-NC-SA-4.0", "none stated"]
    assert sorted(order[::-1], key=strictness) == order
    assert strictness("none-stated") == 4 and strictness("Non-Commercial terms") == 3
    for unlisted in ("other", "AGPL-3.0", "All rights reserved", "CC-BY-ND-4.0"):
        assert strictness(unlisted) == 2


def test_training_on_keeps_the_licence_and_lengthens_the_chain():
    file = {"name": "a.pth", "sha256": "0", "layout": "mae_official_full", "license": "CC-BY-NC-4.0"}
    before = Provenance("CC-BY-NC-4.0", "published", (file,))
    head = trained(before, None, stage="head", recipe={}, trained_on="mine")
    stage = {"name": "run", "stage": "head", "sha256": "1", "license": head.license}
    tuned = trained(head, stage, stage="tune", recipe={}, trained_on="mine", average="exponential, 0.99")
    assert (tuned.license, tuned.license_source) == ("CC-BY-NC-4.0", "published")
    assert tuned.derived_from == (stage, file)
    assert trained(None, None, stage="pretrain", recipe={}, trained_on="mine").license == "unstated"
    assert strictest(tuned, Provenance("none stated", "release"))[0] == "none stated"


def test_a_looser_licence_needs_a_reason_and_keeps_what_was_carried():
    carried = Provenance("CC-BY-NC-4.0", "published")
    with pytest.raises(ConfigError, match="looser than 'CC-BY-NC"):
        stated(carried, "MIT", "")
    found = stated(carried, "MIT", "the authors allowed it")
    assert found.license == "MIT" and "the authors allowed it" in found.license_source
    assert "CC-BY-NC-4.0" in found.license_source
    assert stated(Provenance("unstated", "trained from scratch"), "CC-BY-NC-4.0", "").license == "CC-BY-NC-4.0"
    assert stated(carried, "", "") is carried
    with pytest.raises(ConfigError, match="--license-reason"):
        stated(carried, "", "the authors allowed it")


def test_what_a_file_says_of_its_provenance_is_read_value_by_value():
    whole = Provenance("mit", "me", ({"name": "x"},), "mine", {"seed": 0}, "tune", 7, "none", "0.1")
    assert from_dict(whole.as_dict()) == whole
    odd = {"license": 3, "derived_from": ["x", {"name": "y"}], "step": "7", "recipe": [], "stage": "tune"}
    found = from_dict(odd)
    assert found.license == "unknown" and found.derived_from == ({"name": "y"},) and found.step is None
    assert found.recipe == {} and found.stage == "tune"


def test_paths_are_shortened_to_names_and_names_of_data_sets_stay():
    assert without_place("../me/pictures") == without_place("/home/me/pictures") == "pictures"
    assert without_place("gs://bucket/pictures") == "pictures"
    assert without_place("imagenet2012_subset/1pct") == "imagenet2012_subset/1pct" and without_place("") == ""
