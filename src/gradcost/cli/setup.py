"""`gradcost tasks`, `data fetch` and `doctor`: list tasks, download data, describe this installation."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from gradcost.cli.options import Json
from gradcost.core.errors import BadInput

NO_NUMBA = "plain torch: slower, and in two to four times the memory; pip install numba"


def tasks(as_json: Json = False) -> None:
    """List the tasks and their models."""
    from gradcost.cli import console, plugins
    from gradcost.tasks import TASKS

    entries = [
        {"name": name, "models": list(getattr(task, "models", ())), "what": (task.__doc__ or "").split("\n")[0]}
        for name, task in {**TASKS, **plugins.added(["task"], ())}.items()
    ]
    if as_json:
        console.print_json(entries)
        return
    rows = [[entry["name"], ", ".join(entry["models"]), entry["what"]] for entry in entries]
    console.show_table(["task", "models", "description"], rows, left=True)


def fetch(
    name: Annotated[
        str,
        typer.Argument(
            help="mnist, fashion_mnist, cifar10, trec, movies or emoji; or a model: minilm-l6, smollm2-135m or "
            "efficientnet-lite0."
        ),
    ],
) -> None:
    """Download a data set or a model, verify it, and store it in the cache folder, $GRADCOST_CACHE if set."""
    from gradcost.cli import console, spec
    from gradcost.tasks import catalogue, data

    if name not in catalogue.DATASETS:
        raise BadInput(
            f"there is no data set {name!r}.{spec.hint(name, catalogue.DATASETS)} Data sets: "
            f"{', '.join(catalogue.DATASETS)}."
        )
    console.show(f"{name} is in {data.fetch(catalogue.DATASETS[name], console.say)}")


def doctor(
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure the speed of this machine (10 s) and store it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show versions, threads, allocators, GPUs and clock noise, and what is missing and how to get it."""
    import torch

    from gradcost.cli import console
    from gradcost.instruments.doctor import diagnose
    from gradcost.noise.add import has_fused_path
    from gradcost.studies.environment import describe, fingerprint

    facts = describe(torch.get_num_threads(), fingerprint()) | {
        "cuda": str(torch.cuda.is_available()),
        "noise": "fused with the update (numba)" if has_fused_path() else NO_NUMBA,
    }
    findings = diagnose()
    rows = [[name, str(value), ""] for name, value in facts.items()]
    rows += [[finding.what, finding.found, finding.advice or ""] for finding in findings]
    if calibrate:
        from gradcost.planning import roofline

        rates = roofline.calibrate()
        console.say(f"stored in {roofline.store_rates(rates)}")
        facts |= {"rates": asdict(rates)}
        rows += [[*row, ""] for row in rates.rows()]
    if as_json:
        console.print_json(facts | {"findings": [asdict(finding) for finding in findings]})
        return
    console.show_table(["", "", "advice"], rows, left=True)
