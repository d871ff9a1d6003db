"""`status`, `report`, `lint` and `export` on 5,000 records: CPU time and memory, each in a process of its own."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from bisect import bisect_left
from pathlib import Path
from typing import Any

import pytest
from report_records import cost, quality, study, trial, write_folder

from gradcost.report.figures import figures
from gradcost.results import ledger
from gradcost.results.export import curves
from gradcost.results.rankings import _interpolated
from gradcost.results.records import read

SECONDS, MIB = 5.0, 300
# Runs the command line as a child, and prints its seconds of CPU and the MiB of its peak memory.
MEASURED = """
import json, resource, subprocess, sys
ran = subprocess.run([sys.executable, "-m", "gradcost.cli.main", *sys.argv[1:]], stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([ran.returncode, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024]))
"""


def curve(chance: random.Random) -> dict[str, Any]:
    """Return the curve of a run of 600 steps: 60 points, and 35 evaluations."""
    steps = range(10, 601, 10)
    evaluated = sorted({max(1, round(1.25**power)) for power in range(28)} | set(range(30, 601, 30)))
    best = chance.uniform(0.85, 0.95)
    return {
        "step": list(steps),
        "loss": [round(2.3 * 0.99**step, 6) for step in steps],
        "slope": [round(chance.uniform(0.1, 1), 6) for _ in steps],
        "validation_step": evaluated,
        "validation_loss": [round(2.3 * 0.99**step, 6) for step in evaluated],
        "validation_accuracy": [round(best - 0.8 * 0.99**step, 6) for step in evaluated],
    }


def large_folder(folder: Path, methods: int, seeds: int, rates: int) -> Path:
    """Write `methods` x (`seeds` + `rates`) trials, each of about 3 KB as in a real study."""
    chance, lines = random.Random(1), []
    machine = {
        "python": "3.11.9",
        "torch": "2.9.0",
        "cpu": "an invented processor",
        "threads": 1,
        "gradcost": "0.1.0",
    }
    slopes = {"number": 600, "largest": 4.0, "spikes": 1, "first": [{"step": 9, "slope": 4.0, "threshold": 2.5}]}
    labels = [f"mezo(probes={number})" for number in range(1, methods + 1)]
    for number, label in enumerate(labels, 1):
        estimator = f"Probing(CentralDifference(0.001), probes={number})"
        lines += [cost(label, 20_000 + number, 0.5 + number / 100, estimator), quality(label, estimator, number)]
        shared = {"estimator": estimator, "environment": machine, "slopes": slopes, "task": "Digits()"}
        for place in range(rates):
            lr = float(f"{10 ** (-4 + 4 * place / rates):.3g}")
            score = {"loss": 0.5, "accuracy": 0.9 - abs(place - rates / 2) / 1000}
            lines.append(trial(label, "tune", lr, curve=curve(chance), validation=score, **shared))
        for seed in range(seeds):
            score = {"loss": 0.5, "accuracy": chance.uniform(0.88, 0.92), "targets": 360, "of": 360}
            more = {"curve": curve(chance), "validation": score, "test": score, "reached": 300}
            lines.append(trial(label, "final", 0.01, seed, **shared, **more))
    folder.mkdir()
    ledger.write_document(folder / "study.json", study(labels, seeds=[*range(seeds)], points=rates))
    ledger.write_document(folder / "environment.json", machine)
    sealed = (ledger._sealed(json.dumps(line, separators=(",", ":")), ",", ":") for line in lines)
    (folder / "records.jsonl").write_text("".join(sealed))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("methods", "seeds", "rates"), [(80, 33, 30), (20, 220, 30), (4, 1000, 250)])
def test_readers_take_seconds_for_5000_records(tmp_path: Path, methods: int, seeds: int, rates: int):
    """Before, the report took 46 s for 2,160 records of 80 methods. Needs a quiet machine."""
    folder = large_folder(tmp_path / "large", methods, seeds, rates)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GRADCOST_CACHE": str(tmp_path / "cache")}
    known = {}
    for name, more in {"status": (), "lint": (), "export": ("-o", "a.parquet"), "report": ("-o", "a.html")}.items():
        arguments = [sys.executable, "-c", MEASURED, name, str(folder), *more]
        times = 2 if name == "report" else 1  # the first report of a machine makes the JavaScript of Vega
        *_, ran = [
            subprocess.run(arguments, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, timeout=300)
            for _ in range(times)
        ]
        code, seconds, mib = json.loads(ran.stdout)
        assert code == 0
        known[name] = {"seconds": round(seconds, 2), "MiB": round(mib)}
    print({"records": methods * (seeds + rates), "load": os.getloadavg()[0], **known})
    assert all(each["seconds"] < SECONDS and each["MiB"] < MIB for each in known.values()), known


def test_every_figure_is_valid_vega_lite(tmp_path: Path):
    """The library draws without the checks of Altair, which take most of its time."""
    altair = pytest.importorskip("altair")
    drawn = figures(read(write_folder(tmp_path)))
    assert len(drawn) == 15
    for figure in drawn:
        altair.LayerChart.from_dict(figure.spec)
        names = {layer["data"]["name"] for layer in figure.spec["layer"] if "data" in layer}
        names |= {figure.spec["data"]["name"]} if "data" in figure.spec else set()
        assert names == set(figure.spec["datasets"])
    broken = {**drawn[0].spec, "layer": 5}
    with pytest.raises(Exception, match="5"):
        altair.LayerChart.from_dict(broken)


def read_at(steps: list[int], values: list[float], step: float) -> float:
    right = bisect_left(steps, step)
    if right == len(steps) or right == 0 or steps[right] == step:
        return values[min(right, len(steps) - 1)]
    left = values[right - 1]
    if math.isinf(values[right]) or math.isinf(left):
        return left
    return left + (step - steps[right - 1]) / (steps[right] - steps[right - 1]) * (values[right] - left)


def test_a_curve_is_read_at_any_step():
    import numpy as np

    chance, inf = random.Random(7), float("inf")
    for _ in range(200):
        steps = sorted(chance.sample(range(1, 50), chance.randrange(1, 9)))
        values = [chance.choice((chance.random(), -inf)) for _ in steps]
        at = [0.0, *(chance.uniform(0, 60) for _ in range(20)), *map(float, steps)]
        expected = [read_at(steps, values, step) for step in at]
        assert _interpolated(steps, values, np.array(at)).tolist() == expected  # type: ignore[arg-type]


def test_the_columns_of_the_curves_are_equally_long(tmp_path: Path):
    results = read(write_folder(tmp_path))
    columns = curves(results.trials)
    points = [(run, name) for run in results.trials for name in ("loss", "slope")]
    assert columns["what"].count("loss") == sum(len(run.curve.loss) for run in results.trials)
    assert len({len(column) for column in columns.values()}) == 1
    assert columns["value"][:3] == list(next(run for run, _ in points if run.curve.loss).curve.loss[:3])
