"""What the page says, in words and numbers ready to be shown, from the answers of each section.

Axes: none.
"""

import math
from collections.abc import Iterable
from typing import Any

from scripts.studies import accuracy, agreement, cost, coverage, limits, reduction
from scripts.studies.cells import Answer

Cells = dict[str, Answer]
_LETTERS = {"closed form": "c", "quadrature": "q", "brute force": "b"}
_NETWORKS = {"relu": "ReLU", "sign": "Sign"}
# The target for the best estimator, by statistic of `weight`.
ASKED = {"plugin": 1000, "unbiased": 30}


def agreement_facts(cells: Cells) -> Answer:
    """Counts, a table by model and law, a table by method."""
    methods = [
        {**method, "model": cell["settings"]["model"], "law": cell["settings"]["law"]}
        for cell in cells.values()
        for method in cell["answer"]["methods"]
    ]
    models = _unique(method["model"] for method in methods)
    laws = _unique(method["law"] for method in methods)
    return {
        "brute_force_draws": f"{agreement.BRUTE_FORCE_DRAWS:,}",
        "freedom": agreement.BLOCKS - 1,
        "largest_error": f"{agreement.LARGEST_ERROR:.0%}".replace("%", " %"),
        "separation": f"{agreement.LEAST_SEPARATION:.0f}",
        "count": len(methods),
        "agree": sum(method["agrees"] for method in methods),
        "powerful": sum(method["powerful"] for method in methods),
        "chance": f"at most {1 - 0.999 ** len(methods):.0%}".replace("%", " %"),
        "limit": f"{max(method['limit'] for method in methods):.2f}",
        "laws": laws,
        "models": [{"name": model, "cells": [_by_law(cells, model, law) for law in laws]} for model in models],
        "methods": _by_method(methods),
    }


def _by_law(cells: Cells, model: str, law: str) -> str:
    """The largest |t| of a model under a law, with marks."""
    cell = next((c for c in cells.values() if (c["settings"]["model"], c["settings"]["law"]) == (model, law)), None)
    if cell is None:
        return ""
    methods = cell["answer"]["methods"]
    marks = ("" if all(m["agrees"] for m in methods) else " ✗") + ("" if all(m["powerful"] for m in methods) else " ○")
    return f"{max(m['t'] for m in methods):.2f} {_LETTERS[cell['answer']['reference']]}{marks}"


def _by_method(methods: list[Answer]) -> list[dict[str, str]]:
    """Worst figures over laws of a model's estimator and design."""
    rows = []
    for model, estimator, design in _unique((m["model"], m["estimator"], m["design"]) for m in methods):
        own = [m for m in methods if (m["model"], m["estimator"], m["design"]) == (model, estimator, design)]
        apart = [m["separation"] for m in own if m["separation"] is not None]
        draws = [m["draws"] for m in own]
        rows.append(
            {
                "model": model,
                "estimator": estimator,
                "design": design,
                "laws": str(len(own)),
                "draws": _span(min(draws), max(draws)),
                "t": f"{max(m['t'] for m in own):.2f}",
                "error": f"{100 * max(m['largest_error'] for m in own):.2f}",
                "separation": f"{min(apart):.0f}" if apart else "",
            }
        )
    return rows


