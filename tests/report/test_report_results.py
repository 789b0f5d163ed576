"""The table holds what was recorded, and in one row only what can be compared."""

import json

import pytest

from made_up import HOSTILE, RESULTS, Page, make_record, make_workdir, write_lines
from maect_jax.report.html import write_report

HEADINGS = {
    "knn": "Nearest neighbours vote (k-NN)",
    "linear": "Linear probe",
    "logreg": "Few labels: logistic regression maect-logreg 5 per class",
    "ridge": "Few labels: ridge regression bigvision-fewshot 10 per class",
    "robustness": "Robustness: classifiers, unchanged, on other test sets maect-linear on dim pictures",
    "cluster": "Clusters found without labels (k-means) ours-cluster",
    "retrieval": "Retrieval: pictures of the same class among the nearest ours-retrieval",
    "health": "Health of the features: neither direction is better by itself ours-health",
    "colour": "Colours still readable from the features ours-colour",
}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return Page(write_report(make_workdir(tmp_path_factory.mktemp("runs") / "run")))


def report_of(path, *records: dict) -> Page:
    write_lines(path / "results.jsonl", list(records))
    return Page(write_report(path))


def numbers(text: str) -> list[float]:
    """The numbers of a cell, minus signs as printed."""
    words = text.replace("−", "-").replace(",", "").replace("±", " ").split()
    return [float(word) for word in words if word.lstrip("+-").replace(".", "", 1).isdigit()]


def test_rows_stand_in_groups_and_hold_the_recorded_values(page):
    head, *rows = page.tables[0]
    assert [cell.strip() for cell in head] == [
        "Evaluation",
        "MAE",
        "MAE, trained on instead (control)",
        "MAE-CT",
        "MAE-CT − MAE",
        "MAE-CT − control",
    ]
    groups = [" ".join(row[0].split()) for row in rows if len(row) == 1]
    assert groups == list(HEADINGS.values())
    values = [row[1:] for row in rows if len(row) > 1]
    assert len(values) == len(RESULTS)
    exact = [float(cell["data-value"]) for cell in page.named("td") if "data-value" in cell]
    expected = []
    for cells, ((_, _, _, unit), (before, control, after)) in zip(values, RESULTS.items()):
        change = [None if other is None else after - other for other in (before, control)]
        for text, value in zip(cells, [before, control, after, *change], strict=True):
            if value is None:
                assert text.strip() == "–"
                continue
            factor, rounding = (100, 0.0501) if unit else (1, max(0.51 * (abs(value) > 1000), 6e-4 * abs(value)))
            assert abs(numbers(text)[0] - factor * value) <= rounding
            expected.append(value)
    assert exact == pytest.approx(expected, abs=1e-12)


def test_intervals_repeats_and_runs_stand_below_their_value(page):
    cells = [[" ".join(cell.split()) for cell in row] for row in page.tables[0] if len(row) > 1][1:]
    assert cells[0][1] == "42.1 40.6 to 43.7"  # 0.4213 ± 0.0153
    few = next(row for row in cells if row[1].startswith("31.1"))
    assert few[1] == "31.1 29.5 to 32.6 ± 1.2, 3 repeats"
    nmi = next(row for row in cells if row[0].startswith("NMI"))
    assert nmi[1] == "29.5 all runs 27.5 ± 1.1"
    assert next(row for row in cells if row[0] == "silhouette")[1] == "0.0421"


def test_best_is_marked_only_where_one_direction_is_better(tmp_path):
    values = {"pretrain": 2.0, "control": 3.0, "tune": 1.0}
    best = {
        ("cluster", "davies_bouldin"): "1",
        ("colour", "error"): "1",
        ("cluster", "silhouette"): "3",
        ("retrieval", "purity@10"): "3",
        ("cluster", "inertia"): None,
        ("health", "effective_rank"): None,
        ("health", "uniformity"): None,
        ("health", "alignment"): None,
    }
    for (evaluation, metric), expected in best.items():
        records = [make_record(stage, evaluation, metric, "p", value, unit="") for stage, value in values.items()]
        source = report_of(tmp_path, *records).source
        table = source[source.index('<table class="results"') : source.index("Protocol of each number")]
        assert [part.split("</b>")[0] for part in table.split("<b>")[1:]] == ([expected] if expected else [])
        assert ("lower is better" in table) == (expected == "1")


