"""Constructed results folders for the tests of the report; nothing here was measured."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from gradcost.results.records import Results, read

HOSTILE = "evil(\"</script><img src=x onerror=alert(1)>\", a|b & 'c')"

PROBING = "Probing(slope=Jvp(), probes=1)"

# label, estimator, final accuracy, final loss, peak bytes, forwards, ms, best learning rate of the grid
METHODS = [
    ("backprop()", "Reverse(saving=Everything())", 0.972, 0.09, 66_048, 3.0, 0.61, 0.1),
    ("checkpointed()", "Reverse(saving=Blocks())", 0.971, 0.092, 33_792, 4.0, 0.83, 0.1),
    (
        "accumulated(4)",
        "Accumulated(estimator=Reverse(saving=Everything()), parts=4)",
        0.95,
        0.13,
        24_064,
        3.0,
        1.4,
        0.1,
    ),
    ("forward_gradient(probes=8)", "Probing(slope=Jvp(), probes=8)", 0.905, 0.31, 41_472, 17.0, 3.4, 0.03),
    (
        "mezo()",
        "Probing(slope=CentralDifference(eps=0.001), probes=1)",
        0.712,
        0.98,
        19_968,
        2.0,
        0.74,
        0.001,
    ),
]
GRID = [1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0]


def study(methods: list[str], **changes: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "task": "Digits(validation=300, test=360)",
        "task_name": "digits",
        "model_name": "mlp",
        "weights": 4810,
        "weights_bytes": 19240,
        "methods": methods,
        "seeds": [0, 1, 2],
        "points": len(GRID),
        "steps": 600,
        "batch": 64,
        "target": 0.9,
        "memory": None,
        "optimizer": "SGD",
        "chance": 0.1,
        **changes,
    }


def trial(method: str, phase: str = "final", lr: float = 0.1, seed: int = 0, **changes: Any) -> dict[str, Any]:
    record = {
        "schema": 1,
        "kind": "trial",
        "trial": f"{method} {phase} {lr} {seed}".encode().hex(),
        "method": method,
        "estimator": "Reverse(saving=Everything())",
        "optimizer": f"SGD(lr={lr})",
        "phase": phase,
        "lr": lr,
        "seed": seed,
        "status": "finished",
        "steps": 600,
        "curve": {},
        "validation": None,
        "test": None,
        "clip_rate": None,
        "reached": None,
        "seconds": 3.0,
        "reason": None,
    }
    return {**record, **changes}


def cost(method: str, peak: int, ms: float, estimator: str, **changes: Any) -> dict[str, Any]:
    record = {"schema": 1, "kind": "cost", "method": method, "estimator": estimator, "peak_bytes": peak}
    record |= {"flops": 1_800_000, "forwards": 3.0, "matmuls": 8, "ms": ms, "ms_low": ms * 0.96}
    record |= {"breakdown": {"parameters": 19_240, "inputs": 16_896, "gradients": 0, "temporaries": peak}}
    record |= {"operator": "aten.addmm.default", "module": "0"}
    return {**record, "ms_high": ms * 1.07, "doubt": None, "fits": None, **changes}


def quality(method: str, estimator: str, probes: int, d: int = 4810) -> dict[str, Any]:
    """Estimates slightly better than theory expects."""
    many = [1, 2, 4, 8, 16]
    theory = {"probes": many, "cosine": [(n / (n + d)) ** 0.5 for n in many], "error": [(d + 1) / n for n in many]}
    record = {"schema": 1, "kind": "quality", "method": method, "estimator": estimator, "dimension": d}
    record |= {"probes": probes, "draws": 32, "cosine": (probes / (probes + d)) ** 0.5 * 1.1, "cosine_se": 0.001}
    return record | {"error": (d + 1) / probes * 0.9, "error_se": 40.0, "theory": theory}


def slopes(chance: random.Random, path: dict[str, Any]) -> dict[str, Any]:
    """Add slopes with one spike to a curve, and return their summary."""
    path["slope"] = [abs(chance.gauss(0, 1)) + 0.1 for _ in path["step"]]
    path["slope"][300] = 40.0
    first = [{"step": 300, "slope": 40.0, "threshold": 9.5}]
    return {"number": 600, "largest": 40.0, "spikes": 1, "first": first}


def curve(chance: random.Random, best: float, least: float, rate: float, steps: int) -> dict[str, Any]:
    """A loss that falls from log 10 to `least` and an accuracy that rises to `best`, with noise."""
    fall = [math.exp(-s * rate / steps) for s in range(steps)]
    loss = [least + (2.3 - least) * f * chance.uniform(0.85, 1.15) for f in fall]
    at = list(range(0, steps, 50)) + [steps - 1]
    return {
        "step": list(range(steps)),
        "loss": [max(x * chance.uniform(0.7, 1.3), 1e-3) for x in loss],
        "validation_step": at,
        "validation_loss": [loss[s] * chance.uniform(0.95, 1.05) for s in at],
        "validation_accuracy": [min(best - (best - 0.1) * fall[s] * chance.uniform(0.9, 1.1), 1.0) for s in at],
    }


def records(seed: int = 0) -> list[dict[str, Any]]:
    """A complete study: tuning with an edge and diverged rates, final runs, costs and a refusal."""
    chance, lines = random.Random(seed), []
    for label, estimator, best, least, peak, forwards, ms, rate in METHODS:
        doubt = "the quartiles lie 31% apart: the machine was busy" if label == "mezo()" else None
        lines.append(cost(label, peak, ms, estimator, forwards=forwards, doubt=doubt))
        if "Probing" in estimator:
            lines.append(quality(label, estimator, 8 if "probes=8" in estimator else 1))
        for lr in GRID:
            away = abs(math.log10(lr / rate))
            score = {"loss": least + 0.5 * away, "accuracy": max(best - 0.16 * away**1.6, 0.1)}
            run = trial(label, "tune", lr, estimator=estimator, validation=score)
            if lr > rate * 4:
                reason = f"the loss was not finite at step {chance.randrange(20, 300)}"
                run |= {"status": "diverged", "validation": None, "reason": reason}
            lines.append(run)
        for s in range(3):
            path = curve(chance, best, least, 7.0 if "Reverse" in estimator else 3.0, 600)
            score = {
                "loss": least * chance.uniform(0.95, 1.05),
                "accuracy": best + chance.uniform(-0.006, 0.006),
            }
            over = [a for a, v in zip(path["validation_step"], path["validation_accuracy"], strict=True) if v >= 0.9]
            more = {"curve": path, "validation": score, "test": score, "reached": over[0] if over else None}
            if "Probing" in estimator:
                more["slopes"] = slopes(chance, path)
            clip = 0.021 if "Jvp" in estimator else None
            lines.append(trial(label, "final", rate, s, estimator=estimator, clip_rate=clip, **more))
    reason = "aten::_flash_attention_forward has no forward rule: use mezo(), which needs none."
    lines.append({"schema": 1, "kind": "refused", "method": HOSTILE, "estimator": "Probing()", "reason": reason})
    return lines


def write_folder(folder: Path, lines: list[dict[str, Any]] | None = None, **changes: Any) -> Path:
    """Write a results folder; without `lines`, the complete study."""
    lines = records() if lines is None else lines
    folder.mkdir(parents=True, exist_ok=True)
    methods = list(dict.fromkeys(line["method"] for line in lines))
    (folder / "study.json").write_text(json.dumps(study(methods, **changes)))
    machine = {"python": "3.11.9", "torch": "2.9.0", "cpu": "an invented processor", "threads": 2}
    machine |= {"gradcost": "0.1.0", "platform": "Linux x86_64", "commit": "0123abc"}
    (folder / "environment.json").write_text(json.dumps(machine))
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def results_of(tmp_path: Path, *methods: dict[str, Any], **changes: Any) -> Results:
    """Results of methods given by accuracies, peak, ms, flops, doubt and estimator."""
    lines: list[dict[str, Any]] = []
    for method in methods:
        name, estimator = method["method"], method.get("estimator", "Reverse(saving=Everything())")
        costs = {field: method[field] for field in ("fits", "flops", "doubt") if field in method}
        lines.append(cost(name, method.get("peak", 1024), method.get("ms", 1.0), estimator, **costs))
        for seed, accuracy in enumerate(method.get("accuracies", [])):
            scores = None if accuracy is None else {"loss": 1 - accuracy, "accuracy": accuracy}
            status = "diverged" if accuracy is None else "finished"
            lines.append(trial(name, seed=seed, status=status, test=scores, estimator=estimator))
    return read(write_folder(tmp_path / "made", lines, **changes))
