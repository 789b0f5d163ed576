"""What is reported of loading: differences of totals, against numbers worked out by hand."""

import dataclasses

from maect_jax.data.batches.reading import Telemetry

EARLIER = Telemetry(wait_seconds=1.0, asked=10, ready=5, pictures=100, bytes=2_000_000, load_seconds=4.0)
LATER = Telemetry(wait_seconds=1.5, asked=14, ready=11, pictures=300, bytes=8_000_000, load_seconds=5.0)


def test_rates_are_those_of_the_interval():
    assert LATER.since(EARLIER, 2.0) == {
        "data_wait": 0.25,
        "data_ready": 1.5,
        "decode_per_second": 200.0,
        "data_mb_per_second": 3.0,
    }


def test_waiting_is_never_more_than_all_of_the_time():
    assert LATER.since(EARLIER, 0.1)["data_wait"] == 1.0


def test_nothing_is_said_of_loading_where_nothing_was_loaded():
    assert dataclasses.replace(EARLIER, wait_seconds=1.2).since(EARLIER, 2.0).keys() == {"data_wait"}