def test_newest_record_counts_and_seeds_are_averaged(tmp_path):
    tune = [make_record("tune", "knn", "loss", "p", value, seed=seed) for value, seed in ((0.1, 0), (0.5, 0), (0.3, 1))]
    page = report_of(tmp_path, *tune, make_record("pretrain", "knn", "loss", "p", 0.35))
    cells = [cell.strip() for cell in page.tables[0][2][1:]]
    assert cells == ["35.0", "40.0 ± 14.1, 2 seeds", "+5.0"]
    assert "<b>35.0</b>" in page.source  # of a loss the lower is the better
    assert "No headline" in page.text


def test_values_of_unlike_protocols_never_share_a_row(tmp_path):
    page = report_of(
        tmp_path,
        make_record("pretrain", "knn", "accuracy", "maect-knn", 0.41, protocol={"k": 10}, interval=None),
        make_record("control", "knn", "accuracy", "maect-knn", 0.43, protocol={"k": 10}, interval=None),
        make_record(
            "tune",
            "knn",
            "accuracy",
            "maect-knn",
            0.66,
            protocol={"k": 20, "transform": {"size": HOSTILE}},
            interval=None,
        ),
        make_record("pretrain", "linear", "accuracy", "maect-linear", 0.61, interval=None),
        make_record("tune", "linear", "accuracy", "maect-linear", 0.71, weights={"sha256": "other"}, interval=None),
    )
    _, _, first, second, _, probe = [[" ".join(cell.split()) for cell in row] for row in page.tables[0]]
    note = "not comparable with its namesakes: k = "
    assert f"{note}10" in first[0] and f"{note}20" in second[0] and f"transform.size = {HOSTILE}" in second[0]
    assert first[1:] == ["41.0", "43.0", "–", "–", "–"]
    assert second[1:] == ["–", "–", "66.0", "–", "–"]
    assert "not comparable" not in probe[0] and probe[1:] == ["61.0", "–", "71.0", "+10.0", "–"]
    assert "No headline" in page.text  # there is nothing to compare


def test_many_unlike_settings_are_counted(tmp_path):
    settings = {f"setting_{i}": i for i in range(9)}
    page = report_of(
        tmp_path,
        make_record("pretrain", "knn", "accuracy", "p", 0.4, protocol=settings),
        make_record("tune", "knn", "accuracy", "p", 0.5),
    )
    assert "setting_5 = 5 and 3 more" in page.words and "setting_5 = not given and 3 more" in page.words


def test_what_was_chosen_is_no_setting(tmp_path):
    records = [
        make_record(stage, "linear", "accuracy", "maect-linear", value, found={"base_rate": value, "epoch": epoch})
        for stage, value, epoch in (("pretrain", 0.6, 40), ("tune", 0.7, 50))
    ]
    page = report_of(tmp_path, *records)
    assert "not comparable" not in page.text
    settings = page.rows(1)
    assert settings["found.base_rate"] == ["0.6", "0.7"] and settings["found.epoch"] == ["40", "50"]
    assert settings["weights.sha256"] == ["pretrain-5f1c9e", "tune-5f1c9e"] and settings["train.hash"] == [
        "aa11",
        "aa11",
    ]


def test_records_of_the_first_schema_are_shown(tmp_path):
    page = report_of(
        tmp_path,
        *(
            {"stage": stage, "evaluation": "linear", "metric": "accuracy", "value": value, "weights": "5f1c", "step": 9}
            | {"protocol": {"name": "maect-linear", "batch": 64, "base_rate": value, "epoch": 3}, "seed": 0}
            for stage, value in (("pretrain", 0.25), ("tune", 0.5))
        ),
        {"stage": "tune", "evaluation": "knn", "metric": "accuracy", "value": 0.75, "protocol": "just a name"},
    )
    rows = [[cell.strip() for cell in row] for row in page.tables[0]]
    assert rows[2][1:] == ["–", "75.0", "–"] and rows[4][1:] == ["25.0", "50.0", "+25.0"]
    assert "just a name" in rows[1][0] and "not comparable" not in page.text
    assert page.rows(1)["weights.sha256"] == ["5f1c", "5f1c"]


