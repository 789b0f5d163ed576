"""What the doctor says follows from what was measured."""

import dataclasses

import pytest

from maect_jax.doctor.advice import advice
from maect_jax.doctor.feed import Feed

SLOW = Feed(
    resident=False,
    pipeline=1000.0,
    workers=0,
    other_workers=16,
    other_pipeline=1020.0,
    read=50_000.0,
    decode=1300.0,
    bytes_each=110_000.0,
    short_side=375.0,
)


def said(feed=SLOW, eats=4000.0, packed_gain=None, pictures=1_281_167):
    return advice(feed, ("pretrain", eats), "photos", pictures, 3, packed_gain)


def starts(lines):
    return [line.partition(":")[0] for line in lines]


def test_a_fast_machine_is_told_so_and_nothing_else():
    lines = said(eats=500.0, packed_gain=3.0)
    assert starts(lines) == ["enough"] and "2.0 times what 'pretrain' eats" in lines[0]


def test_a_resident_set_needs_nothing():
    lines = said(Feed(True, 9000.0, 0), eats=3000.0)
    assert starts(lines) == ["enough"] and "3.0 times" in lines[0]


def test_a_slow_machine_is_told_the_share_and_the_cores_that_are_missing(monkeypatch):
    monkeypatch.setattr("maect_jax.doctor.advice.cores", lambda: 8)
    lines = said()
    assert starts(lines) == ["too slow", "cores"]
    assert "25% of what 'pretrain' eats" in lines[0]
    assert "31 cores would feed it (this machine has 8)" in lines[1]  # 8 cores * 4000 / 1020


def test_packing_is_advised_with_its_command_where_it_helps():
    lines = said(packed_gain=2.2)
    assert starts(lines) == ["too slow", "pack", "cores"]
    assert "2.2 times faster: python -m maect_jax data pack photos DST --short-side 256" in lines[1]
    assert "pack" not in starts(said(packed_gain=1.05))


def test_no_cores_are_missing_where_packing_is_enough():
    assert "cores" not in starts(said(eats=1500.0, packed_gain=2.2))


def test_processes_are_advised_where_they_are_faster():
    lines = said(dataclasses.replace(SLOW, other_pipeline=3000.0))
    assert "--config.data.workers=16 is 3.0 times faster here" in lines[1]


def test_a_slow_disk_is_told_in_bytes():
    lines = said(dataclasses.replace(SLOW, read=1050.0))
    assert starts(lines)[1] == "storage"
    assert "reading alone gives 116 MB/s, the model needs 440" in lines[1]


@pytest.mark.parametrize(("pictures", "fits"), [(100_000, True), (1_281_167, False)])
def test_a_set_of_one_size_that_fits_is_to_be_kept_on_the_devices(pictures, fits):
    lines = said(dataclasses.replace(SLOW, one_size=(96, 96)), pictures=pictures)
    assert ("cache" in starts(lines)) == fits
    if fits:
        assert "all pictures are 96x96; --config.data.resident_gib=2.6 keeps the set" in lines[1]
