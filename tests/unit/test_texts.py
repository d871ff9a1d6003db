"""Tasks of texts on pretrained models: padding, prompts, adapters. The models are tiny and have random weights."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import tiny_models
from gradcost.core.errors import BadInput
from gradcost.core.key import Key
from gradcost.core.note import Note
from gradcost.core.value import value
from gradcost.estimators.presets import backprop, forward_gradient, mezo
from gradcost.planning.forecast import forecast
from gradcost.tasks import TASKS, pretrained_files, texts
from gradcost.tasks.architectures import Architecture, Mlp
from gradcost.tasks.pretrained import CausalLm, Encoder, Lora, Verbalizer, last_real
from gradcost.tasks.sources import DataError
from gradcost.tasks.task import Split, cross_entropy, score
from gradcost.tasks.texts import Movies, Prompted, TextLm, Texts, TextSplits, TextTask, Trec, divided
from vectors import estimated, true_gradient

KEY = Key(15)


def _letters() -> TextSplits:
    return TextSplits(
        Texts(("a b c d", "b", "c a a", "d e f a b c d e f"), (0, 1, 0, 1)), Texts(("a",), (0,)), Texts(("b",), (1,))
    )


@value
class Letters(TextTask):
    """Four texts of different lengths."""

    model: Architecture = Encoder()
    batch: int = 2
    length: int = 8
    models: ClassVar[dict[str, Architecture]] = {}
    words: ClassVar[tuple[str, ...]] = ("yes", "no")
    prompt: ClassVar[str] = "{text} the answer is"

    @property
    def texts(self) -> Callable[[], TextSplits]:
        return _letters


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.causal(tmp_path_factory.mktemp("causal"))


def tokens(weights: str, text: str) -> list[int]:
    return pretrained_files.tokenizer(weights)(text)["input_ids"]


# ---- tokens


def test_texts_are_cut_and_padded_on_the_right(encoder: str):
    train = Letters(Encoder(encoder)).splits().train
    assert train.x.tolist()[1] == [2, tiny_models.WORDS.index("b"), 3, 0, 0, 0, 0, 0]
    assert train.x.tolist()[3][-2:] == [tiny_models.WORDS.index("c"), 3]  # six letters between [CLS] and [SEP]
    assert train.y.tolist() == [0, 1, 0, 1]
    assert Letters(Encoder(encoder)).splits() is Letters(Encoder(encoder), batch=1).splits(), "one per process"


def test_a_prompt_follows_a_text_that_is_cut(causal: str):
    task = Prompted(Letters(), Verbalizer(CausalLm(causal), ("yes", "no")), batch=2, length=6)
    train = task.splits().train
    decoded = [pretrained_files.tokenizer(causal).decode(row) for row in train.x]
    assert decoded[0] == "a b c the answer is"
    assert decoded[1] == "b the answer is [END] [END]"
    assert decoded[3] == "d e f the answer is"
    with pytest.raises(BadInput, match="length is 3 tokens, but the prompt alone has 3"):
        replace(task, length=3).splits()


def _questions() -> TextSplits:
    texts = ("d e f d e f what ? a b", "what ? a b", "what ? a b c d e f a b c")
    part = Texts(texts, (0, 1, 0), tuple(len(text.partition("?")[2]) for text in texts))
    return TextSplits(part, part, part)


@value
class Choices(Letters):
    """Questions whose choices are at their end, as in MMLU."""

    @property
    def texts(self) -> Callable[[], TextSplits]:
        return _questions


@pytest.mark.parametrize("is_prompted", [False, True])
def test_the_end_that_is_kept_is_not_cut(encoder: str, causal: str, is_prompted: bool):
    """A long question of MMLU once lost its choices. A question whose choices are too long has no answer."""
    if is_prompted:
        task, end = Prompted(Choices(), Verbalizer(CausalLm(causal), ("yes", "no")), length=9), " the answer is"
    else:
        task, end = Choices(Encoder(encoder), length=8), " [SEP]"
    with pytest.warns(
        Note, match="Texts that do not fit into . tokens are left out: 1 of 3 for training, 1 of 3 for"
    ):
        train = task.splits().train
    decode = pretrained_files.tokenizer(causal if is_prompted else encoder).decode
    decoded = [decode(row).removeprefix("[CLS] ") for row in train.x]
    assert decoded[0] == "e f what ? a b" + end
    assert decoded[1].startswith("what ? a b" + end)
    assert train.y.tolist() == [0, 1]


def test_the_prompt_follows_a_text_that_is_cut_inside_a_character(tmp_path: Path):
    """The bytes of a character are several tokens. A text that was cut inside one lost the prompt's last token."""
    weights = tiny_models.byte_level(tmp_path)
    both = tuple(("日本語" * 9)[start:] + ending for start in range(3) for ending in ("", "!", "!!"))
    encode = pretrained_files.tokenizer(weights)
    for kept in ((), (1,) * len(both)):
        for length in (20, 21, 22):
            rows = texts._split(Texts(both, (0,) * len(both), kept), "{text} is:", weights, length).x
            decoded = [encode.decode(row, skip_special_tokens=True) for row in rows]
            assert [text[-4:] for text in decoded] == [" is:"] * len(both)
            assert all(len(text.encode()) > length - 3 for text in decoded)


