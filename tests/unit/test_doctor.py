"""`diagnose`: what is missing, how to get it, and what makes timings doubtful."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gradcost.instruments import diagnose, doctor
from gradcost.noise.add import has_gpu_path
from in_process import inside


def found(what: str) -> Any:
    return next(finding for finding in diagnose() if finding.what == what)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    assert {"extra export", "extra study", "extra transformers"} <= {finding.what for finding in diagnose()}
    assert found("extra export").advice is None
    known = importlib.metadata.version

    def version(name: str) -> str:
        if name == "pyarrow":
            raise importlib.metadata.PackageNotFoundError
        return known(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert found("extra export").found == "no pyarrow"
    assert found("extra export").advice == 'pip install "gradcost[export]"'


def test_no_installed_package_of_the_tests_is_missing():
    """Distribution and module may have different names: pillow and PIL, scikit-learn and sklearn."""
    for extra in ("tasks", "transformers", "hub", "report", "study", "trainers", "export"):
        assert found(f"extra {extra}").advice is None, found(f"extra {extra}")


def test_a_torch_that_lacks_a_private_name_is_noticed(monkeypatch: pytest.MonkeyPatch):
    assert found("torch").found == f"{torch.__version__}, with all that is used of it"
    names = doctor._private_names()
    assert {"torch._C._is_fwd_grad_enabled", "torch._C.DisableTorchFunction"} <= names
    assert {"torch._C.DispatchKey", "torch._C._functorch.maybe_current_level"} <= names, "an alias hides no name"
    monkeypatch.setattr(doctor, "_private_names", lambda: {*names, "torch._C._no_such_name"})
    assert found("torch").found.endswith("without torch._C._no_such_name")
    assert "install the one of constraints-newest.txt" in found("torch").advice


def test_more_threads_than_cores_are_noticed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(doctor, "_cores", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    assert found("threads").found == "64 of 2 cores (OMP_NUM_THREADS=64)"
    assert "OMP_NUM_THREADS=2" in found("threads").advice
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert found("threads").advice is None


def test_allocator_gpu_and_clock_are_described(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    assert found("CPU allocator").found == "jemalloc (LD_PRELOAD)"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert found("GPU").found.startswith("none: ")
    assert found("clock").found.endswith("ns resolution")
    assert "spread of" in found("noise of timings").found


@pytest.mark.gpu
def test_a_gpu_is_described():
    assert "GiB, CUDA" in found("GPU 0").found
    assert found("GPU allocator").found == torch.cuda.get_allocator_backend()
    assert (found("GPU noise").advice is None) == has_gpu_path()


def test_the_command_prints_the_findings(tmp_path: Path):
    ran = inside("doctor", "--json", folder=tmp_path)
    assert ran.returncode == 0
    record = json.loads(ran.stdout)
    assert {"python", "torch", "threads", "cuda", "findings"} <= record.keys()
    whats = [finding["what"] for finding in record["findings"]]
    assert {"threads", "CPU allocator", "clock", "noise of timings"} <= set(whats)
    assert "noise of timings" in inside("doctor", folder=tmp_path).stdout
