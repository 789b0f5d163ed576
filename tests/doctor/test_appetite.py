"""What a model eats: operations a picture by the published model, at half of the accelerator's peak."""

import jax
import pytest

from maect_jax.config import default, set_size
from maect_jax.doctor import appetite


def config(size):
    found = default()
    set_size(found, size)
    found.pretrain.update(epochs=1, warmup_epochs=0, views=1, mask_ratio=0.75)
    found.head.update(epochs=1, queue=65_536)
    found.tune.update(epochs=1, ema_factor=0.9999)
    return found


def test_one_h200_eats_8400_pictures_a_second_in_pretraining_of_a_vit_b():
    eats = appetite.images_per_second(config("B/16"), appetite.accelerator("h200", 1))
    assert eats["pretrain"] == pytest.approx(8400, rel=0.12)
    assert set(eats) == {"pretrain", "head", "tune"}


def test_stages_differ_by_their_operations_and_accelerators_add_up():
    one, eight = (appetite.images_per_second(config("L/16"), appetite.accelerator("h100", n)) for n in (1, 8))
    assert eight["tune"] == pytest.approx(8 * one["tune"])
    assert one["head"] > one["tune"], "the head's encoder has no backward pass"


class Device:
    def __init__(self, kind):
        self.device_kind, self.platform = kind, "gpu"


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5p", "v5p"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
    ],
)
def test_devices_are_known_by_what_jax_calls_them(monkeypatch, kind, name):
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(kind)] * 4)
    found = appetite.accelerator(None, None)
    assert (found.name, found.count, found.peak, found.measured) == (name, 4, appetite.PEAKS[name], False)


def test_an_unknown_device_is_measured():
    found = appetite.accelerator(None, None)
    assert found.measured and 1e9 < found.peak < 1e14
