"""Facts as lines for a terminal: what it is, where it comes from, its tensors.

Names and notes may be somebody's: what steers a terminal is shown as an escape sequence, what is long is cut.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from maect_jax.inspection.shapes import Shape

_LONGEST = 200  # characters of one name or note
_SOURCES = {
    "said": "said beside the weights",
    "published": "as published for this width",
    "settings": "by the run's settings",
    "unknown": "no published number for this width",
}
_NUMBER = re.compile(r"(?<=[./])(0|[1-9]\d{0,5})(?=[./])")  # a block's, between dots


def as_text(facts: Mapping[str, Any], every: bool = False) -> str:
    """The facts of `inspection.facts`; with `every` each block's tensors have lines of their own."""
    rows = [(label, lines) for label, lines in _rows(facts, every) if lines]
    width = max(len(label) for label, _ in rows)
    text = [f"{'' if i else label:{width}}  {line}" for label, lines in rows for i, line in enumerate(lines)]
    text += ["", *_stages(facts["stages"])] if "stages" in facts else []
    text += ["", *_table(facts["tensors"], every)] if "tensors" in facts else []
    return "\n".join(printable(line).rstrip() for line in text)


def printable(text: str) -> str:
    """The text with what does not print, such as the start of a terminal's command, as escape sequences."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _short(value: Any) -> str:
    """Somebody's text or value; None is unknown."""
    text = "unknown" if value is None or value == "" else printable(str(value)[: _LONGEST + 1])
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _words(name: str) -> str:
    return "licence" if name == "license" else _short(name).replace("_", " ")


# --------------------------------------------------------------------------------------------------------------- facts


def _rows(facts: Mapping[str, Any], every: bool) -> Iterator[tuple[str, list[str]]]:
    """Label and lines of each fact, where there is something to say."""
    yield "path", [_short(facts["path"])]
    yield "kind", [_kind(facts)]
    yield "layout", _layout(facts, every)
    yield "encoder", _encoder(facts["encoder"]) if "encoder" in facts else []
    yield "decoder", _decoder(facts["decoder"]) if "decoder" in facts else []
    yield "head", _head(facts["head"]) if "head" in facts else []
    yield "head", _nnclr(facts["nnclr"]) if "nnclr" in facts else []
    yield "feature", [_feature(facts["pooling"])] if "pooling" in facts else []
    yield "pictures", _pictures(facts.get("pictures", {}))
    yield "parameters", _parameters(facts.get("parameters", {}))
    yield "problems", [_short(problem) for problem in facts.get("problems", ())]
    told = ("seed", "starts_from", "stage", "step", "average", "trained_on")
    for name in (*told, "code_version"):
        yield _words(name), [_short(facts[name])] if facts.get(name, "") not in (None, "") else []
    missing = [_words(name) for name in told if name in facts and facts[name] in (None, "")]
    yield "unknown", [", ".join(missing)] if missing else []
    if "license" in facts:
        yield "recipe", [f"{len(facts['recipe'])} settings, which --json shows"] if facts["recipe"] else []
        yield "licence", [f"{_short(facts['license'])} ({_short(facts['license_source'])})"]
        yield "derived from", [line for entry in facts["derived_from"] for line in _origin(entry)]
    yield "chosen", [f"step {_short(facts['chosen'])}"] if "chosen" in facts else []
    yield "checkpoints", [", ".join(map(str, facts["checkpoints"]))] if "checkpoints" in facts else []
    yield "beside", [f"{_short(name)}: {_short(value)}" for name, value in facts.get("beside", {}).items()]
    yield "SHA-256", [facts["sha256"]] if "sha256" in facts else []
    yield "MD5", [f"{facts['md5'][:6]}…"] if facts.get("container") == "torch" else []
    yield "SHA-256", [f"{_short(facts['weights_sha256'])} (encoder)"] if "weights_sha256" in facts else []


def _kind(facts: Mapping[str, Any]) -> str:
    kind = facts["kind"] + (f" '{_short(facts['name'])}'" if "name" in facts else "")
    if "complete" in facts:
        kind += ", complete" if facts["complete"] else ", not complete"
    return f"{kind}; {facts['container']}, {_bytes(facts['bytes'])}" if "container" in facts else kind


def _layout(facts: Mapping[str, Any], every: bool) -> list[str]:
    if "differences" not in facts:
        same = f", the same as {', '.join(facts['same_as'])}" if facts.get("same_as") else ""
        return [f"{facts['layout']}{same}"] if "layout" in facts else []
    differences = facts["differences"]
    lines = [f"none that is known; the nearest is {differences['nearest']}, from which it differs:"]
    for title in ("missing", "unexpected", "misshaped"):
        items = differences[title]
        shown = items if every or title == "misshaped" else [name for name, _ in _folded(dict.fromkeys(items))]
        lines += [f"  {len(items)} {title}:"] if items else []
        lines += [f"    {_short(item)}" for item in shown]
    return lines


def _sizes(part: Mapping[str, Any]) -> str:
    heads = f"{part['heads']} heads" if part["heads"] else "heads unknown"
    source = _SOURCES[part["heads_source"]]
    return f"width {part['width']}, depth {part['depth']}, {heads} ({source}), MLP {part['mlp_width']}"


