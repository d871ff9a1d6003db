"""Probing in many processes: the weights of one process, the same bits in each, and a few bytes per step."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import gradcost
from gradcost import Clipped, Key, Objective, Rademacher, backprop, forward_gradient, mezo
from gradcost.core.errors import BadInput, Unsupported
from gradcost.core.isolation import seeded_generators
from gradcost.directions import Layerwise
from gradcost.estimators import Probing, Projection
from gradcost.slopes.slope import CentralDifference, ForwardDifference, Jvp
from gradcost.training import SGD, Adam, StepLog, read_log
from gradcost.training.distributed import (
    BatchParallel,
    DirectionParallel,
    part_of,
    require_equal_weights,
    share_log,
)
from gradcost.training.step_log import weights_digest
from processes import Results, in_processes

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")

KEY = Key(18)


def objective(shift: float = 0.0) -> Objective:
    with seeded_generators(KEY):
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    with torch.no_grad():
        [*model.parameters()][-1].add_(shift)
    return Objective(model, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of which the parts have different numbers of targets that count."""
    with seeded_generators(KEY.fold("data")):
        found = [(torch.randn(16, 6), torch.randint(3, (16,))) for _ in range(count)]
    for number, (_, targets) in enumerate(found):
        targets[1 + number % 3 : 6] = -100
    return found


PAIRS: dict[str, tuple[Any, Any, Any]] = {
    "directions": (DirectionParallel(mezo(1e-3, 5)), mezo(1e-3, 5), SGD(0.05)),
    "directions, one probe": (DirectionParallel(mezo(1e-3)), mezo(1e-3), SGD(0.05)),
    "directions, projection": (
        Clipped(DirectionParallel(Probing(ForwardDifference(1e-3), Rademacher(), 3)), 0.3),
        Clipped(Probing(ForwardDifference(1e-3), Rademacher(), 3), 0.3),
        Adam(0.01),
    ),
    "batch": (BatchParallel(forward_gradient(2)), forward_gradient(2), Adam(0.01)),
    "batch, projection": (
        BatchParallel(Probing(Jvp(together=3), probes=3, combine=Projection())),
        Probing(Jvp(together=3), probes=3, combine=Projection()),
        SGD(0.02),
    ),
}


def train(estimator: Any, optimizer: Any, steps: int, data: Any, log: Path | None = None) -> Objective:
    made = objective()
    steplog = None if log is None else StepLog(log, 10)
    for _ in gradcost.train(made, data, estimator, optimizer, KEY, steps, log=steplog):
        pass
    return made


def weights(made: Objective) -> list[float]:
    return torch.cat([leaf.parameter.detach().flatten() for leaf in made.leaves]).tolist()


def counted(run: Callable[[], Any]) -> tuple[Any, list[int]]:
    """Return the result of `run`, and the bytes of each message that this process sends to all."""
    sent: list[int] = []
    original = dist.all_gather

    def counting(rows: list[Tensor], message: Tensor, *rest: Any) -> Any:
        sent.append(message.nbytes)
        return original(rows, message, *rest)

    dist.all_gather = counting  # type: ignore[assignment]
    try:
        return run(), sent
    finally:
        dist.all_gather = original


def parts(data: list[Any], name: str) -> list[Any]:
    return [part_of(batch) for batch in data] if name.startswith("batch") else data


