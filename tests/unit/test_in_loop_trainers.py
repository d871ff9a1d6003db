"""`checkpoint(model, saving)` inside DistributedDataParallel, the transformers Trainer and Lightning."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from gradcost.checkpointing import Blocks, Saving, checkpoint
from gradcost.planning.within import Within

pytestmark = pytest.mark.slow

POLICIES = [Blocks(), Within(200_000)]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.2), nn.Tanh()) for _ in range(6)])


def ddp_gradients(rank: int, port: int, saving: Saving | None, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = net()
    wrapped = DistributedDataParallel(model)
    torch.manual_seed(10 + rank)

    def run() -> None:
        for _ in range(2):
            wrapped(torch.rand(64, 32)).square().mean().backward()

    if saving is None:
        run()
    else:
        with checkpoint(model, saving):
            run()
    torch.save([parameter.grad for parameter in model.parameters()], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.parametrize("saving", POLICIES, ids=repr)
def test_two_processes_of_distributed_data_parallel(tmp_path: Path, saving: Saving):
    found: list[list[Tensor]] = []
    for policy in (None, saving):
        spawn(ddp_gradients, (free_port(), policy, str(tmp_path)), nprocs=2)
        found.append([g for rank in range(2) for g in torch.load(tmp_path / f"{rank}.pt")])
    assert len(found[0]) == 24
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("saving", [Blocks(), Within(560_000)], ids=repr)
def test_the_trainer_of_transformers(tmp_path: Path, saving: Saving):
    transformers: Any = pytest.importorskip("transformers")
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_dropout": 0.1}
    tokens = torch.randint(3, 90, (40, 12), generator=torch.Generator().manual_seed(3))
    rows = [{"input_ids": row, "labels": row} for row in tokens]

    def weights(policy: Saving | None) -> list[Tensor]:
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, use_cache=False))
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=5, per_device_train_batch_size=4, gradient_accumulation_steps=2,
            report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
        if policy is None:
            trainer.train()
        else:
            with checkpoint(model, policy):
                trainer.train()
        return [parameter.detach().clone() for parameter in model.parameters()]

    plain, within = weights(None), weights(saving)
    assert all(torch.equal(a, b) for a, b in zip(plain, within, strict=True))


@pytest.mark.parametrize("saving", POLICIES, ids=repr)
def test_the_trainer_of_lightning(tmp_path: Path, saving: Saving):
    lightning: Any = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 0.01)

    data = torch.utils.data.TensorDataset(torch.rand(64, 32, generator=torch.Generator().manual_seed(1)))

    def weights(policy: Saving | None) -> list[Tensor]:
        module = Module()
        torch.manual_seed(2)
        trainer = lightning.Trainer(
            max_steps=5, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
            enable_model_summary=False, default_root_dir=str(tmp_path),
        )  # fmt: skip
        loader = torch.utils.data.DataLoader(data, 16)
        if policy is None:
            trainer.fit(module, loader)
        else:
            with checkpoint(module.net, policy):
                trainer.fit(module, loader)
        return [parameter.detach().clone() for parameter in module.parameters()]

    plain, within = weights(None), weights(saving)
    assert all(torch.equal(a, b) for a, b in zip(plain, within, strict=True))
