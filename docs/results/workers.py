"""How much faster is a step if two processes share its directions, and is it the same step?

    python docs/results/workers.py docs/results/workers.json

Each process has one thread, and they exchange slopes by gloo on one machine. The network is that of Rike and Foerland
(MNIST, dense layers of 1024, 1024 and 10), the batch 64. Backprop is that of DistributedDataParallel, which averages
the gradients of the halves of the batch. Run it on a machine with two idle cores; it takes about a minute.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.core.units import number
from gradcost.estimators.presets import backprop, forward_gradient, mezo
from gradcost.papers.claims import markdown_table
from gradcost.tasks import Mnist
from gradcost.tasks.task import Batch
from gradcost.training.distributed import DirectionParallel
from gradcost.training.optimizers import SGD
from gradcost.training.train_state import TrainState

TASK = Mnist()
PROCESSES = (1, 2)
METHODS = {
    "MeZO, 8 directions": DirectionParallel(mezo(probes=8)),
    "MeZO, 32 directions": DirectionParallel(mezo(probes=32)),
    "forward gradient, 8 directions": DirectionParallel(forward_gradient(8)),
    "backprop": backprop(),
}
WARM, STEPS = 3, 20


def main(file: str) -> None:
    """Time each number of processes in turn, and write what the first process found."""
    found = []
    for processes in PROCESSES:
        port = free_port()
        context = multiprocessing.get_context("spawn")
        queue = context.SimpleQueue()
        workers = [context.Process(target=work, args=(rank, processes, port, queue)) for rank in range(processes)]
        for worker in workers:
            worker.start()
        found += queue.get()
        for worker in workers:
            worker.join()
    alone = {run["method"]: run["weights"] for run in found if run["processes"] == 1}
    start = weights_of(TASK.objective(Key(1)))
    for run in found:
        one, own = alone[run["method"]], run.pop("weights")
        run["difference"] = float(np.linalg.norm(own - one) / np.linalg.norm(one - start))
    record = {"task": repr(TASK), "steps": STEPS, "torch": torch.__version__, "runs": found}
    Path(file).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(Path(file)))


def work(rank: int, processes: int, port: int, queue: Any) -> None:
    """Train with every method in one of the processes, and put the results of the first one into the queue."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes)
    found = [{"method": name, "processes": processes, **steps(name, rank, processes)} for name in METHODS]
    if rank == 0:
        queue.put(found)
    dist.destroy_process_group()


def steps(name: str, rank: int, processes: int) -> dict[str, Any]:
    """Return the median milliseconds of a step, and the weights after all steps."""
    objective, seconds = TASK.objective(Key(1)), []
    is_backprop = METHODS[name] == backprop()
    if is_backprop and processes > 1:
        objective = Objective(DistributedDataParallel(objective.model), objective.loss)
    state = TrainState(objective, METHODS[name], SGD(1e-3))
    for step in range(WARM + STEPS):
        batch = TASK.batch_at(Key(2), step)
        if is_backprop:
            batch = Batch(*(part.chunk(processes)[rank] for part in batch))
        dist.barrier()
        began = time.perf_counter()
        state.step(batch, Key(3).fold("step", step))
        dist.barrier()
        seconds.append(time.perf_counter() - began)
    return {"ms": 1000 * median(seconds[WARM:]), "weights": weights_of(objective)}


def weights_of(objective: Objective) -> np.ndarray:
    return torch.cat([leaf.parameter.detach().flatten() for leaf in objective.leaves]).double().numpy()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def table(file: Path) -> str:
    """Return the time of a step of one and of two processes, and how far the weights differ after all steps."""
    runs = json.loads(file.read_text("utf-8"))["runs"]
    rows = []
    for name in METHODS:
        one, two = (run for run in runs if run["method"] == name)
        speed = number(one["ms"] / two["ms"], 2)
        difference = f"{two['difference']:.0e}" if two["difference"] else "0"
        rows.append([name, number(one["ms"]), number(two["ms"]), speed, difference])
    return markdown_table(["method", "ms, 1 process", "ms, 2 processes", "times as fast", "difference"], rows)


if __name__ == "__main__":
    main(sys.argv[1])
