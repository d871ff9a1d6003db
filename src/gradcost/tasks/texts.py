"""Classification of texts with pretrained models, and language modelling of a plain text.

This module needs the extra `gradcost[transformers]`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch

from gradcost.core.errors import BadInput
from gradcost.core.key import Key
from gradcost.core.metric import Metric
from gradcost.core.value import value
from gradcost.tasks import catalogue, charlm, data
from gradcost.tasks.architectures import Architecture
from gradcost.tasks.pretrained import CausalLm, Encoder, Lora, Verbalizer
from gradcost.tasks.pretrained_files import config, encoded, tokenizer
from gradcost.tasks.task import Split, Splits, Task, note_left_out, permutation

ENCODERS: dict[str, Architecture] = {"minilm": Encoder(), "minilm-lora": Encoder(lora=Lora())}
WORST, BEST = -0.5, 0.5  # mean ratings of the movie sentences beyond which a sentence has a label


class Texts(NamedTuple):
    """Labelled texts.

    Args:
        texts: the texts.
        labels: the class of each text, from 0.
        kept: number of characters at the end of each text that must stay. A text that is too long is cut at its
            beginning, and left out if these characters alone are too long. (): texts are cut at their end.
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    kept: tuple[int, ...] = ()


class TextSplits(NamedTuple):
    """The three parts of a data set of labelled texts."""

    train: Texts
    validation: Texts
    test: Texts


class TextTask(Task):
    """Classify texts: x int64 tokens of shape (N, length), padded on the right; y int64 of shape (N,).

    Class attributes:
    - `words`: one word per class, for a language model;
    - `prompt`: the text that a language model continues with a word, with {text} in place of the text.
    """

    words: ClassVar[tuple[str, ...]]
    prompt: ClassVar[str]
    length: int

    @property
    @abstractmethod
    def texts(self) -> Callable[[], TextSplits]:
        """The function that returns the labelled texts; the same function for tasks with the same texts."""

    @property
    def inputs(self) -> tuple[int, ...]:
        return (self.length,)

    @property
    def classes(self) -> int:
        return len(self.words)

    def splits(self) -> Splits:
        return _splits(self.texts, "{text}", _weights(self.model), self.length)


@lru_cache(maxsize=2)
def trec_texts() -> TextSplits:
    """Return TREC: the questions of the official training set without repetitions, and their coarse classes.

    Of these, 500 are set aside for the validation split and 500 for the test split, by a fixed permutation. The one
    byte that is not ASCII becomes a space.
    """
    path = data.verified(catalogue.TREC) / catalogue.TREC.pieces[0].name
    lines = path.read_bytes().replace(b"\xf0", b" ").decode("ascii").splitlines()
    pairs = [(text, label.partition(":")[0]) for label, _, text in (line.partition(" ") for line in lines)]
    return divided({text: TREC_CLASSES.index(label) for text, label in reversed(pairs)}, "trec", 500)


TREC_CLASSES = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")


@lru_cache(maxsize=2)
def movie_texts() -> TextSplits:
    """Return the movie sentences whose mean rating, from -4 to 4, is below -0.5 (class 0) or above 0.5 (class 1)."""
    path = data.verified(catalogue.MOVIES) / catalogue.MOVIES.pieces[0].name
    rows = [line.split("\t") for line in path.read_text("utf-8").splitlines()]
    rated = ((text, float(rating)) for _, rating, text in rows)
    return divided({text: int(r > BEST) for text, r in rated if not WORST <= r <= BEST}, "movies", 1000)


def divided(labels: dict[str, int], name: str, held_out: int) -> TextSplits:
    """Divide labelled texts by a fixed permutation.

    Args:
        labels: maps each text to its class. No text is in two splits.
        name: determines the permutation.
        held_out: number of texts in the validation split, and in the test split.
    """
    texts, classes = tuple(labels), tuple(labels.values())
    order = permutation(Key(0).fold(name), len(texts)).tolist()
    ends = (0, len(texts) - 2 * held_out, len(texts) - held_out, len(texts))
    parts = [order[start:end] for start, end in pairwise(ends)]
    return TextSplits(*(Texts(tuple(texts[i] for i in part), tuple(classes[i] for i in part)) for part in parts))


