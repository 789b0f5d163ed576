"""Records: nothing lost, the newest counts, unlike protocols are refused."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from etils import epath

from maect_jax.errors import ConfigError
from maect_jax.results.compare import compare, differing, read_column
from maect_jax.results.record import Record, add_records, read_records, weights_hash


def record(value=0.5, stage="tune", metric="accuracy", **protocol):
    protocol = {"name": "maect-knn", "k": 10, "test": {"name": "pets", "hash": "abc"}} | protocol
    return Record(
        stage=stage,
        seed=0,
        evaluation="knn",
        metric=metric,
        value=value,
        unit="fraction",
        interval=(value - 0.1, value + 0.1),
        std=None,
        values=None,
        protocol=protocol,
        found={},
        weights={"sha256": stage},
        model={"width": 8},
        cost={},
    )


def test_a_record_comes_back_as_it_was_written(tmp_path):
    path = epath.Path(tmp_path) / "results.jsonl"
    add_records(path, [record(0.25, k=20)])
    (found,) = read_records(path)
    assert found["protocol"] == {"name": "maect-knn", "k": 20, "test": {"name": "pets", "hash": "abc"}}
    assert (found["value"], found["interval"], found["schema"]) == (0.25, [0.15, 0.35], 2)
    assert {"jax", "maect_jax", "devices"} <= found["software"].keys()


def test_lines_are_only_added_and_the_newest_counts(tmp_path):
    path = epath.Path(tmp_path) / "results.jsonl"
    add_records(path, [record(0.1), record(0.2, stage="pretrain")])
    before = path.read_text()
    add_records(path, [record(0.3)])
    assert path.read_text().startswith(before)
    assert [(r["stage"], r["value"]) for r in read_records(path)] == [("tune", 0.3), ("pretrain", 0.2)]


def test_results_on_another_test_set_stand_beside_the_first(tmp_path):
    path = epath.Path(tmp_path) / "results.jsonl"
    add_records(path, [record(0.1), record(0.2, test={"name": "cars", "hash": "x"})])
    assert [r["value"] for r in read_records(path)] == [0.1, 0.2]


def test_torn_and_foreign_lines_are_kept_but_not_read(tmp_path):
    path = epath.Path(tmp_path) / "results.jsonl"
    add_records(path, [record(0.1)])
    torn = (
        path.read_bytes() + b'{"stage": "tune", "val' + b"\xff\n[1]\n" + b'{"protocol": {"name": "x"}, "value": "high"}'
    )
    path.write_bytes(torn)
    add_records(path, [record(0.2, stage="control")])
    assert path.read_bytes().startswith(torn + b"\n")
    assert [r["value"] for r in read_records(path)] == [0.1, 0.2]


def test_hash_of_weights_follows_values_names_and_shapes_only():
    tree = {"a": np.arange(6.0, dtype=np.float32), "b": {"c": np.ones(2, np.float32)}}
    same = {"b": {"c": np.ones(2, np.float32)}, "a": np.arange(6.0, dtype=np.float32)}
    assert weights_hash(tree) == weights_hash(same)
    others = [
        tree | {"a": np.arange(6.0, dtype=np.float32) + 1e-7},
        {"x": tree["a"], "b": tree["b"]},
        tree | {"a": tree["a"].reshape(2, 3)},
        tree | {"a": tree["a"].astype(np.float64)},
    ]
    assert len({weights_hash(other) for other in [tree, *others]}) == 5


@pytest.fixture
def runs(tmp_path):
    def write(name, *records):
        folder = epath.Path(tmp_path) / name
        folder.mkdir()
        add_records(folder / "results.jsonl", records)
        return str(folder)

    return write


def test_compare_prints_both_numbers_and_their_difference(runs):
    a, b = runs("a", record(0.5)), runs("b", record(0.625))
    table = compare([read_column(a), read_column(b)])
    assert "50.00 [40.00, 60.00]" in table and "62.50 [52.50, 72.50]" in table and "+12.50" in table
    assert "differ:" not in table


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("k", {"k": 20}),
        ("test.hash", {"test": {"name": "pets", "hash": "other"}}),
        ("temperature", {"temperature": 0.1}),
    ],
)
def test_compare_refuses_unlike_protocols_and_names_the_field(runs, field, change):
    columns = [read_column(runs("a", record())), read_column(runs("b", record(**change)))]
    with pytest.raises(ConfigError, match=rf"protocols .* differ[\s\S]*{field} = "):
        compare(columns)
    table = compare(columns, anyway=True)
    assert "*" in table and f"{field} = " in table


def test_compare_takes_the_tuned_encoder_of_a_run_unless_a_stage_is_named(runs):
    run = runs("a", record(0.1, stage="pretrain"), record(0.2), record(0.3, stage="tune, raw"))
    assert read_column(run).records[("knn", "accuracy", "maect-knn")]["value"] == 0.2
    assert read_column(f"{run}:pretrain").records[("knn", "accuracy", "maect-knn")]["value"] == 0.1
    with pytest.raises(ConfigError, match=r"names no stage .* pretrain, tune, tune, raw"):
        read_column(f"{run}:head")


def test_several_test_sets_of_one_folder_are_told_apart(runs):
    run = runs("a", record(0.1), record(0.2, test={"name": "cars", "hash": "x"}), record(0.3, name="maect-knn-std"))
    found = {key[2]: r["value"] for key, r in read_column(run).records.items()}
    assert found == {"maect-knn on pets": 0.1, "maect-knn on cars": 0.2, "maect-knn-std": 0.3}


def test_compare_without_anything_in_common_says_what_there_is(runs):
    columns = [read_column(runs("a", record())), read_column(runs("b", record(name="dinov2-knn-20")))]
    with pytest.raises(ConfigError, match=r"no protocol in common .*maect-knn.*dinov2-knn-20"):
        compare(columns)


def test_compare_without_results_says_how_to_get_them(tmp_path):
    with pytest.raises(ConfigError, match=r"no results in .*; run `python -m maect_jax evaluate`"):
        read_column(str(tmp_path))


def test_differing_finds_nested_and_missing_fields():
    one = {"protocol": json.loads('{"a": {"b": 1}, "c": 2}')}
    other = {"protocol": json.loads('{"a": {"b": 3}}')}
    assert differing([one, other]) == {"a.b": [1, 3], "c": [2, None]}


def _add_many(path):
    for i in range(20):
        add_records(epath.Path(path), [record(i / 20)])


def test_writers_that_add_at_once_lose_nothing(tmp_path):
    path = tmp_path / "results.jsonl"
    with ThreadPoolExecutor(4) as pool:  # each opens the file itself, as another program would
        for _ in range(4):
            pool.submit(_add_many, str(path))
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 80
