"""What the stages of a run are called in its report: it depends on how the run pre-trains, which its settings say."""

from collections.abc import Mapping
from typing import Any

RAW = "tune, raw"
_OF_METHOD = {  # config.pretrain.method -> what is pre-trained, and what tuning makes of it
    "mae": ("MAE", "MAE-CT"),
    "emae": ("EMAE", "EMAE-CT"),
    "disjoint": ("disjoint MAE", "MAE-CT"),
}


def method_of(config: Mapping[str, Any]) -> str:
    """How a run pre-trains, a key of `_OF_METHOD`; MAE where the settings do not say, as all did before they could."""
    settings = config.get("pretrain")
    method = str(settings.get("method")) if isinstance(settings, Mapping) else ""
    return method if method in _OF_METHOD else "mae"


def stage_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Stage -> its name, in the order in which stages are shown."""
    pretrained, tuned = _OF_METHOD[method_of(config)]
    return {"pretrain": pretrained, "control": "control", "head": "head", "tune": tuned}


def column_names(names: Mapping[str, str]) -> dict[str, str]:
    """Stage -> the head of its column, where there is room for more words, and where raw weights have one."""
    control = f"{names['pretrain']}, trained on instead (control)"
    return {**names, "control": control, RAW: f"{names['tune']}, raw weights"}