@lru_cache(maxsize=8)
def _splits(texts: Callable[[], TextSplits], prompt: str, weights: str, length: int) -> Splits:
    alone = _prompt_tokens(prompt, weights)
    if length <= alone:
        raise BadInput(f"length is {length} tokens, but the prompt alone has {alone}: choose a larger length.")
    parts = texts()
    found = Splits(*(_split(part, prompt, weights, length) for part in parts))
    note_left_out("Texts", found, [len(part.texts) for part in parts], length)
    return found


def _prompt_tokens(prompt: str, weights: str) -> int:
    """Return the number of tokens of a prompt without its text."""
    return len(tokenizer(weights)(prompt.replace("{text}", ""))["input_ids"])


def _split(part: Texts, prompt: str, weights: str, length: int) -> Split:
    cut = _cut(part, prompt, weights, length)
    least = part.kept or (0,) * len(cut)
    pairs = [
        (prompt.replace("{text}", text), label)
        for text, label, kept in zip(cut, part.labels, least, strict=True)
        if len(text) >= kept
    ]
    if not pairs:
        raise BadInput(f"no text fits into {length} tokens: choose a larger length.")
    prompts, labels = zip(*pairs, strict=True)
    return Split(encoded(weights, prompts, length), torch.tensor(labels, dtype=torch.int64))


