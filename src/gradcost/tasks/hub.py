"""Tasks on data sets of the Hugging Face hub, loaded by the library `datasets`.

`source` is the name on the hub, or a folder with files of the same columns, one per split, such as `train.jsonl`.
The test split is the official split with labels that is not for training. If there is only one such split, the
validation split is a tenth of the training split, at most 1,000 examples, by a fixed permutation. Rows that belong
together, such as questions about one paragraph, are never both in the training and in the validation split.

This module needs the extras `gradcost[hub,transformers]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from gradcost.core.errors import BadInput
from gradcost.core.value import value
from gradcost.tasks.answers import is_right, number_answer
from gradcost.tasks.architectures import Architecture
from gradcost.tasks.generation import answer_texts, continuations, prompts_and_answers, question_tokens
from gradcost.tasks.hub_rows import Parts, Row, rows
from gradcost.tasks.metrics import IGNORED
from gradcost.tasks.pretrained import CausalLm, Encoder, Lora
from gradcost.tasks.pretrained_files import tokenizer
from gradcost.tasks.task import Split, Splits, Task, note_left_out, score
from gradcost.tasks.texts import ENCODERS, Texts, TextSplits, TextTask


@lru_cache(maxsize=16)
def _loader(
    source: str, parts: Parts, text: Callable[[Row], str], label: str, end: Callable[[Row], str] | None = None
) -> Callable[[], TextSplits]:
    """Return the function that loads labelled texts; the same function for the same arguments. `end` is not cut."""

    @lru_cache(maxsize=1)
    def load() -> TextSplits:
        return TextSplits(*(texts(list(part)) for part in rows(source, parts)))

    def texts(part: list[Row]) -> Texts:
        kept = tuple(len(end(row)) for row in part) if end else ()
        return Texts(tuple(text(row) for row in part), tuple(int(row[label]) for row in part), kept)

    return load


@value
class AgNews(TextTask):
    """News articles of four topics: world, sports, business, technology.

    Args:
        model: the architecture.
        batch: number of articles per batch.
        length: number of tokens per article.
        source: the data set.
    Source: Zhang, Zhao, LeCun 2015 (arXiv 1509.01626).
    """

    model: Architecture = Encoder()
    batch: int = 8
    length: int = 64
    source: str = "fancyzhx/ag_news"
    models: ClassVar[dict[str, Architecture]] = ENCODERS
    words: ClassVar[tuple[str, ...]] = ("world", "sports", "business", "technology")
    prompt: ClassVar[str] = "{text}\nThe topic is"

    @property
    def texts(self) -> Callable[[], TextSplits]:
        return _loader(self.source, Parts("test", group="text"), _article, "label")


@value
class BoolQ(TextTask):
    """Questions about a passage, answered by no (class 0) or yes (class 1).

    Args:
        model: the architecture.
        batch: number of questions per batch.
        length: number of tokens per question with its passage; the passage is cut.
        source: the data set.
    Source: Clark et al. 2019 (arXiv 1905.10044).
    """

    model: Architecture = Encoder()
    batch: int = 8
    length: int = 128
    source: str = "google/boolq"
    models: ClassVar[dict[str, Architecture]] = ENCODERS
    words: ClassVar[tuple[str, ...]] = ("no", "yes")
    prompt: ClassVar[str] = "{text}\nAnswer yes or no:"

    @property
    def texts(self) -> Callable[[], TextSplits]:
        return _loader(self.source, Parts("validation", group="passage"), _question, "answer")


@value
class MultiRc(TextTask):
    """Answers to questions about a paragraph, which are wrong (class 0) or right (class 1).

    Args:
        model: the architecture.
        batch: number of answers per batch.
        length: number of tokens per answer with its question and paragraph; the paragraph is cut.
        source: the data set.
    Source: Khashabi et al. 2018 (NAACL).
    """

    model: Architecture = Encoder()
    batch: int = 8
    length: int = 256
    source: str = "aps/super_glue"
    models: ClassVar[dict[str, Architecture]] = ENCODERS
    words: ClassVar[tuple[str, ...]] = ("no", "yes")
    prompt: ClassVar[str] = "{text}\nIs the answer right?"

    @property
    def texts(self) -> Callable[[], TextSplits]:
        return _loader(self.source, Parts("validation", name="multirc", group="paragraph"), _answer, "label")


@value
class Mmlu(TextTask):
    """Questions with four choices, A to D, for a prompted language model: `Prompted(Mmlu(), ...)`.

    Args:
        model: the architecture.
        batch: number of questions per batch.
        length: number of tokens per question with its choices. The beginning of a long question is cut. Questions
            whose choices alone are too long are left out.
        source: the data set.
    Source: Hendrycks et al. 2021 (arXiv 2009.03300).
    """

    model: Architecture = Encoder()
    batch: int = 8
    length: int = 128
    source: str = "cais/mmlu"
    models: ClassVar[dict[str, Architecture]] = ENCODERS
    words: ClassVar[tuple[str, ...]] = ("A", "B", "C", "D")
    prompt: ClassVar[str] = "{text}\nAnswer:"

    @property
    def texts(self) -> Callable[[], TextSplits]:
        parts = Parts("test", "auxiliary_train", "validation", "all")
        return _loader(self.source, parts, _question_and_choices, "answer", _choices)


# What a text asks comes first, because a text that is too long is cut at its end. The choices of MMLU are kept.


def _article(row: Row) -> str:
    return row["text"]


def _question(row: Row) -> str:
    return f"{row['question']}?\n{row['passage']}"


def _answer(row: Row) -> str:
    return f"{row['question']} {row['answer']}\n{row['paragraph']}"


def _question_and_choices(row: Row) -> str:
    return row["question"] + _choices(row)


def _choices(row: Row) -> str:
    return "".join(f"\n{letter}. {choice}" for letter, choice in zip(Mmlu.words, row["choices"], strict=True))


# ---- GSM8K


class GeneratedScore(NamedTuple):
    """The score of a model that generates answers.

    Args:
        loss: mean cross-entropy per token of the gold answers, in nats.
        accuracy: fraction of the examples whose generated answer equals the gold answer, 0 to 1.
        token_accuracy: fraction of the tokens of the gold answers that are predicted, given those before.
    """

    loss: float
    accuracy: float
    token_accuracy: float


@value
class Gsm8k(Task):
    """Word problems with worked answers: x int64 tokens of shape (N, length); y is x shifted by one token.

    Only the tokens of the answer and its end count: y is -100 in the prompt and in the padding. The accuracy is that
    of generated answers, which are parsed (`answers.number_answer`). Prompts for generation are padded on the left.

    Args:
        model: a causal language model.
        batch: number of problems per batch.
        length: number of tokens per problem with its answer. Longer examples are left out of every split, and a
            `Note` has their number.
        generated: the largest number of generated tokens. None: the tokens of the longest gold answer of the
            validation and test splits, with its end.
        source: the data set.
    Source: Cobbe et al. 2021 (arXiv 2110.14168).
    """

    model: Architecture = CausalLm(lora=Lora())
    batch: int = 4
    length: int = 256
    generated: int | None = None
    source: str = "openai/gsm8k"
    models: ClassVar[dict[str, Architecture]] = {"smollm2-lora": CausalLm(lora=Lora()), "smollm2": CausalLm()}

    @property
    def inputs(self) -> tuple[int, ...]:
        return (self.length,)

    @property
    def classes(self) -> int:
        return len(tokenizer(_weights(self.model)))

    def splits(self) -> Splits:
        return _answered(self.source, _weights(self.model), self.length)

    @property
    def _generated(self) -> int:
        if self.generated is not None:
            return self.generated
        return max(int((part.y != IGNORED).sum(1).max()) for part in self.splits()[1:])

    def gold_answers(self, split: Split) -> list[object]:
        """Return the right answer of each problem of a split, parsed, for `majority` of a study.

        Args:
            split: one of the three `splits()`.
        """
        return [number_answer(text) for text in answer_texts(tokenizer(_weights(self.model)), split.y)]

    def score(self, model: nn.Module, split: Split) -> GeneratedScore:  # type: ignore[override]
        """Return the loss on the gold answers, and the accuracy of generated answers.

        Args:
            model: the model of `objective`.
            split: one of the three `splits()`.
        """
        teacher = score(model, split)
        encode, most = tokenizer(_weights(self.model)), self._generated
        right = 0
        for x, y in zip(split.x.split(self.batch), split.y.split(self.batch), strict=True):
            prompts, gold = prompts_and_answers(encode, x, y)
            found = generate(model, prompts, encode, most)
            right += sum(is_right(one, other, number_answer) for one, other in zip(found, gold, strict=True))
        return GeneratedScore(teacher.loss, right / len(split.x), teacher.accuracy)


def generate(model: nn.Module, prompts: list[Tensor], encode: Any, tokens: int) -> list[str]:
    """Return the continuation of each prompt by the most probable tokens (`generation.continuations`).

    Args:
        model: the module that `CausalLm` builds.
        prompts: int64 tokens, one dimension each.
        encode: the tokenizer, with a padding token.
        tokens: the largest number of tokens to generate.
    """
    inner: Any = model.model

    def continued(padded: Tensor, mask: Tensor, options: dict[str, Any]) -> Tensor:
        return inner.generate(input_ids=padded, attention_mask=mask, **options)[:, padded.shape[1] :]

    return continuations(model, continued, prompts, encode, tokens)


@lru_cache(maxsize=4)
def _answered(source: str, weights: str, length: int) -> Splits:
    encode = tokenizer(weights)
    parts = [list(part) for part in rows(source, Parts("test", name="main", group="question"))]
    found = Splits(*(_targets(part, encode, length, source) for part in parts))
    note_left_out("Problems", found, [len(part) for part in parts], length)
    return found


def _targets(part: Iterable[Row], encode: Any, length: int, source: str) -> Split:
    pairs = [question_tokens(encode, row["question"], row["answer"], length) for row in part]
    short = [pair for pair in pairs if pair is not None]
    if not short:
        raise BadInput(f"no example of {source!r} has at most {length} tokens: choose a larger length.")
    return Split(*(torch.tensor(each, dtype=torch.int64) for each in zip(*short, strict=True)))


def _weights(model: Architecture) -> str:
    if not isinstance(model, CausalLm):
        raise BadInput(f"Gsm8k needs a causal language model, such as CausalLm('smollm2-135m'), not {model!r}.")
    return model.weights
