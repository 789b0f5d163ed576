"""Where weights come from and under which licence they stand; carried from file to run to export, never loosened.

Every checkpoint and every export holds a `Provenance`. Files of others seldom say anything: then the licence follows
from what the file says, what lies beside it, and what it is; see `of_file`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import PurePosixPath
from typing import Any

import maect_jax
from maect_jax.errors import ConfigError

OWN = "unstated"  # weights trained from scratch: their owner states one
UNKNOWN = "unknown"
NONE_STATED = "none stated"
MAE_LICENSE = "CC-BY-NC-4.0"

# From free to strict. A licence that is not listed counts as one that is not known, one with "nc" or "non-commercial"
# in it as non-commercial.
_STRICTNESS = {OWN: 0, UNKNOWN: 2, NONE_STATED: 4}
_STRICTNESS |= dict.fromkeys(("apache 2.0", "mit", "bsd 2 clause", "bsd 3 clause", "isc", "cc0 1.0", "cc by 4.0"), 1)
_NON_COMMERCIAL = 3


@dataclass(frozen=True)
class Provenance:
    """What is known of a set of weights.

    Attributes:
      license: SPDX identifier or text; `OWN`, `UNKNOWN` or `NONE_STATED` where there is none.
      license_source: who says so.
      derived_from: what the weights were made from, the nearest first: dicts with 'name', 'sha256', 'license' and
        'layout' or 'stage'; 'method' where it is known how they were pre-trained.
      trained_on: name of the training pictures, '' where it is not known.
      recipe: settings of the training, as `config.resolved.yaml`; {} where they are not known.
      stage, step: of the training; '' and None for weights of others.
      average: 'none', or how the weights were averaged.
      code_version: of this package, where it trained them; else ''.
    """

    license: str = UNKNOWN
    license_source: str = "nothing says"
    derived_from: tuple[dict[str, Any], ...] = ()
    trained_on: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    stage: str = ""
    step: int | None = None
    average: str = "none"
    code_version: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it."""
        return asdict(self) | {"derived_from": list(self.derived_from)}


def from_dict(values: Mapping[str, Any]) -> Provenance:
    """Reads what `Provenance.as_dict` gave, which may have come in somebody's file: unlike values are left out."""
    kept = {}
    for item in fields(Provenance):
        value, kind = values.get(item.name), {"derived_from": list, "recipe": dict, "step": int}.get(item.name, str)
        if isinstance(value, kind):
            kept[item.name] = value
    kept["derived_from"] = tuple(step for step in kept.get("derived_from", ()) if isinstance(step, dict))
    return Provenance(**kept)


def pretraining_method(provenance: Provenance) -> str:
    """`config.pretrain.method` of the run that pre-trained the weights; '' where that is not known."""
    recipe = provenance.recipe
    begun_here = provenance.stage in ("pretrain", "control") or "pretrain" in str(recipe.get("stages"))
    if (begun_here or not recipe.get("init_from")) and isinstance(recipe.get("pretrain"), dict):
        return str(recipe["pretrain"].get("method", "mae"))  # older recipes do not say: there was no other
    return next((str(step["method"]) for step in provenance.derived_from if step.get("method")), "")


def without_place(name: str) -> str:
    """The name of pictures or weights, of a path its last part: weights travel, machines do not."""
    return PurePosixPath(name).name if name.startswith(("/", "~", ".")) or "://" in name else name


def strictness(license: str) -> int:
    """How much a licence forbids, 0 (own weights) to 4 (no licence stated)."""
    words = license.lower().replace("_", " ").replace("-", " ")
    restricted = " nc" in words or "noncommercial" in words.replace(" ", "")
    return _STRICTNESS.get(words, _NON_COMMERCIAL if restricted else _STRICTNESS[UNKNOWN])


def strictest(*provenances: Provenance) -> tuple[str, str]:
    """Licence and its source of what is made from several: the strictest of theirs."""
    found = max(provenances, key=lambda provenance: strictness(provenance.license))
    return found.license, found.license_source


def trained(
    before: Provenance | None,
    origin: dict[str, Any] | None,
    *,
    stage: str,
    recipe: dict,
    trained_on: str,
    average: str = "none",
) -> Provenance:
    """Provenance of weights that this package trains.

    Args:
      before: of the weights that it starts from, whose licence stays; None = from scratch.
      origin: the entry of `derived_from` for these weights, where `before` does not have it yet.
    """
    license, source = (before.license, before.license_source) if before else (OWN, "trained from scratch")
    return Provenance(
        license=license,
        license_source=source,
        derived_from=((origin,) if origin else ()) + (before.derived_from if before else ()),
        trained_on=trained_on,
        recipe=recipe,
        stage=stage,
        average=average,
        code_version=maect_jax.__version__,
    )


def stated(provenance: Provenance, license: str, reason: str) -> Provenance:
    """The same with a licence that its user states.

    Raises:
      ConfigError: it is looser than the one the weights carry, and no reason is given.
    """
    if not license:
        if reason:
            raise ConfigError("--license-reason: says why a licence is stated; give that, too, as --license")
        return provenance
    if strictness(license) < strictness(provenance.license) and not reason:
        raise ConfigError(
            f"--license '{license}': looser than '{provenance.license}' ({provenance.license_source}), which these "
            "weights carry; give --license-reason='…', which the model card will show beside it"
        )
    source = f"stated at conversion: {reason or 'no reason given'}; carried until then: {provenance.license}"
    return replace(provenance, license=license, license_source=source)
