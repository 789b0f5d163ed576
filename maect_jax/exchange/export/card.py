"""The model card, README.md of an exported folder, as the Hub shows it.

Names, licences, notes, settings and results come from files of others. Each is brought onto one line or into a fence,
bounded, and escaped: what looks like markdown, HTML or YAML in it is shown and does nothing.
"""

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import jinja2
import yaml

from maect_jax.exchange.export.lineage import Lineage, lineage_of
from maect_jax.exchange.export.proof import TOLERANCE, Proof
from maect_jax.exchange.export.target import Target
from maect_jax.exchange.heads import FINETUNED
from maect_jax.exchange.model import Model
from maect_jax.exchange.provenance import Provenance, without_place
from maect_jax.models.vit import SIZES, Size, ViT
from maect_jax.report.results import EVALUATIONS, LAYERS, METRICS, Entry, read_entries

PREPROCESSOR = "preprocessor_config.json"
CARD = "README.md"
_LICENSES = """
    afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc0-1.0
    cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0
    cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 ecl-2.0 epl-1.0 epl-2.0 eupl-1.1 eupl-1.2 gpl-2.0 gpl-3.0 isc lgpl-2.1 lgpl-3.0
    lppl-1.3c mit mpl-2.0 ms-pl ncsa ofl-1.1 osl-3.0 postgresql unknown unlicense wtfpl zlib
"""  # those that the Hub knows by these names; hub/repositories-licenses in its documentation
_TRANSFORM = {  # in the records, and in words
    "image_size": "pictures of side",
    "mean": "mean",
    "std": "deviation",
    "resize_ratio": "shorter side over crop",
}
_RUN_BY = {"timm": ("timm", "torch"), "pytorch": ("timm", "torch"), "transformers": ("transformers", "torch")}
_MAX_TEXT, _MAX_SETTINGS, _MAX_CLASSES, _MAX_STEPS = 300, 20_000, 1000, 100


def render(
    model: Model,
    target: Target,
    folder: Path,
    *,
    proof: Proof,
    entries: Sequence[Entry] = (),
    notes: Iterable[str] = (),
    dtype: str = "float32",
) -> str:
    """The card's text.

    Args:
      model: what was written, without rounding.
      target: how.
      folder: all of its files are listed.
      proof: of the files.
      entries: numbers of these weights; see `results_of`.
      notes: a sentence each on what was done to the weights.
      dtype: of the written tensors.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=False, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"prose": prose, "code": code, "cell": cell, "fence": fence}
    origin, lineage = model.provenance, lineage_of(model)
    return environment.get_template("card.md.jinja").render(
        front=yaml.safe_dump(_front(model, target, lineage), sort_keys=False, width=10**6),
        model=model,
        origin=origin,
        lineage=lineage,
        architecture=_architecture(model.encoder),
        parameters=_count(sum(leaf.size for leaf in jax.tree.leaves(model.params))),
        classes=len(model.params["head"]["bias"]) if model.has_head else 0,
        shown_classes=model.classes[:_MAX_CLASSES],
        short_side=round(model.image_size * model.resize_ratio),
        usage=target.usage(model),
        preprocessor=PREPROCESSOR,
        rows=_rows(entries, model),
        otherwise=_otherwise(entries, model),
        settings=_settings(origin.recipe),
        steps=[_step(step) for step in origin.derived_from[:_MAX_STEPS]],
        files=[(path.name, f"{path.stat().st_size:,}", sha256_of(path)) for path in sorted(folder.iterdir())],
        proof=proof,
        reason=_without_paths(proof.reason),
        library=target.loader,
        versions=_versions(target.loader),
        tolerance=TOLERANCE,
        dtype=dtype,
        notes=list(notes),
    )


def results_of(records: Iterable[dict[str, Any]], sha256: str, origin: Provenance) -> list[Entry]:
    """The numbers of `results.jsonl` that belong to weights, in the order in which they are shown.

    Args:
      sha256: hash of the encoder, as in the records of its evaluations.
      origin: of the weights. Those of a fine-tuning were measured only there: in the records of the encoder that it
        started from, which name the folder that the chosen weights are kept in.
    """
    kept = origin.derived_from[0] if origin.derived_from else {}
    order, found = [*EVALUATIONS], {}
    if finetuned := kept.get("layout") == FINETUNED:
        place = (kept.get("name"), "chosen", str(origin.step))
        records = [record for record in records if _kept_in(record) == place]
    for entry in read_entries(records):
        if (finetuned or entry.weights.get("sha256") == sha256) and entry.evaluation != LAYERS:
            found[entry.evaluation, entry.metric, json.dumps(entry.protocol, sort_keys=True)] = entry
    place = {name: i for i, name in enumerate(order)}
    return sorted(found.values(), key=lambda entry: place.get(entry.evaluation, len(order)))


def _kept_in(record: dict[str, Any]) -> tuple[str, ...]:
    """Folder of a fine-tuning, 'chosen' and the step, where a record is of weights that were kept there."""
    found = record.get("found")
    weights = found.get("weights") if isinstance(found, dict) else None
    return PurePosixPath(weights).parts[-3:] if isinstance(weights, str) else ()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------------ text of others


def one_line(text: Any) -> str:
    """Printable, without line breaks, bounded."""
    words = "".join(c if c.isprintable() else " " for c in str(text)[: 2 * _MAX_TEXT]).split()
    line = " ".join(words)
    return line if len(line) <= _MAX_TEXT else f"{line[:_MAX_TEXT]} …"


def prose(text: Any) -> str:
    """Text inside a sentence or a cell: every mark that markdown reads is escaped, those of bare addresses too."""
    return re.sub(r"[\\`*_\[\]<>|~&$!#:@^]|(?<=www)\.", r"\\\g<0>", one_line(text))


def code(text: Any) -> str:
    """Text as code in a sentence."""
    return "`{}`".format(one_line(text).replace("`", "'") or " ")


def cell(text: Any) -> str:
    """Text as code in a cell of a table, where a bar would end the cell."""
    line = one_line(text)
    return code(line).replace("|", r"\|") if line else "–"


def fence(text: str, language: str) -> str:
    """Lines as a block of code, which nothing in them can end."""
    marks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{marks}{language}\n{text.rstrip()}\n{marks}"


def _without_paths(reason: str) -> str:
    """A reason up to the first path, which is one of the machine that converts."""
    kept = re.split(r"\S*[/\\]", reason, maxsplit=1)[0]
    return reason if kept == reason else kept.rstrip(" (:;,'\"") + " …"


# --------------------------------------------------------------------------------------------------------------- facts


def _front(model: Model, target: Target, lineage: Lineage) -> dict[str, Any]:
    """The head of the card, which the Hub sorts models by."""
    license = model.provenance.license
    short = re.sub(r"[^a-z0-9.]+", "-", license.lower())[:80].strip("-") or "unnamed"
    known = re.sub("-only$|-or-later$", "", short)
    named = {"license": known} if known in _LICENSES.split() else {"license": "other", "license_name": short}
    task = "image-classification" if model.has_head else "image-feature-extraction"
    return {**named, "library_name": target.loader, "pipeline_tag": task, "tags": list(lineage.tags)}


def _architecture(encoder: ViT) -> str:
    shape = Size(encoder.width, encoder.depth, encoder.heads, encoder.patch)
    name = next((f"ViT-{name}" for name, size in SIZES.items() if size == shape), "a ViT of no published size")
    return (
        f"{name}: width {shape.width}, {shape.depth} blocks, {shape.heads} heads, patches of {shape.patch} x "
        f"{shape.patch} pixels"
    )


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} million" if number >= 1e6 else f"{number:,}"


def _rows(entries: Iterable[Entry], model: Model) -> list[dict[str, str]]:
    """A row a number; the evaluation is named where it begins, the feature where it is not the model's own."""
    rows, before = [], None
    for entry in entries:
        title = EVALUATIONS.get(entry.evaluation, entry.evaluation)
        feature = str(entry.protocol.get("feature") or entry.found.get("feature") or model.pooling)
        rows.append(
            {
                "evaluation": title if title != before else "",
                "protocol": entry.name,
                "feature": feature if feature != model.pooling else "",
                "train": without_place(str(entry.protocol.get("train.name", ""))),
                "test": without_place(str(entry.protocol.get("test.name", ""))),
                "metric": METRICS.get(entry.metric, entry.metric.replace("_", " ")),
                "value": _value(entry),
            }
        )
        before = title
    return rows