def train_all(steps: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (parallel, _, optimizer) in PAIRS.items():
        data = parts(batches(4), name)
        made, sent = counted(lambda p=parallel, o=optimizer, d=data: train(p, o, steps, d))
        digest = weights_digest(made).hex()
        found[name] = {"digest": digest, "weights": weights(made), "sent": sent}
    return found


def refused(run: Callable[[], Any]) -> str:
    try:
        run()
    except (BadInput, Unsupported) as error:
        return str(error)
    return ""


def two(folder: Path) -> dict[str, Any]:
    """What two processes do: train in each way, share logs, and meet what is refused."""
    rank = dist.get_rank()
    found = train_all(6)
    own = folder / f"log{rank}"
    if rank == 0:  # process 1 was killed before it wrote anything, or joins late
        run, data = mezo(1e-3, 2), batches(4)
        train(run, SGD(0.05), 5, data, own)
    dist.barrier()
    found["shared"] = share_log(own)
    found["after"] = weights(train(DirectionParallel(mezo(1e-3, 2)), SGD(0.05), 8, batches(4), own))
    found["log"] = own.read_bytes().hex()
    if rank == 1:
        data = own.read_bytes()
        (folder / "damaged1").write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    else:
        (folder / "damaged0").write_bytes(own.read_bytes())
    found["damaged"] = refused(lambda: share_log(folder / f"damaged{rank}"))
    train(mezo(1e-3, 2), SGD(0.05 + rank), 3 + rank, batches(4), folder / f"other{rank}")
    found["other run"] = refused(lambda: share_log(folder / f"other{rank}"))
    found["no logs"] = share_log(folder / f"none{rank}")
    batch = batches(1)[0]
    parallel = DirectionParallel(mezo(1e-3, 2))
    found["other key"] = refused(lambda: parallel.estimate(objective(), batch, Key(rank)))
    found["equal weights"] = refused(lambda: require_equal_weights(objective()))
    found["other weights"] = refused(lambda: require_equal_weights(objective(0.1 * rank)))
    return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return in_processes(two, tmp_path_factory.mktemp("two"), 2)


def assert_as_one_process(results: Results, name: str, steps: int) -> None:
    _, alone, optimizer = PAIRS[name]
    assert len({result[name]["digest"] for result in results}) == 1, "the same bits in each process"
    expected = torch.tensor(weights(train(alone, optimizer, steps, batches(4))))
    found = torch.tensor(results[0][name]["weights"])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert not torch.equal(expected, torch.tensor(weights(objective())))


@pytest.mark.parametrize("name", PAIRS)
def test_two_processes_have_the_weights_of_one(pair: Results, name: str):
    assert_as_one_process(pair, name, 6)


def assert_few_bytes(results: Results, steps: int) -> None:
    for name, (_, alone, _) in PAIRS.items():
        probes = getattr(alone, "probes", 3)
        for result in results:
            assert len(result[name]["sent"]) == steps
            assert max(result[name]["sent"]) <= 64 * probes, name


def test_a_step_sends_at_most_64_bytes_per_probe(pair: Results):
    assert_few_bytes(pair, 6)


def test_a_process_without_a_log_gets_that_of_another_one_and_goes_on(pair: Results):
    assert [result["shared"] for result in pair] == [5, 5]
    assert pair[0]["log"] == pair[1]["log"]
    assert pair[0]["after"] == pair[1]["after"]
    expected = torch.tensor(weights(train(mezo(1e-3, 2), SGD(0.05), 8, batches(4))))
    torch.testing.assert_close(torch.tensor(pair[0]["after"]), expected, rtol=1e-6, atol=1e-6)
    assert [result["no logs"] for result in pair] == [0, 0]


def test_a_damaged_log_and_logs_of_two_runs_are_refused_in_every_process(pair: Results):
    assert "the step log of process 1 is damaged" in pair[0]["damaged"]
    assert "is damaged at byte" in pair[1]["damaged"]
    assert "different runs" in pair[1]["other run"]
    assert "another run" in pair[0]["other run"] or "different runs" in pair[0]["other run"]


def test_processes_with_other_keys_or_weights_are_refused(pair: Results):
    assert "process 1 has another estimator, key or step than process 0" in pair[0]["other key"]
    assert [result["equal weights"] for result in pair] == ["", ""]
    assert all("other weights" in result["other weights"] for result in pair)


def test_without_a_process_group_everything_says_so(tmp_path: Path):
    batch = batches(1)[0]
    for parallel in (DirectionParallel(mezo()), BatchParallel(mezo())):
        assert "torchrun" in (parallel.objection(objective(), batch) or "")
        with pytest.raises(Unsupported, match="torchrun"):
            parallel.estimate(objective(), batch, KEY)
    for call in (
        lambda: part_of(batch),
        lambda: share_log(tmp_path / "log"),
        lambda: require_equal_weights(objective()),
    ):
        with pytest.raises(BadInput, match="torchrun"):
            call()


def test_only_a_probing_is_shared_out():
    for wrong, message in [
        (backprop(), "shares out a Probing"),
        (Clipped(mezo()), r"Clipped\(DirectionParallel\(mezo\(\)\)\)"),
        (Probing(CentralDifference(1e-3), Layerwise()), "have a state"),
    ]:
        with pytest.raises(BadInput, match=message):
            DirectionParallel(wrong)  # type: ignore[arg-type]
    parallel = BatchParallel(mezo(1e-3, 2))
    assert parallel.replayable
    assert parallel.inner == mezo(1e-3, 2)
    assert repr(parallel) == f"BatchParallel(estimator={mezo(1e-3, 2)!r})"


# ---- four processes


def four(folder: Path) -> dict[str, Any]:
    found = train_all(100)
    model = nn.parallel.DistributedDataParallel(objective().model)
    sent: list[int] = []

    def hook(state, bucket):  # torch refuses annotations by text
        sent.append(bucket.buffer().nbytes)
        future: Any = dist.all_reduce(bucket.buffer(), async_op=True).get_future()  # type: ignore[union-attr]
        return future.then(lambda done: done.value()[0])

    model.register_comm_hook(None, hook)
    x, y = part_of(batches(1)[0])
    F.cross_entropy(model(x), y).backward()
    return found | {"ddp": sum(sent)}


@pytest.mark.slow
def test_100_steps_of_four_processes_have_the_weights_of_one(tmp_path: Path):
    results = in_processes(four, tmp_path, 4)
    for name in PAIRS:
        assert_as_one_process(results, name, 100)
    assert_few_bytes(results, 100)
    assert results[0]["ddp"] == 4 * objective().dimension, "DDP sends the gradient"
    assert results[0]["ddp"] > 4 * max(results[0]["directions"]["sent"])


SCRIPT = """
import os, signal, sys, threading
from pathlib import Path
import torch
import torch.distributed as dist
import gradcost
from gradcost import Key, mezo
from gradcost.tasks.digits import Digits
from gradcost.training import Adam, StepLog
from gradcost.training.distributed import DirectionParallel, share_log
from gradcost.training.step_log import weights_digest

torch.set_num_threads(1)
folder, kill = Path(sys.argv[1]), len(sys.argv) == 2
dist.init_process_group("gloo")
rank, attempt = dist.get_rank(), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
path = folder / f"log{rank}"
if attempt == 2 and rank == 1:
    path.unlink()  # a new machine without a file
with (folder / f"shared{rank}").open("a") as file:
    print(share_log(path), file=file)
victim = {0: (2, 13), 1: (0, 27), 2: (3, 33)}.get(attempt) if kill else None
task, estimator = Digits(batch=16), DirectionParallel(mezo(1e-3, 4))
for step in gradcost.train(task, estimator, Adam(0.01), Key(41), 45, log=StepLog(path, 10)):
    if victim == (rank, step.number):
        threading.Timer(0.0007 * (attempt + 1), os.kill, (os.getpid(), signal.SIGKILL)).start()
(folder / f"end{rank}").write_text(weights_digest(step.objective).hex())
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_killed_processes_catch_up_from_the_log(tmp_path: Path):
    """torchrun restarts after each of three `kill -9`. Once, the file of another process is lost too."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def torchrun(folder: str, *further: str) -> set[str]:
        made = tmp_path / folder
        made.mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
        command += ["--max-restarts=3", str(script), str(made), *further]
        # torch 2.13: else a restarted process connects to the old addresses in the store of torchrun
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        ran = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
        assert ran.returncode == 0, ran.stderr[-4000:]
        return {(made / f"end{rank}").read_text() for rank in range(4)}

    disturbed = torchrun("killed")
    assert len(disturbed) == 1
    shared = [
        [int(line) for line in (tmp_path / "killed" / f"shared{rank}").read_text().split()] for rank in range(4)
    ]
    assert len(set(map(tuple, shared))) == 1
    assert shared[0][0] == 0
    assert [low < taken <= low + 3 for low, taken in zip((13, 27, 33), shared[0][1:], strict=True)] == [True] * 3
    assert torchrun("undisturbed", "no kill") == disturbed
    logs = {(tmp_path / "killed" / f"log{rank}").read_bytes() for rank in range(4)}
    assert len(logs) == 1
    assert len(read_log(tmp_path / "killed" / "log0").steps) == 45