def _span(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def coverage_facts(cells: Cells) -> Answer:
    """One row a question."""
    rows = [{**cell["settings"], **cell["answer"]} for cell in cells.values()]
    low, high = coverage.BOUNDS
    outside = [key for key, cell in cells.items() if cell["answer"]["lowest"] < low or cell["answer"]["highest"] > high]
    return {
        "seeds": " and ".join(f"{count:,}" for count in _unique(row["seeds"] for row in rows)),
        "count": len(rows),
        "within": sum(low <= row["mean"] <= high for row in rows),
        "outside": outside,
        "scatter": f"{100 * math.sqrt(coverage.NOMINAL * (1 - coverage.NOMINAL) / rows[0]['seeds']):.1f} %",
        "low": f"{100 * low:.0f}",
        "high": f"{100 * high:.0f}",
        "sketch": coverage.SKETCH,
        "rows": [
            {
                **{name: row[name] for name in ("subject", "kind", "estimator", "design", "distribution", "draws")},
                "contraction": row["contraction"] or "",
                **{name: f"{100 * row[name]:.1f}" for name in ("lowest", "mean", "highest")},
                "stderr": f"{row['relative_stderr']:.2g}",
            }
            for row in rows
        ],
    }


def cost_facts(cells: Cells) -> Answer:
    """Ladders and factors of each network."""
    settings = next(iter(cells.values()))["settings"]
    return {
        "gamma": settings["gamma"],
        "widths": " and ".join(map(str, settings["widths"])),
        "target": f"{cost.TARGET:.0%}".replace("%", " %"),
        "coarse": f"{cost.COARSE:.0%}".replace("%", " %"),
        "blocks": settings["blocks"],
        "networks": [_network(key, cell) for key, cell in cells.items()],
    }


def _network(key: str, cell: Answer) -> Answer:
    settings, answer = cell["settings"], cell["answer"]
    count = settings["num_outputs"]
    local = answer["local_distance"]
    return {
        "key": key,
        "title": f"{_NETWORKS[settings['activation']]} network, {count} output{'s' if count > 1 else ''}",
        "num_parameters": f"{answer['num_parameters']:,}",
        "num_outputs": count,
        "examples": settings["examples"],
        "reference": {
            "draws": f"{answer['reference']['draws']:,}",
            "estimator": answer["reference"]["estimator"],
            "error": f"{answer['reference']['relative_error']:.2g}",
        },
        "local": None if local is None else f"{local:.0%}".replace("%", " %"),
        "methods": [_method(method) for method in answer["methods"]],
        "factors": [_factors(answer, count, statistic) for statistic in ("plugin", "unbiased")],
    }


def _method(method: Answer) -> dict[str, str]:
    target = method["at_target"]
    mark = "→ " if target["extrapolated"] else ""
    points = ", ".join(f"{point['draws']}: {point['error']:.2g}" for point in method["points"])
    return {
        "estimator": method["estimator"],
        "statistic": method["statistic"],
        "design": method["design"],
        "points": points,
        "noise": f"{method['law']['noise']:.3g}",
        "signal": f"{method['law']['signal']:.2g}" if method["law"]["signal"] else "",
        "draws": f"{mark}{target['draws']:,}",
        "forwards": f"{mark}{target['forwards']:,}",
        "seconds": f"{mark}{target['seconds']:,.1f}",
    }


def factors(answer: Answer, num_outputs: int, statistic: str, error: float) -> dict[str, float]:
    """How many times fewer forward equivalents than `weight` the best estimator needs: by design, best against best."""

    def forwards(weight: bool, design: str | None) -> int:
        needed = []
        for method in answer["methods"]:
            statistics = (statistic,) if weight else ("unbiased",)
            if (method["estimator"] == "weight") != weight or method["statistic"] not in statistics:
                continue
            if design in (None, method["design"]):
                draws = cost.draws_needed(cost.ErrorLaw(**method["law"]), method["design"], error)
                needed.append(cost.forwards(method["estimator"], draws, num_outputs))
        return min(needed)

    names: dict[str, str | None] = {"iid": "iid", "antithetic": "antithetic", "best": None}
    return {name: forwards(True, design) / forwards(False, design) for name, design in names.items()}


def _factors(answer: Answer, num_outputs: int, statistic: str) -> dict[str, str]:
    found = factors(answer, num_outputs, statistic, cost.TARGET)
    asked = ASKED[statistic]
    reached = "missed"
    if max(found.values()) >= asked:
        reached = "reached" if min(found.values()) >= asked else "reached in part"
    return {
        "against": f"`weight`, {statistic}",
        **{name: f"{value:,.0f}" for name, value in found.items()},
        "coarse": f"{factors(answer, num_outputs, statistic, cost.COARSE)['best']:,.0f}",
        "asked": f"{asked:,} ({reached})",
    }


def accuracy_facts(cells: Cells) -> Answer:
    """Searches by an asked accuracy, a row for each task."""
    first = next(iter(cells.values()))
    rows = [{"task": key, **_search(cell["answer"])} for key, cell in cells.items()]
    return {
        "rtol": f"{first['settings']['rtol']:.0%}".replace("%", " %"),
        "runs": first["settings"]["runs"],
        "share": f"{accuracy.SHARE:.0%}".replace("%", " %"),
        "held": all(cell["answer"]["below"] >= accuracy.SHARE * cell["answer"]["runs"] for cell in cells.values()),
        "dearest": f"{max(_price(cell['answer']) for cell in cells.values()):.2f}",
        "searches": rows,
    }


def _price(answer: Answer) -> float:
    """Draws of the median search over the smallest fixed number that does."""
    return float(answer["median_draws"]) / float(answer["smallest_fixed"])


def _search(answer: Answer) -> dict[str, str]:
    low, high = answer["draws_5_95"]
    return {
        "below": f"{answer['below']} of {answer['runs']}",
        "error": f"{100 * answer['median_error']:.2g} %",
        "bound": f"{100 * answer['median_bound']:.2g} %",
        "draws": f"{answer['median_draws']:,.0f}",
        "spread": f"{low:,.0f} to {high:,.0f}",
        "smallest": f"{answer['smallest_fixed']:,}",
        "price": f"{_price(answer):.2f}",
        "shares": ", ".join(
            f"{int(draws):,}: {share:.0%}".replace("%", " %") for draws, share in answer["shares"].items()
        ),
        "reference": f"{100 * answer['reference_error']:.2g} %" if answer["reference_error"] else "closed form",
    }


def limits_facts(cells: Cells) -> Answer:
    """Small ranges and scales of each model."""
    small = [cell for key, cell in cells.items() if key.startswith("small")]
    scales = [cell for key, cell in cells.items() if key.startswith("scales")]
    return {
        "few": limits.FEW_DRAWS,
        "range": f"{limits.DIFFERENCE_RANGE:g}",
        "ranges": [f"{gamma:g}" for gamma in small[0]["settings"]["ranges"]],
        "draws": f"{small[0]['answer']['draws']:,}",
        "limit": f"{max(cell['answer']['limit'] for cell in small):.2f}",
        "small": [
            {"model": cell["settings"]["model"], "kernel": kernel, "distances": [f"{d:.1e}" for d in distances]}
            for cell in small
            for kernel, distances in cell["answer"]["distances"].items()
        ],
        "differences": [{"model": cell["settings"]["model"], **_differences(cell["answer"])} for cell in small],
        "temperatures": [f"{temperature:g}" for temperature in limits.TEMPERATURES],
        "high": [
            {"model": cell["settings"]["model"], "score": score, "distances": [f"{d:.0e}" for d in distances]}
            for key, cell in cells.items()
            if key.startswith("temperatures")
            for score, distances in cell["answer"].items()
        ],
        "scales": [
            {
                "model": cell["settings"]["model"],
                "num_parameters": cell["answer"]["num_parameters"],
                **{kind: f"{value:.0e}" for kind, value in cell["answer"]["differences"].items()},
            }
            for cell in scales
        ],
    }


def _differences(answer: Answer) -> Answer:
    return {
        kind: {"t": f"{values['t']:.2f}", "error": f"{100 * values['largest_error']:.1f} %"}
        for kind, values in answer["differences"].items()
    }


def _unique(values: Iterable[Any]) -> list[Any]:
    """In the order of their first coming."""
    return list(dict.fromkeys(values))


def reduction_facts(cells: Cells) -> Answer:
    """What the same draws give with variance reduction and without."""
    rows = []
    for cell in cells.values():
        answer, settings = cell["answer"], cell["settings"]
        errors, forwards = answer["errors"], answer["forwards_at_target"]
        plain, reduced = (errors[f"{name} {reduction.DRAWS}"] for name in ("none", "auto"))
        rows.append(
            {
                "network": settings["network"],
                "gamma": f"{settings['gamma']:g}",
                "plain": f"{plain:.2g}",
                "reduced": f"{reduced:.2g}",
                "factor": f"{plain / reduced:.2g}",
                "few": f"{errors[f'auto {reduction.FEW_DRAWS}']:.2g}",
                "plain_forwards": f"{forwards['none']:,.0f}",
                "forwards": f"{forwards['auto']:,.0f}",
                "saved": f"{forwards['none'] / forwards['auto']:.2g}",
                "distance": f"{answer['distance']:.2g}",
                "expected": f"{answer['expected_distance']:.2g}",
            }
        )
    return {
        "rows": rows,
        "draws": reduction.DRAWS,
        "few": reduction.FEW_DRAWS,
        "blocks": reduction.BLOCKS,
        "examples": reduction.EXAMPLES,
        "seeds": max(cell["settings"]["seeds"] for cell in cells.values()),
        "target": f"{reduction.TARGET:.0%}".replace("%", " %"),
    }
