"""The chapters of a report that show pictures: neighbours, clusters, attention, reconstructions, whole and by parts."""

from collections.abc import Iterable, Mapping
from typing import Any

import matplotlib
import numpy as np
from etils import epath

from maect_jax.report.figures import as_rgb, data_address, resize, to_jpeg, to_png
from maect_jax.report.files import check_arrays, class_name, read_arrays, read_stages

# A page that fits into a mail: more of each than this is not shown, and the caption says so.
MAX_QUERIES, MAX_CLUSTERS, MAX_PER_CLUSTER, MAX_ATTENTION, MAX_HEADS, MAX_RECONSTRUCTIONS = 12, 20, 8, 6, 6, 12
MAX_IN_PARTS, MAX_PARTS = 6, 4
WHEN = {"pretrain": "Before tuning", "control": "Trained on", "tune": "After tuning"}
SHARP = 48  # pixels a side; up to this a picture is enlarged in sharp squares and kept without loss
PICTURE = "height width channels"


def called(stage: str, names: Mapping[str, str]) -> dict[str, str]:
    """What a stage is called above its pictures."""
    return {"stage": stage, "when": WHEN.get(stage, "Weights"), "name": names.get(stage, stage.replace("_", " "))}


def main_and_more(parts: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What is compared first, before and after tuning, and what is folded away: the control and other weights."""
    main = [part for part in parts if part["stage"] in ("pretrain", "tune")] or parts
    return {"main": main, "more": [part for part in parts if part not in main]}


def _image(picture: np.ndarray, max_side: int) -> dict[str, Any]:
    """A picture as a data address; small ones stay as they are, for the style sheet to enlarge with sharp pixels."""
    sharp = max(picture.shape[:2]) <= SHARP
    picture = resize(picture, max_side=max_side)
    return {"src": data_address(to_png(picture) if sharp else to_jpeg(picture)), "sharp": sharp}


def _of_same_queries(parts: Iterable[tuple[str, dict[str, Any]]], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Stages that show the same queries, together: groups of {'queries', 'count', 'main', 'more'}."""
    groups: list[dict[str, Any]] = []
    for stage, part in parts:
        queries, count = part.pop("queries"), part.pop("count")
        group = next((group for group in groups if (group["queries"], group["count"]) == (queries, count)), None)
        if group is None:
            groups.append(group := {"queries": queries, "count": count, "parts": []})
        group["parts"].append(called(stage, names) | part)
    return [group | main_and_more(group.pop("parts")) for group in groups]


def neighbors(folder: epath.Path, names: Mapping[str, str], absent: dict[str, str]) -> list[dict[str, Any]]:
    """Groups of the same queries, each with one strip of neighbours for every stage that has them."""
    arrays = ("query", "neighbor", "query_label", "neighbor_label", "similarity", "classes")
    return _of_same_queries(read_stages(folder, "neighbors", arrays, _strip, absent), names)


def _strip(query, neighbor, query_label, neighbor_label, similarity, classes) -> dict[str, Any]:
    """What is shown of one file of neighbours: the first queries, and for each a row of neighbours."""
    check_arrays(
        query=(query, "uint8", f"queries {PICTURE}"),
        neighbor=(neighbor, "uint8", f"queries neighbours {PICTURE}"),
        query_label=(query_label, "int", "queries"),
        neighbor_label=(neighbor_label, "int", "queries neighbours"),
        similarity=(similarity, "float", "queries neighbours"),
        classes=(classes, "str", "classes"),
    )
    same_qk = (neighbor_label == query_label[:, None])[:MAX_QUERIES]
    labelled = bool((query_label >= 0).all())
    rows: list[list[dict[str, Any]]] = [[] for _ in same_qk]
    for (i, j), same in np.ndenumerate(same_qk):
        text = {"label": class_name(classes, neighbor_label[i, j]), "similarity": f"{similarity[i, j]:.2f}"}
        rows[i].append(_image(neighbor[i, j], 80) | text | {"frame": _frame(same, labelled)})
    queries = [_image(query[i], 96) | {"label": class_name(classes, query_label[i])} for i in range(len(rows))]
    right_q = [int(right) for right in same_qk.sum(1)]
    found = {"queries": queries, "count": len(query), "rows": rows, "labelled": labelled}
    return found | {"right": right_q, "total": same_qk.size}


def _frame(same: bool, known: bool) -> str:
    """The class of a picture's frame in the style sheet."""
    return ("same" if same else "other") if known else "plain"


def clusters(
    folder: epath.Path, names: Mapping[str, str], absent: dict[str, str]
) -> dict[str, list[dict[str, Any]]] | None:
    """A grid a stage, a row a cluster, its most central pictures first."""
    arrays = ("picture", "label", "valid", "cluster_class", "size", "purity", "classes")
    grids = [called(stage, names) | grid for stage, grid in read_stages(folder, "clusters", arrays, _clusters, absent)]
    return main_and_more(grids) if grids else None


def _clusters(picture, label, valid, cluster_class, size, purity, classes) -> dict[str, Any]:
    """What is shown of one file of clusters: ordered by the class that each was matched with, so that stages align."""
    check_arrays(
        picture=(picture, "uint8", f"clusters pictures {PICTURE}"),
        label=(label, "int", "clusters pictures"),
        valid=(valid, "bool", "clusters pictures"),
        cluster_class=(cluster_class, "int", "clusters"),
        size=(size, "int", "clusters"),
        purity=(purity, "float", "clusters"),
        classes=(classes, "str", "classes"),
    )
    matched_k = cluster_class >= 0
    order = np.lexsort((-size, cluster_class, ~matched_k))[:MAX_CLUSTERS]
    rows, right, total = [], 0, 0
    for k in order:
        tiles = []
        for m in np.flatnonzero(valid[k])[:MAX_PER_CLUSTER]:
            same, known = bool(label[k, m] == cluster_class[k]), bool(matched_k[k] and label[k, m] >= 0)
            tile = {"label": class_name(classes, label[k, m]), "frame": _frame(same, known)}
            tiles.append(_image(picture[k, m], 80) | tile)
            right, total = right + (same and known), total + known
        name = class_name(classes, cluster_class[k]) if matched_k[k] else "no class"
        share = f"{100 * purity[k]:.0f} %" if np.isfinite(purity[k]) else "–"
        rows.append({"name": name, "size": int(size[k]), "purity": share, "tiles": tiles})
    columns = min(MAX_PER_CLUSTER, picture.shape[1])
    return {"rows": rows, "count": len(picture), "columns": columns, "right": right, "total": total}


def attention(folder: epath.Path, names: Mapping[str, str], absent: dict[str, str]) -> list[dict[str, Any]]:
    """Groups of the same pictures, each with a row of heat maps for every stage that has them."""
    arrays = ("picture", "attention", "label", "classes")
    return _of_same_queries(read_stages(folder, "attention", arrays, _attention, absent), names)


def _attention(picture, attention, label, classes) -> dict[str, Any]:
    """What is shown of one file of attention: for each picture the mean over heads, then single heads."""
    check_arrays(
        picture=(picture, "uint8", f"pictures {PICTURE}"),
        attention=(attention, "float", "pictures heads grid grid"),
        label=(label, "int", "pictures"),
        classes=(classes, "str", "classes"),
    )
    if not (np.isfinite(attention).all() and (attention >= 0).all()):
        raise ValueError("attention must be finite and not negative")
    shown = range(min(len(picture), MAX_ATTENTION))
    heads = attention.shape[1]
    names = ["all heads"] + [f"head {head + 1}" for head in range(min(heads, MAX_HEADS))]
    rows = []
    for i in shown:
        maps_agg = [attention[i].mean(0), *attention[i, :MAX_HEADS]]
        tops = [float(map_gg.max()) for map_gg in maps_agg]
        rows.append(
            [
                {"name": name, "src": _heat(map_gg, top), "top": f"{100 * top:.2g} %"}
                for name, map_gg, top in zip(names, maps_agg, tops)
            ]
        )
    queries = [
        _image(picture[i], 160)
        | {"grey": _image(_grey(picture[i]), 160)["src"], "label": class_name(classes, label[i])}
        for i in shown
    ]
    return {"queries": queries, "count": len(picture), "rows": rows, "heads": heads}


def _grey(picture: np.ndarray) -> np.ndarray:
    """Brightness of a picture, uint8 [h, w, 1], so that colours laid over it keep their meaning."""
    return as_rgb(picture).mean(-1, keepdims=True).astype(np.uint8)


def _heat(map_gg: np.ndarray, top: float) -> str:
    """A map as the address of a picture of one pixel a patch, dark at 0 to bright at `top`."""
    heat_ggc = matplotlib.colormaps["inferno"](map_gg / top if top else map_gg, bytes=True)[..., :3]
    return data_address(to_png(heat_ggc))


def reconstructions(folder: epath.Path, absent: dict[str, str]) -> dict[str, Any] | None:
    """What is shown of the masked, reconstructed and original pictures."""
    names = ("masked", "reconstructed", "original")
    return read_arrays(folder / "reconstruction.npz", names, _triplets, absent)


def _triplets(*parts: np.ndarray) -> dict[str, Any]:
    masked, reconstructed, original = ((part, "uint8", f"pictures {PICTURE}") for part in parts)
    check_arrays(masked=masked, reconstructed=reconstructed, original=original)
    shown = range(min(len(parts[0]), MAX_RECONSTRUCTIONS))
    return {"triplets": [[_image(part[i], 192) for part in parts] for i in shown], "count": len(parts[0])}


def parts(folder: epath.Path, absent: dict[str, str]) -> dict[str, Any] | None:
    """What each part of a picture shows, what is made of it before and after training, and how far the parts differ."""
    names = ("original", "seen", "completed", "disagreement", "mean_disagreement", "error", "parts")
    read = {when: read_arrays(folder / f"parts_{when}.npz", names, _parts, absent) for when in ("before", "after")}
    found = {when: part for when, part in read.items() if part is not None}
    if len(found) == 2 and not all(np.array_equal(*(part[of] for part in found.values())) for of in ("seen", "parts")):
        absent["parts_before"] = "figures/parts_before.npz has other pictures or other parts than parts_after.npz."
        del found["before"]
    if not found:
        return None
    *_, last = found.values()
    count = int(last["parts"])
    top = max(float(part["disagreement"][:MAX_IN_PARTS].max()) for part in found.values())

    def row(when: str, i: int) -> dict[str, Any]:
        map_gg = found[when]["disagreement"][i]
        completed = [_image(picture, 128) for picture in found[when]["completed"][i, :MAX_PARTS]]
        heat = _heat(map_gg, top) if count > 2 else None
        return {"when": when, "completed": completed, "heat": heat, "mean": f"{map_gg.mean():.3g}"}

    return {
        "pictures": [
            {
                "original": _image(last["original"][i], 128),
                "seen": [_image(picture, 128) for picture in last["seen"][i, :MAX_PARTS]],
                "rows": [row(when, i) for when in found],
            }
            for i in range(min(len(last["original"]), MAX_IN_PARTS))
        ],
        "count": len(last["original"]),
        "parts": count,
        "shown_parts": min(last["seen"].shape[1], MAX_PARTS),
        "when": list(found),
        "numbers": _numbers_of_parts(list(found.values())) if count > 2 else [],
        "top": f"{top:.3g}",
        "scale": _heat(np.linspace(0, 1, 64)[None], 1.0),
    }


def _parts(original, seen, completed, disagreement, mean_disagreement, error, parts) -> dict[str, np.ndarray]:
    """The arrays of one file of parts, where they are what they should be."""
    check_arrays(
        original=(original, "uint8", f"pictures {PICTURE}"),
        seen=(seen, "uint8", f"pictures parts {PICTURE}"),
        completed=(completed, "uint8", f"pictures parts {PICTURE}"),
        disagreement=(disagreement, "float", "pictures grid grid"),
        mean_disagreement=(mean_disagreement, "float", ""),
        error=(error, "float", ""),
        parts=(parts, "int", ""),
    )
    for name, array in {"disagreement": disagreement, "mean_disagreement": mean_disagreement, "error": error}.items():
        if not (np.isfinite(array).all() and (array >= 0).all()):
            raise ValueError(f"{name} must be finite and not negative")
    if parts < seen.shape[1]:
        raise ValueError(f"parts must be at least the {seen.shape[1]} that are shown; it is {parts}")
    arrays = {"original": original, "seen": seen, "completed": completed, "parts": parts}
    return arrays | {"disagreement": disagreement, "mean_disagreement": mean_disagreement, "error": error}


def _numbers_of_parts(found: list[dict[str, np.ndarray]]) -> list[tuple[str, list[str]]]:
    """Disagreement, error and their ratio in each file, rows of a table."""
    apart, error = ([float(part[name]) for part in found] for name in ("mean_disagreement", "error"))
    ratio = [f"{a / e:.3g}" if e else "–" for a, e in zip(apart, error)]
    return [
        ("Disagreement", [f"{value:.3g}" for value in apart]),
        ("Error, root of its mean square", [f"{value:.3g}" for value in error]),
        ("Disagreement over error", ratio),
    ]
