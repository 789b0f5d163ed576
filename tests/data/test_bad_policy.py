"""What becomes of pictures that can not be used: replaced, left out, counted, noted once, or the end of the run."""

import json
import threading

import jax
import numpy as np
import pytest
from corpus import encoded, photo
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from maect_jax.data.batches.bad import BadPictures
from maect_jax.data.batches.evaluation import EvaluationBatches
from maect_jax.data.batches.resident import load_resident
from maect_jax.data.batches.samples import TRIES, Bad, usable
from maect_jax.data.batches.training import training_batches
from maect_jax.data.sources.base import ArraySource
from maect_jax.data.sources.open import open_source
from maect_jax.errors import BadPicture, DataError

N, BATCH = 40, 8


@pytest.fixture(scope="module")
def sharding():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("replica", "fsdp"), (AxisType.Auto,) * 2)
    return NamedSharding(mesh, PartitionSpec(("replica", "fsdp")))


@pytest.fixture
def folder(tmp_path):
    """40 pictures of one size in two classes; class b begins at id 20."""
    for i in range(N):
        path = tmp_path / "pictures" / "train" / "ab"[i // 20] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(photo(12, 16, i), "PNG"))
    return tmp_path / "pictures"


def spoil(folder, *ids, content=b""):
    for path in (folder / "train").rglob("*.png"):
        if int(path.stem) in ids:
            path.write_bytes(content)


def epoch(folder, sharding, bad, *, resident=False, **changes):
    """The batches of the first epoch, as arrays, joined."""
    settings = {"batch": BATCH, "seed": 3, "views": 2, "image_size": 8, "crop_scale": (0.3, 1.0)} | changes
    limit = (2 << 30) if resident else 0
    source = open_source(str(folder), "train")
    loader = training_batches(source, start_step=0, sharding=sharding, resident_limit=limit, bad=bad, **settings)
    assert loader.resident == resident
    try:
        steps = [jax.tree.map(np.asarray, next(loader)) for _ in range(N // BATCH)]
    finally:
        loader.close()
    return {key: np.concatenate([step[key] for step in steps]) for key in steps[0]}


def allowing(limit=1.0, path=None):
    return BadPictures("skip", limit, path)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_picture_gives_its_place_to_the_next_that_is_good(folder, sharding, workers):
    good = epoch(folder, sharding, allowing())
    spoil(folder, 5, 18, 19, 39)
    seen = epoch(folder, sharding, allowing(), workers=workers)
    expected = {5: 6, 18: 20, 19: 20, 39: 0}
    for row, sample_id in enumerate(good["id"].tolist()):
        taken = expected.get(sample_id, sample_id)
        assert seen["id"][row] == taken
        assert seen["label"][row] == (taken >= 20)
        np.testing.assert_array_equal(seen["image"][row], good["image"][good["id"].tolist().index(taken)])


def test_resident_and_streamed_replace_by_the_same(folder, sharding):
    spoil(folder, 0, 7, 8, 9, 39)
    resident, streamed = (epoch(folder, sharding, allowing(), resident=kept) for kept in (True, False))
    for key in ("id", "label"):
        np.testing.assert_array_equal(resident[key], streamed[key])
    source = open_source(str(folder), "train")
    for image, taken in zip(resident["image"], resident["id"].tolist()):
        np.testing.assert_array_equal(image, source.image(taken))


def test_resident_set_notes_each_bad_picture(folder, tmp_path):
    spoil(folder, 3, 21)
    bad = allowing(path=tmp_path / "bad_images.jsonl")
    source = open_source(str(folder), "train")
    _, used = load_resident(source, bad=bad)
    assert [(i, int(taken)) for i, taken in enumerate(used) if i != taken] == [(3, 4), (21, 22)]
    assert bad.count(source) == 2 == len((tmp_path / "bad_images.jsonl").read_text().splitlines())


class Holes:
    """A source as `usable` knows one, of which some pictures are bad."""

    name = "holes"

    def __init__(self, n, bad):
        self.n, self.bad = n, set(bad)

    def __len__(self):
        return self.n

    def where(self, index):
        return f"holes/{index}"

    def load(self, index):
        if index in self.bad:
            raise BadPicture(self.where(index), "made so")
        return index


def test_replacement_depends_on_the_source_alone():
    source = Holes(50, {3, 4, 5, 49})
    for sample_id, taken in ((3, 6), (4, 6), (5, 6), (6, 6), (49, 0)):
        for _ in range(2):
            found: list[Bad] = []
            assert usable(source, sample_id, "skip", found, source.load) == taken
            assert [bad.replaced_by for bad in found] == [taken] * ((taken - sample_id) % 50)


def test_many_bad_ones_in_a_row_are_an_error_that_names_the_last_and_notes_them_all():
    source, found = Holes(100, range(10, 10 + TRIES)), []
    with pytest.raises(DataError, match=r"^16 pictures in a row can not be used, the last is holes/25: made so"):
        usable(source, 10, "skip", found, source.load)
    assert [(bad.sample_id, bad.replaced_by) for bad in found] == [(i, -1) for i in range(10, 26)]
    assert usable(source, 11, "skip", [], source.load) == 26
    few = Holes(3, range(3))
    with pytest.raises(DataError, match=r"^3 pictures in a row"):
        usable(few, 1, "skip", [], few.load)


@pytest.mark.parametrize("resident", [False, True])
def test_set_of_bad_pictures_alone_is_an_error(folder, sharding, tmp_path, resident):
    spoil(folder, *range(N)[1:] if resident else range(N), content=b"no picture")
    path = tmp_path / "bad_images.jsonl"
    with pytest.raises(DataError, match="pictures in a row can not be used"):
        epoch(folder, sharding, allowing(path=path), resident=resident)
    if not resident:
        assert len(path.read_text().splitlines()) >= TRIES


@pytest.mark.parametrize("workers", [0, 1])
def test_policy_error_ends_at_the_first_with_its_name(folder, sharding, workers):
    spoil(folder, 5, content=b"no picture")
    with pytest.raises(BadPicture, match=r"05\.png: not a readable picture \(it is text\); replace it") as caught:
        epoch(folder, sharding, BadPictures("error"), workers=workers)
    assert caught.value.where.endswith("05.png")
    with pytest.raises(BadPicture, match=r"05\.png"):
        epoch(folder, sharding, BadPictures("error"), resident=True)


def test_lines_say_which_and_why_and_what_took_its_place_once_each_also_after_a_restart(folder, sharding, tmp_path):
    spoil(folder, 5, 18, 19)
    path = tmp_path / "run" / "bad_images.jsonl"
    for _ in range(2):  # the second is a restart
        bad = allowing(path=path)
        epoch(folder, sharding, bad)
        epoch(folder, sharding, bad)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert sorted((line["id"], line["replaced_by"]) for line in lines) == [(5, 6), (18, 20), (19, 20)]
    for line in lines:
        assert line.keys() == {"set", "id", "path", "reason", "replaced_by"}
        assert line["set"] == str(folder) and line["path"].endswith(f"{line['id']:02}.png")
        assert line["reason"] == "not a readable picture (the file is empty)"


def test_line_that_was_torn_is_cut_off_and_its_picture_noted_again(folder, tmp_path):
    source, path = open_source(str(folder), "train"), tmp_path / "bad_images.jsonl"
    allowing(path=path).note(source, [Bad(1, "x/1", "why", 2), Bad(4, "x/4", "why", 5)])
    whole = path.read_text()
    for cut in (1, 9, len(whole.splitlines()[1])):
        path.write_text(whole[:-cut])
        allowing(path=path).note(source, [Bad(1, "x/1", "why", 2)])  # known: nothing is written
        assert path.read_text() == whole[:-cut]
        allowing(path=path).note(source, [Bad(4, "x/4", "why", 5)])
        assert path.read_text() == whole


def test_damaged_file_of_lines_does_not_end_a_run(folder, tmp_path):
    path = tmp_path / "bad_images.jsonl"
    path.write_bytes(b'\xff\xfe no text\n[1, 2]\n{"path": ["x"]}\n{"path": "x/1"}\n17\n')
    bad = allowing(path=path)
    bad.note(open_source(str(folder), "train"), [Bad(1, "x/1", "why", 2), Bad(4, "x/4", "why", 5)])
    assert json.loads(path.read_text(errors="replace").splitlines()[-1])["path"] == "x/4"
    assert len(path.read_bytes().splitlines()) == 6


def test_names_that_are_no_text_are_written(folder, tmp_path):
    path = tmp_path / "bad_images.jsonl"
    for _ in range(2):
        allowing(path=path).note(open_source(str(folder), "train"), [Bad(1, "caf\udce9\nx.jpg", "why\n", -1)])
    (line,) = path.read_text().splitlines()
    assert json.loads(line)["path"] == "caf\udce9\nx.jpg" and json.loads(line)["replaced_by"] is None


def test_loaders_of_several_sets_note_at_once(tmp_path):
    path = tmp_path / "bad_images.jsonl"
    bad = allowing(path=path)
    sources = [ArraySource(f"set {i}", np.zeros((100, 1, 1, 3), np.uint8)) for i in range(4)]

    def note(source):
        for i in range(100):
            bad.note(source, [Bad(i, f"{source.name}/{i}", "why", -1)])

    threads = [threading.Thread(target=note, args=(source,)) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [bad.count(source) for source in sources] == [100] * 4
    assert len({json.loads(line)["path"] for line in path.read_text().splitlines()}) == 400


def message(limit, n, count, path=None):
    source = ArraySource("pets", np.zeros((n, 1, 1, 3), np.uint8))
    bad = allowing(limit, path)
    noted = [Bad(i, f"pets/{i}.jpg", "the file is empty", i + 1) for i in range(count)]
    bad.note(source, noted[:-1])
    with pytest.raises(DataError) as caught:
        bad.note(source, noted[-1:])
    return str(caught.value)


def test_more_than_the_limit_ends_with_count_share_last_one_file_and_mend(tmp_path):
    path = tmp_path / "bad_images.jsonl"
    assert message(0.001, 5000, 6, path) == (
        "data: 6 of 5000 pictures of 'pets' can not be used: 0.12 %, more than 0.1 %; the last is pets/5.jpg: the file "
        f"is empty. All that were met are in {path}. Replace them or take them out (`python -m maect_jax data verify "
        "pets` lists every one), or allow them with data.bad_limit=0.002 (now 0.001)"
    )


def test_message_of_a_small_set_allows_what_it_says():
    text = message(0.001, 40, 1)
    assert "1 of 40 pictures of 'pets' can not be used: 2.5 %, more than 0.1 %" in text
    assert "allow them with data.bad_limit=0.025 (now 0.001)" in text
    source = ArraySource("pets", np.zeros((40, 1, 1, 3), np.uint8))
    allowing(0.025).note(source, [Bad(0, "pets/0", "why", 1)])
    assert "more than 0 %" in message(0.0, 40, 1)


def test_limit_counts_pictures_of_one_set_not_how_often_they_are_met():
    first, second = (ArraySource(name, np.zeros((100, 1, 1, 3), np.uint8)) for name in "ab")
    bad = allowing(0.02)
    for _ in range(5):
        bad.note(first, [Bad(0, "a/0", "why", 1), Bad(1, "a/1", "why", 2)])
        bad.note(second, [Bad(0, "b/0", "why", 1)])
    assert (bad.count(first), bad.count(second)) == (2, 1)
    with pytest.raises(DataError, match="3 of 100 pictures of 'a'"):
        bad.note(first, [Bad(9, "a/9", "why", 10)])


@pytest.mark.parametrize("resident", [False, True])
def test_limit_ends_the_loading_of_a_set(folder, sharding, resident):
    spoil(folder, 5, 25)
    with pytest.raises(DataError, match=r"2 of 40 pictures of .* can not be used: 5 %, more than 3 %"):
        epoch(folder, sharding, allowing(0.03), resident=resident)
    assert len(epoch(folder, sharding, allowing(0.05), resident=resident)["id"]) == N


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_bad_pictures_out_and_counts_them(folder, sharding, workers):
    spoil(folder, 5, 39)
    source, bad = open_source(str(folder), "train"), allowing()
    batches = EvaluationBatches(source, batch=12, image_size=8, sharding=sharding, workers=workers, bad=bad)
    seen = [jax.tree.map(np.asarray, batch) for batch in batches]
    joined = {key: np.concatenate([batch[key] for batch in seen]) for key in seen[0]}
    good = [i for i in range(N) if i not in (5, 39)]
    assert joined["id"][joined["valid"]].tolist() == good
    assert joined["label"][joined["valid"]].tolist() == [int(i >= 20) for i in good]
    assert not joined["valid"][[5, 39, *range(40, 48)]].any()
    for key in ("id", "label"):
        assert (joined[key][~joined["valid"]] == -1).all()
    assert not joined["image"][~joined["valid"]].any() and not joined["content"][~joined["valid"]].any()
    assert bad.count(source) == 2
    with pytest.raises(BadPicture, match=r"05\.png"):
        list(EvaluationBatches(source, batch=12, image_size=8, sharding=sharding, workers=workers))


def test_policy_is_one_of_two():
    with pytest.raises(ValueError, match="policy: 'ignore' is none of error, skip"):
        BadPictures("ignore")