def _encoder(encoder: Mapping[str, Any]) -> list[str]:
    name = f"{encoder['name']}: " if encoder["name"] else ""
    patch, size, channels = (_short(encoder[key]) for key in ("patch", "image_size", "channels"))
    norm = "a norm at the end" if encoder["final_norm"] else "no norm at the end"
    return [
        name + _sizes(encoder),
        f"patch {patch}, pictures of {size} x {size} pixels with {channels} channels",
        f"{encoder['positions']} positions, {norm}",
    ]


def _decoder(decoder: Mapping[str, Any]) -> list[str]:
    kinds = {True: "normalised patch by patch", False: "not normalised by patch", None: "normalised or not is unknown"}
    return [_sizes(decoder), f"predicts {decoder['values']} values a patch, {kinds[decoder.get('normalised_pixels')]}"]


def _head(head: Mapping[str, Any]) -> list[str]:
    names = ", ".join(_short(name) for name in head["names"][:5])
    more = ", …" if len(head["names"]) > 5 else ""
    return [f"{head['classes']} classes on {head['width']} channels; names: {names + more or 'unknown'}"]


def _nnclr(sizes: Mapping[str, int]) -> list[str]:
    width, hidden, out, predictor, queue = (
        sizes[key] for key in ("width", "hidden", "out", "predictor_hidden", "queue")
    )
    return [
        f"projector {width} - {hidden} - {hidden} - {out}, predictor {out} - {predictor} - {out}",
        f"queue of {queue} rows",
    ]


def _feature(pooling: str) -> str:
    return {"cls": "class token", "mean": "mean of the patch tokens"}[pooling]


def _pictures(pictures: Mapping[str, Any]) -> list[str]:
    texts = []
    for name, value in pictures.items():
        numbers = value if isinstance(value, Sequence) else (value,)
        texts.append(f"{_words(name)} {' '.join(f'{number:.4g}' for number in numbers)}")
    return [", ".join(texts)] if texts else []


def _parameters(counts: Mapping[str, int]) -> list[str]:
    parts = ", ".join(f"{_short(name)} {count / 1e6:.4g}" for name, count in counts.items())
    return [f"{sum(counts.values()) / 1e6:.4g} million: {parts}"] if counts else []


def _origin(entry: Mapping[str, Any]) -> list[str]:
    known = {name: value for name, value in entry.items() if name not in ("name", "sha256")}
    facts = "".join(f"; {_words(name)} {_short(value)}" for name, value in known.items())
    return [_short(entry.get("name")) + facts, f"  SHA-256 {_short(entry.get('sha256'))}"]


# -------------------------------------------------------------------------------------------------------------- tables


def _stages(stages: Iterable[Mapping[str, Any]]) -> list[str]:
    rows = [("stage", "", "step", "licence", "SHA-256 of the encoder")]
    for stage in stages:
        state = "complete" if stage["complete"] else "not begun" if stage["step"] is None else "not complete"
        step, weights = ("" if value is None else _short(value) for value in (stage["step"], stage["weights_sha256"]))
        rows.append((stage["stage"], state, step, "" if stage["step"] is None else _short(stage["license"]), weights))
    return _columns(rows)


def _table(tensors: Mapping[str, Shape], every: bool) -> list[str]:
    rows = [("tensor", "shape", "type", "size")]
    groups = [(name, [name]) for name in tensors] if every else _folded(tensors)
    for name, members in groups:
        first, total = tensors[members[0]], sum(tensors[member].bytes for member in members)
        shape = " x ".join(map(str, first.shape)) or "scalar"
        rows.append((_short(name), shape, first.dtype, _bytes(total)))
    whole = sum(tensor.bytes for tensor in tensors.values())
    return [*_columns(rows), f"{len(tensors)} tensors, {_bytes(whole)}"]


def _folded(items: Mapping[str, Shape | None]) -> list[tuple[str, list[str]]]:
    """Names in the order in which each kind first appears, those of consecutive blocks and one shape as one.

    Returns:
      the name, such as 'blocks.{0..11}.norm1.bias', and the names that it stands for, in order.
    """
    kinds: dict[tuple, list[tuple[int, str]]] = {}
    for name, shape in items.items():
        number = _NUMBER.search(name)
        like = (shape.shape, shape.dtype) if shape else None
        around = (name[: number.start()], name[number.end() :]) if number else name
        kinds.setdefault((around, like), []).append((int(number[0]) if number else 0, name))
    found = []
    for (around, _), members in kinds.items():
        for run in _consecutive(sorted(members)):
            (first, name), (last, _) = run[0], run[-1]
            folded = f"{around[0]}{{{first}..{last}}}{around[1]}" if len(run) > 1 else name
            found.append((folded, [name for _, name in run]))
    place = {name: i for i, name in enumerate(items)}
    return sorted(found, key=lambda group: min(place[name] for name in group[1]))


def _consecutive(members: list[tuple[int, str]]) -> list[list[tuple[int, str]]]:
    runs: list[list[tuple[int, str]]] = []
    for member in members:
        if runs and member[0] == runs[-1][-1][0] + 1:
            runs[-1].append(member)
        else:
            runs.append([member])
    return runs


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths)) for row in rows]


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
