"""Record a training run in a folder: the loss of every step, and training checkpoints from which it resumes."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path

from gradcost.core.errors import BadInput
from gradcost.core.files import write_whole
from gradcost.training import checkpoint
from gradcost.training.loop import StepResult

CHECKPOINT = "training.safetensors"
LOSSES = "losses.csv"
_HEAD = b"step,loss\n"


def recorded(steps: Iterator[StepResult], folder: Path, every: float | None = 30.0) -> Iterator[StepResult]:
    """Yield the steps of `train`, and record them in a folder.

    Law: a run that is killed at any moment and repeated with `train(resume=folder / "training.safetensors")` leaves
    the files of an undisturbed run. With a log, `losses.csv` may lack the step that was interrupted.

    Args:
        steps: the iterator that `train` returns, with `resume=folder / "training.safetensors"`, or with a log.
        folder: where `losses.csv` (one line per step) and the training checkpoint are written.
        every: least seconds between two training checkpoints; another one follows the last step. None: no training
            checkpoint, because the run has a step log.
    Yields:
        The steps.
    Raises:
        BadInput: `losses.csv` of the run that is resumed is damaged.
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written, last = time.monotonic(), None
    path, file = folder / LOSSES, None
    try:
        for step in steps:
            file = file or _opened(path, step.number)
            file.write(f"{step.number},{float(step.loss)!r}\n".encode())
            last = step
            if every is not None and time.monotonic() - written >= every:
                checkpoint.write(folder / CHECKPOINT, step.train_state)
                written, last = time.monotonic(), None
            yield step
        if every is not None and last is not None:
            checkpoint.write(folder / CHECKPOINT, last.train_state)
    finally:
        if file is not None:
            file.close()


def _opened(path: Path, step: int) -> io.FileIO:
    """Open the losses to append that of this step: the lines of it and of later steps are removed."""
    if path.exists() and not path.is_file():
        raise BadInput(f"{path} is no file: move it away, and repeat the command.")
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept = []
    for number, line in enumerate(lines[1:], 2):
        place = line.partition(b",")[0]
        if not (place.isdigit() and len(place) < 19):
            raise BadInput(
                f"line {number} of {path} is damaged: move the file away, and repeat the command. The training goes "
                "on from its checkpoint; a new file begins with the next step."
            )
        if line.endswith(b"\n") and int(place) < step:
            kept.append(line)
    write_whole(path, b"".join([_HEAD, *kept]))
    return path.open("ab", buffering=0)