def test_a_prompt_has_room_for_the_length_of_its_task(causal: str):
    """Prompted(BoolQ()) once had 32 tokens, whatever the length of BoolQ."""
    task = Prompted(Letters(length=9), Verbalizer(CausalLm(causal), ("yes", "no")), batch=2)
    assert task.inputs == (9 + 3,)
    train = task.splits().train
    assert train.x.shape == (4, 12)
    assert pretrained_files.tokenizer(causal).decode(train.x[3]) == "d e f a b c d e f the answer is"
    assert torch.equal(train.x, replace(task, length=12).splits().train.x)


def test_a_prompted_task_can_hold_out_fewer_texts(causal: str):
    task = Prompted(Letters(), Verbalizer(CausalLm(causal), ("yes", "no")), batch=2, length=6)
    whole, fewer = task.splits(), replace(task, held_out=1).splits()
    assert torch.equal(fewer.train.x, whole.train.x)
    for part, all_of_it in zip(fewer[1:], whole[1:], strict=True):
        assert torch.equal(part.x, all_of_it.x[:1])
        assert torch.equal(part.y, all_of_it.y[:1])
    for wrong in (0, 1000):
        with pytest.raises(BadInput, match=f"held_out of Prompted is 1 to .*, not {wrong}"):
            replace(task, held_out=wrong).splits()


def test_the_last_real_token_is_the_last_that_is_not_padding():
    rows = torch.tensor([[5, 6, 7], [5, 0, 0], [0, 6, 0], [0, 0, 0]])
    assert last_real(rows, 0).tolist() == [2, 0, 1, 0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("lora", [None, Lora()], ids=repr)
def test_padding_does_not_change_a_prediction(encoder: str, causal: str, attention: str, lora: Lora | None):
    """Left-out masks are a common error: the logits of a text then depend on the longest text of its batch."""
    for model in (
        Encoder(encoder, lora, attention),
        Verbalizer(CausalLm(causal, lora, attention), ("yes", "no")),
    ):
        built = Letters(model).objective(KEY).model.eval()
        row = pretrained_files.encoded(model.weights, ["a b c"], 8)
        short = row[:, : int(last_real(row, pretrained_files.padding_token(model.weights))) + 1]
        assert short.shape[1] < row.shape[1]
        torch.testing.assert_close(built(row), built(short))
        other = pretrained_files.encoded(model.weights, ["a b d"], 8)
        assert not torch.allclose(built(row), built(other))


def test_words_are_read_from_the_logits_of_the_vocabulary(causal: str):
    verbalizer = Verbalizer(CausalLm(causal), ("yes", "no"))
    built, lm = verbalizer.build((8,), 2).eval(), CausalLm(causal).build((8,), 0).eval()
    row = pretrained_files.encoded(causal, ["a b c"], 8)
    ids = [tiny_models.WORDS.index(word) for word in ("yes", "no")]
    torch.testing.assert_close(built(row)[0], lm(row)[0, 2, ids])


def test_ignored_targets_count_neither_in_the_loss_nor_in_the_score():
    """A padding that counts can be most of a language model's loss: 66% end tokens once made 3.1% read as 9.4%."""

    class Certain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.one_hot(torch.zeros_like(x), 3) * 100.0  # always class 0

    split = Split(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[0, 1, -100], [0, -100, -100]]))
    found = score(Certain(), split)
    assert (found.loss, found.accuracy, found.targets) == (pytest.approx(100 / 3), pytest.approx(2 / 3), 3)
    assert cross_entropy(Certain(), split).item() == pytest.approx(100 / 3)


# ---- models


def test_adapters_freeze_the_base_and_change_nothing_at_the_start(encoder: str):
    full, lora = (Letters(Encoder(encoder, adapters)).objective(KEY) for adapters in (None, Lora(rank=2)))
    names = [leaf.name for leaf in lora.leaves]
    assert sum("lora_" in name for name in names) == 2 * 2 * 2, "query and value of two layers, A and B"
    assert [name for name in names if "lora_" not in name] == [
        f"model.base_model.model.classifier.modules_to_save.default.{part}" for part in ("weight", "bias")
    ]
    assert lora.dimension == 8 * 2 * 16 + 16 * 2 + 2
    assert full.dimension > 1000
    batch = Letters(Encoder(encoder)).batch_at(KEY, 0)
    losses = [cross_entropy(each.model.eval(), batch) for each in (full, lora)]
    torch.testing.assert_close(*losses)