def test_fields_of_unexpected_kinds_count_as_not_there(tmp_path):
    odd = {"interval": ["a", None], "values": 3, "found": [1], "weights": [2], "std": "x", "unit": 7, "seed": None}
    page = report_of(
        tmp_path,
        make_record("tune", "knn", "accuracy", "maect-knn", 0.5) | odd,
        make_record("tune", "knn", "accuracy", "not a number", float("nan")),
        make_record("tune", "knn", "loss", "too large", 10**400),
        {"evaluation": "knn", "value": True},
        {"value": 0.25, "protocol": 7},
    )
    assert [[cell.strip() for cell in row[1:]] for row in page.tables[0][2::2]] == [["50.0", "–"], ["–", "25.0"]]


def test_other_weights_have_columns_of_their_own(tmp_path):
    stages = ["vit_large", "tune, raw", "tune", "pretrain", "an encoder"]
    page = report_of(tmp_path, *(make_record(stage, "knn", "accuracy", "p", 0.5) for stage in stages))
    head = [cell.strip() for cell in page.tables[0][0]]
    assert head[1:-1] == ["MAE", "MAE-CT", "MAE-CT, raw weights", "an encoder", "vit_large"]


@pytest.mark.parametrize("file", ["data.json", "shared.json"])
def test_shared_pictures_are_warned_of_above_the_table(tmp_path, file):
    record = make_record("tune", "knn", "accuracy", "p", 0.5)
    (tmp_path / file).write_text(json.dumps({"train": "a", "shared": 1200}))
    words = report_of(tmp_path, record).words
    warning = "1,200 test pictures are also among the training pictures"
    assert words.index(warning) < words.index("Results")
    (tmp_path / file).write_text(json.dumps({"shared": 3, "test_pictures": 720}))
    assert "3 of 720 test pictures are also among" in report_of(tmp_path, record).words
    for nothing in (0, None, "x", True, -1, [2]):
        (tmp_path / file).write_text(json.dumps({"shared": nothing}))
        assert "also among" not in report_of(tmp_path, record).words


def test_long_settings_are_cut(tmp_path):
    record = make_record("tune", "linear", "accuracy", "maect-linear", 0.5, found={"heads": [{"rate": 0.1}] * 5000})
    page = report_of(tmp_path, record)
    assert page.rows(1)["found.heads"][0].endswith("…") and len(page.source) < 60_000


def layers(stage: str, values: list[float], **protocol) -> list[dict]:
    return [
        make_record(stage, "knn_layers", "accuracy", f"maect-knn, block {i}", value, protocol={"block": i} | protocol)
        for i, value in enumerate(values, 1)
    ]


def test_layers_are_a_chart_with_its_values_and_no_rows(page, tmp_path):
    assert not any("block" in cell for row in page.tables[0] for cell in row)
    assert next(svg["aria-label"] for svg in page.named("svg")) == "k-NN accuracy after each block"
    alone = report_of(tmp_path, *layers("tune", [0.2, 0.31, 0.454]), *layers("pretrain", [0.2, 0.3]))
    assert alone.rows(0) == {
        "Block": ["MAE %", "MAE-CT %"],
        "1": ["20.0", "20.0"],
        "2": ["30.0", "31.0"],
        "3": ["–", "45.4"],
    }
    assert "No table of results" in alone.text and "No k-NN by layer" not in alone.text


def test_layers_of_unlike_protocols_are_not_drawn_together(tmp_path):
    page = report_of(tmp_path, *layers("pretrain", [0.2, 0.3], k=10), *layers("tune", [0.2, 0.4], k=20))
    assert len(page.named("svg")) == 2 and len(page.tables) == 2
    assert "k = 10" in page.text and "k = 20" in page.text
    odd = [
        record | {"protocol": {"name": "p", "block": block}}
        for record, block in zip(layers("tune", [0.1] * 3), ([], "x", -1))
    ]
    assert "No k-NN by layer" in report_of(tmp_path, *odd).text