def _otherwise(entries: Sequence[Entry], model: Model) -> str:
    """How pictures were prepared for the numbers where that is not as the model's are; '' where it is."""
    own = {"image_size": model.image_size, "resize_ratio": round(float(model.resize_ratio), 6)}
    own |= {name: [round(float(x), 6) for x in getattr(model, name)] for name in ("mean", "std")}
    found = []
    for entry in entries:
        said = {name: entry.protocol.get(f"transform.{name}") for name in own}
        found.append(", ".join(f"{_TRANSFORM[k]} {v}" for k, v in said.items() if v and v != json.dumps(own[k])))
    ways, many = sorted({way for way in found if way}), sum(map(bool, found))
    return f"{many} of these {len(found)} numbers with {'; or '.join(ways)}" if ways else ""


def _value(entry: Entry) -> str:
    """'85.3 % [84.1, 86.4] ± 0.3'."""

    def show(value: float) -> str:
        return f"{100 * value:.1f}" if entry.unit == "fraction" else f"{value:.4g}"

    text = show(entry.value) + (" %" if entry.unit == "fraction" else "")
    if entry.interval:
        text += " [{}, {}]".format(*map(show, entry.interval))
    return text + (f" ± {show(entry.std)}" if entry.std is not None else "")


def _settings(recipe: dict[str, Any]) -> str:
    """The recipe as YAML of ASCII letters, '' where none is known."""
    if not recipe:
        return ""
    try:
        text = json.dumps(recipe, default=str)
        return yaml.safe_dump(json.loads(text), sort_keys=False) if len(text) <= _MAX_SETTINGS else "# too long\n"
    except RecursionError:
        return "# nested too deeply\n"


def _step(step: dict[str, Any]) -> list[str]:
    """Name, kind, licence and SHA-256 of one of the files that weights were made from."""
    return [step.get(key, "") for key in ("name", "layout" if "layout" in step else "stage", "license", "sha256")]


def _versions(library: str) -> str:
    """'timm 1.0.31, torch 2.13.0': what a proof was computed with."""
    found = []
    for name in _RUN_BY.get(library, (f"{library}runtime", library)):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found) or library
