"""The data and weights of `gradcost data fetch` are those that are named, and they train. Nothing is fetched here."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradcost.core.files import cache_folder
from gradcost.core.key import Key
from gradcost.estimators.presets import backprop
from gradcost.tasks import pretrained_files
from gradcost.tasks.hub import generate
from gradcost.tasks.pretrained import CausalLm, Encoder
from gradcost.tasks.texts import Movies, Trec
from gradcost.training.loop import train
from gradcost.training.optimizers import AdamW
from in_process import inside

pytestmark = pytest.mark.slow
VISION_LANGUAGE = ("smollm2-135m", "efficientnet-lite0")


def needs(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if not (cache_folder() / name).is_dir()]
    return pytest.mark.skipif(bool(missing), reason=f"gradcost data fetch {' '.join(missing)}")


@needs("trec", "movies", "minilm-l6")
def test_the_splits_have_the_sizes_of_the_documentation():
    assert [len(part.x) for part in Trec().splits()] == [4381, 500, 500]
    assert [len(part.x) for part in Movies().splits()] == [8041, 1000, 1000]
    assert Trec().splits().train.y.bincount(minlength=6).min() > 50


@needs("minilm-l6")
def test_minilm_puts_a_paraphrase_near_and_another_sentence_far():
    import transformers

    model: Any = transformers.AutoModel.from_pretrained(pretrained_files.location(pretrained_files.MINILM)).eval()
    sentences = ["A man is eating food.", "A man is eating a piece of bread.", "The girl is carrying a baby."]
    rows = pretrained_files.encoded(pretrained_files.MINILM, sentences, 16)
    mask = (rows != 0).float()[:, :, None]
    with torch.no_grad():
        hidden = model(input_ids=rows, attention_mask=(rows != 0).long()).last_hidden_state
    means = nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
    assert (means[0] @ means[1]).item() == pytest.approx(EATING, abs=0.01)
    assert (means[0] @ means[2]).item() < 0.2


EATING = 0.755  # printed by the documentation of sentence-transformers for the first two sentences


@needs("smollm2-135m", "smollm2-135m-float32")
def test_smollm2_continues_a_factual_prompt():
    model = CausalLm().build((16,), 0)
    encode = pretrained_files.tokenizer(pretrained_files.SMOLLM2)
    prompts = [torch.tensor(encode(text)["input_ids"]) for text in PROMPTS]
    found = generate(model, prompts, encode, 6)
    assert all(answer in text for answer, text in zip(PROMPTS.values(), found, strict=True)), found


PROMPTS = {
    "The capital of France is": "Paris",
    "The largest planet in the solar system is": "Jupiter",
    "The chemical symbol for water is": "H2O",
    "Romeo and Juliet was written by William": "Shakespeare",
}


@needs("trec", "minilm-l6")
def test_backprop_reaches_92_percent_on_trec():
    """One epoch and a half of full fine-tuning."""
    task = Trec(Encoder())
    model = task.objective(Key(1)).model
    for step in train(task, backprop(), AdamW(1e-4), Key(1), 205):
        model = step.objective.model
    assert task.score(model, task.splits().validation).accuracy >= 0.92


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        pytest.param("panchal2025.md", "panchal2025", marks=needs("trec", "minilm-l6")),
        pytest.param("panchal2025_6000.md", "panchal2025-6000", marks=needs("trec", "minilm-l6")),
        pytest.param("panchal2025_variants_6000.md", "panchal2025-variants-6000", marks=needs("trec", "minilm-l6")),
        pytest.param("panchal2025_full.md", "panchal2025-full", marks=needs("trec", "minilm-l6")),
        pytest.param("panchal2025_variants.md", "panchal2025-variants", marks=needs("mnist")),
        pytest.param("panchal2025_coded.md", "panchal2025-coded", marks=needs("mnist")),
        pytest.param("panchal2025_smollm2.md", "panchal2025-smollm2", marks=needs("trec", "smollm2-135m")),
        pytest.param("panchal2025_vqa.md", "panchal2025-vqa", marks=needs("cifar10", *VISION_LANGUAGE)),
    ],
)
def test_a_page_on_panchal2025_is_that_of_the_records_beside_it(name: str, folder: str, tmp_path: Path):
    docs = Path(__file__).parents[2] / "docs" / "results"
    written = (docs / name).read_text()
    command = next(line.split("`")[1] for line in written.splitlines() if line.startswith("| command |"))
    words = shlex.split(command)[1:-1]
    page = tmp_path / name
    ran = inside(*words, str(page), "--records", "-o", str(docs / folder), folder=tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert page.read_text() == written
