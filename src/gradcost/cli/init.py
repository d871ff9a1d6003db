"""`gradcost init`: write a commented file with a model and loaders of one's own, which runs as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gradcost.core.errors import BadInput
from gradcost.core.files import write_whole

EXAMPLE = """\
\"\"\"Your own model and data for gradcost. This example runs as it is; replace the three functions.

    gradcost compare --model {name}:make --data {name}:loaders --dry-run
    gradcost compare --model {name}:make --data {name}:loaders
\"\"\"

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def loss(model, batch):
    # A scalar tensor. A batch is whatever the loaders yield: here a dictionary, in general any nesting of tensors.
    return nn.functional.mse_loss(model(batch["x"]).squeeze(-1), batch["y"])


def make():
    # Called for every run, so it makes a new model each time. The seed of the run sets torch's generator.
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    return model, loss  # a model of transformers may be returned alone: its own loss is used


def collate(rows):
    x, y = zip(*rows)
    return {{"x": torch.stack(x), "y": torch.stack(y)}}


def loaders(batch_size=32):
    # Learning rates are chosen on "validation"; the final runs are scored on "test" once. The parts have no example
    # in common. Data must be the same in every process: a fixed seed here, or files.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1600, 8, generator=generator)
    y = (x[:, 0] * x[:, 1]).tanh() + 0.1 * torch.randn(1600, generator=generator)
    parts = {{"train": slice(0, 1200), "validation": slice(1200, 1400), "test": slice(1400, 1600)}}
    return {{
        part: DataLoader(TensorDataset(x[rows], y[rows]), batch_size, shuffle=part == "train", collate_fn=collate)
        for part, rows in parts.items()
    }}


def mean_absolute_error(model, batch):
    # A metric of your own: --metric {name}:mean_absolute_error --lower-is-better. Without --metric the loss ranks.
    return (model(batch["x"]).squeeze(-1) - batch["y"]).abs().mean()
"""


def init(
    file: Annotated[Path, typer.Argument(help="The file to write.")] = Path("my_task.py"),
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented example of your own model and data, which `gradcost compare` runs as it is."""
    from gradcost.cli import console

    if file.suffix != ".py":
        raise BadInput(f"{file} is not a Python file: write {file.with_suffix('.py')}.")
    if file.exists() and not force:
        raise BadInput(f"{file} exists: choose another name, or replace it with --force.")
    if not file.name.isprintable() or any(character in file.name for character in "\\\"'"):
        raise BadInput(
            f"{file} cannot stand in a Python text: choose a name of letters, digits and _, such as my_task.py."
        )
    if file.is_symlink():
        raise BadInput(f"{file} is a link: name the file itself.")
    write_whole(file, EXAMPLE.format(name=file.name))
    console.show(f"wrote {file}. Next:")
    console.show(f"    gradcost compare --model {file}:make --data {file}:loaders --dry-run")
