"""What the stages of a run are called in its report: it depends on how its weights were pre-trained."""

from collections.abc import Iterable, Mapping
from typing import Any

RAW = "tune, raw"
_OF_METHOD = {  # config.pretrain.method -> what is pre-trained, and what tuning makes of it
    "mae": ("MAE", "MAE-CT"),
    "emae": ("EMAE", "EMAE-CT"),
    "disjoint": ("disjoint MAE", "MAE-CT"),
}


def method_of(config: Mapping[str, Any], finished: Iterable[Mapping[str, Any]] = ()) -> str:
    """How the weights of a run were pre-trained, a key of `_OF_METHOD`.

    Args:
      config: its settings, which say so unless the run started from weights of another.
      finished: the `DONE.json` of its stages, which know of these, too.
    """
    told = [marker["pretraining"] for marker in finished if marker.get("pretraining")]
    begun_here = "pretrain" in str(config.get("stages")) or not config.get("init_from")
    settings = config.get("pretrain")
    if not told and begun_here and isinstance(settings, Mapping):
        told = [settings.get("method")]
    return known_method(told[0] if told else None)


def known_method(method: object) -> str:
    """A key of `_OF_METHOD`; MAE where it is none of them, as all were before there was a choice."""
    return str(method) if str(method) in _OF_METHOD else "mae"


def stage_names(method: str) -> dict[str, str]:
    """Stage -> its name, in the order in which stages are shown."""
    pretrained, tuned = _OF_METHOD[method]
    return {"pretrain": pretrained, "control": "control", "head": "head", "tune": tuned}


def column_names(names: Mapping[str, str]) -> dict[str, str]:
    """Stage -> the head of its column, where there is room for more words, and where raw weights have one."""
    control = f"{names['pretrain']}, trained on instead (control)"
    return {**names, "control": control, RAW: f"{names['tune']}, raw weights"}