def test_options_of_adapters_are_those_of_peft(encoder: str):
    one = Letters(Encoder(encoder, Lora(4, 8.0, ("query", "key", "value", "dense"), 0.5))).objective(KEY).model
    adapted: list[Any] = [module for module in one.modules() if hasattr(module, "lora_A")]
    assert len(adapted) == 2 * (3 + 3) + 1  # three projections and three dense layers in a layer, and the pooler
    assert {module.scaling["default"] for module in adapted} == {2.0}
    assert {module.lora_dropout["default"].p for module in adapted} == {0.5}
    with pytest.raises(ValueError, match="peft cannot add LoRA adapters to BertForSequenceClassification"):
        Letters(Encoder(encoder, Lora(targets=("q_proj",)))).objective(KEY)
    for wrong in ({"rank": 0}, {"dropout": 1.0}):
        with pytest.raises(BadInput, match=next(iter(wrong))):
            Lora(**wrong)  # type: ignore[arg-type]


def test_a_task_survives_the_way_to_a_worker_and_builds_the_same_model(encoder: str):
    task = Letters(Encoder(encoder, Lora()))
    received = pickle.loads(pickle.dumps(task))
    assert received == task
    assert repr(received) == repr(task)
    weights = [[leaf.parameter for leaf in each.objective(KEY).leaves] for each in (task, received)]
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))
    others = [leaf.parameter for leaf in task.objective(Key(16)).leaves]
    assert not all(torch.equal(one, other) for one, other in zip(weights[0], others, strict=True))


@pytest.mark.parametrize("name", ["encoder", "verbalizer", "causal"])
def test_every_kind_of_method_trains_a_pretrained_model(name: str, encoder: str, causal: str, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f " * 200)
    lora = Lora(dropout=0.0)
    task = {
        "encoder": Letters(Encoder(encoder, lora)),
        "verbalizer": Prompted(Letters(), Verbalizer(CausalLm(causal, lora), ("yes", "no")), 2, 8),
        "causal": TextLm(CausalLm(causal, lora), 2, 8, str(text)),
    }[name]
    objective, batch = task.objective(KEY), task.batch_at(KEY, 0)
    exact = true_gradient(objective, batch, KEY)
    assert exact.abs().max() > 0
    slope = forward_gradient().estimate(objective, batch, KEY).slopes
    difference = mezo().estimate(objective, batch, KEY).slopes
    assert slope is not None
    assert difference is not None
    torch.testing.assert_close(slope, difference, rtol=0.05, atol=2e-3)  # the same direction, in float32
    torch.testing.assert_close(estimated(backprop(), objective, batch, KEY), exact)
    assert forecast(mezo(), objective, batch).forwards == 2.0


def test_language_modelling_predicts_the_next_token(causal: str, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f " * 50)
    task = TextLm(CausalLm(causal), batch=2, length=5, text=str(text))
    train = task.splits().train
    assert train.x.shape == (53, 5)
    assert train.x.flatten()[1:].tolist() == train.y.flatten()[:-1].tolist()
    assert task.classes == len(tiny_models.WORDS)
    assert task.objective(KEY).model(train.x[:1]).shape == (1, 5, task.classes)
    with pytest.raises(BadInput, match="too short"):
        replace(task, length=40).splits()


# ---- messages and data


def test_what_cannot_be_loaded_is_explained(tmp_path: Path, causal: str, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(DataError, match=r"cannot be loaded: .* folder that transformers saved"):
        Letters(Encoder(str(tmp_path))).splits()
    monkeypatch.setenv("GRADCOST_CACHE", str(tmp_path))
    for task, name in ((Trec(), "minilm-l6"), (Movies(), "minilm-l6"), (Prompted(), "smollm2-135m")):
        with pytest.raises(DataError, match=f"gradcost data fetch {name}"):
            task.splits()
    for load, name in ((texts.trec_texts, "trec"), (texts.movie_texts, "movies")):
        with pytest.raises(DataError, match=f"gradcost data fetch {name}"):
            load.__wrapped__()
    with pytest.raises(BadInput, match="needs a pretrained model"):
        Letters(Mlp()).splits()
    with pytest.raises(BadInput, match="two or more classes"):
        Verbalizer(words=("yes",))
    with pytest.raises(BadInput, match="3 classes and the Verbalizer 2 words"):
        Verbalizer(CausalLm(causal)).build((8,), 3)
    with pytest.raises(BadInput, match="begin with the same token"):
        Verbalizer(CausalLm(causal), ("a b", "a c")).build((8,), 2)


def test_texts_are_divided_without_overlap():
    labels = {str(number): number % 3 for number in range(100)}
    parts = divided(labels, "any", 10)
    assert [len(part.texts) for part in parts] == [80, 10, 10]
    found = [pair for part in parts for pair in zip(part.texts, part.labels, strict=True)]
    assert sorted(found) == sorted(labels.items())
    assert divided(labels, "any", 10) == parts
    assert divided(labels, "other", 10) != parts


@pytest.mark.parametrize(
    "name", ["trec", "movies", "smollm2", "smollm2-text", "ag_news", "boolq", "multirc", "mmlu", "gsm8k"]
)
def test_every_task_of_texts_has_a_name(name: str):
    task: Any = Prompted(length=32) if name == "smollm2" else TASKS[name]()
    assert task.inputs == (task.length,)
    if isinstance(task, TextTask):
        assert task.classes == len(set(task.words))
        assert "{text}" in task.prompt