def _cut(part: Texts, prompt: str, weights: str, length: int) -> list[str]:
    """Return parts of texts that fit into `length` tokens with the prompt, so that its words are not cut off."""
    encode, room = tokenizer(weights), length - _prompt_tokens(prompt, weights)
    offsets = encode(list(part.texts), add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    found = list(part.texts)
    for i, places in enumerate(offsets):
        if len(places) > room:
            found[i] = found[i][places[-room][0] :] if part.kept else found[i][: places[room - 1][1]]
    if not part.kept and prompt.endswith("{text}"):
        return found  # the tokenizer cuts the end of the text
    long: Sequence[int] = range(len(found))
    # A text that is cut can have more tokens than before, such as the bytes of a character that was divided.
    while long:
        tokens = encode([prompt.replace("{text}", found[i]) for i in long])["input_ids"]
        long = [i for i, row in zip(long, tokens, strict=True) if len(row) > length]
        for i in long:
            found[i] = found[i][1:] if part.kept else found[i][:-1]
    return found


def _weights(model: Architecture) -> str:
    weights = getattr(model, "weights", None)
    if weights is None:
        raise BadInput(f"a task of texts needs a pretrained model, such as Encoder('minilm-l6'), not {model!r}.")
    return weights


@value
class Trec(TextTask):
    """Questions and what they ask for: an abbreviation, description, entity, person, place or number.

    Splits: 4,381 questions for training, 500 for validation and 500 for test.

    Args:
        model: the architecture.
        batch: number of questions per batch.
        length: number of tokens per question; 97 % of the questions have at most 24 of MiniLM's.
    Source: Li and Roth (2002), the 5,452 training questions of TREC-6.
    """

    model: Architecture = Encoder()
    batch: int = 32
    length: int = 24
    models: ClassVar[dict[str, Architecture]] = ENCODERS
    words: ClassVar[tuple[str, ...]] = ("abbreviation", "description", "entity", "person", "place", "number")
    prompt: ClassVar[str] = "Question: {text}\nThe answer is a"

    @property
    def texts(self) -> Callable[[], TextSplits]:
        return trec_texts


@value
class Movies(TextTask):
    """Sentences of movie reviews, negative or positive.

    Splits: 8,041 sentences for training, 1,000 for validation and 1,000 for test. Sentences with a mean rating from
    -0.5 to 0.5 are left out.

    Args:
        model: the architecture.
        batch: number of sentences per batch.
        length: number of tokens per sentence.
    Source: Pang and Lee (2005), with the ratings of Hutto and Gilbert (2014).
    """

    model: Architecture = Encoder()
    batch: int = 32
    length: int = 48
    models: ClassVar[dict[str, Architecture]] = ENCODERS
    words: ClassVar[tuple[str, ...]] = ("terrible", "great")
    prompt: ClassVar[str] = "Review: {text}\nThe movie is"

    @property
    def texts(self) -> Callable[[], TextSplits]:
        return movie_texts


@value
class Prompted(Task):
    """Classify texts by the next word of a causal language model after a prompt.

    x: int64 tokens of the prompt, shape (N, length), padded on the right; y: int64 of shape (N,). A long text is
    cut, not the prompt after it.

    Args:
        of: the task with the texts, the prompt and the classes.
        model: the language model and its words.
        batch: number of texts per batch.
        length: number of tokens per prompt. None: the length of `of` and the tokens of its prompt without a text.
        held_out: number of texts of the validation split and of the test split, the first ones; None: all.
    Raises:
        BadInput: held_out is less than 1, or more than a split has.
    """

    of: TextTask = Trec()
    model: Architecture = Verbalizer(CausalLm(lora=Lora()), Trec.words)
    batch: int = 8
    length: int | None = None
    held_out: int | None = None
    models: ClassVar[dict[str, Architecture]] = {
        "smollm2-lora": Verbalizer(CausalLm(lora=Lora()), Trec.words),
        "smollm2": Verbalizer(CausalLm(), Trec.words),
    }
    steps: ClassVar[int] = 300

    @property
    def inputs(self) -> tuple[int, ...]:
        return (self._tokens,)

    @property
    def _tokens(self) -> int:
        if self.length is not None:
            return self.length
        return self.of.length + _prompt_tokens(self.of.prompt, _weights(self.model))

    @property
    def classes(self) -> int:
        return self.of.classes

    def splits(self) -> Splits:
        train, *others = _splits(self.of.texts, self.of.prompt, _weights(self.model), self._tokens)
        if self.held_out is None:
            return Splits(train, *others)
        most = min(len(part.y) for part in others)
        if not 1 <= self.held_out <= most:
            raise BadInput(f"held_out of {type(self).__name__} is 1 to {most}, not {self.held_out!r}.")
        return Splits(train, *(Split(part.x[: self.held_out], part.y[: self.held_out]) for part in others))


@value
class TextLm(Task):
    """Predict the next token of a text: x and y int64 of shape (N, length); y is x shifted by one token.

    Splits: the first 90 % of the tokens for training, the next 5 % for validation, the last 5 % for test. Each is cut
    into windows that do not overlap. Runs are ranked by the loss, in nats per token.

    Args:
        model: a causal language model.
        batch: number of windows per batch.
        length: number of tokens per window, at least 1.
        text: the path of a plain text file in UTF-8; "" is the default text of `CharLm`.
    """

    model: Architecture = CausalLm(lora=Lora())
    batch: int = 8
    length: int = 64
    text: str = ""
    models: ClassVar[dict[str, Architecture]] = {"smollm2-lora": CausalLm(lora=Lora()), "smollm2": CausalLm()}
    steps: ClassVar[int] = 300
    metric: ClassVar[Metric] = Metric("loss", lower_is_better=True)

    def __post_init__(self) -> None:
        if self.length < 1:
            raise BadInput(f"length of TextLm must be at least 1 token, not {self.length!r}.")

    @property
    def inputs(self) -> tuple[int, ...]:
        return (self.length,)

    @property
    def classes(self) -> int:
        return config(_weights(self.model)).vocab_size

    def splits(self) -> Splits:
        return _windows(self.text, _weights(self.model), self.length)


@lru_cache(maxsize=4)
def _windows(path: str, weights: str, length: int) -> Splits:
    tokens = tokenizer(weights)(charlm.plain_text(path), add_special_tokens=False)["input_ids"]
    return charlm.split_windows(torch.tensor(tokens, dtype=torch.int64), length, f"the text {path!r}")
