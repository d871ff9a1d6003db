"""Questions about images, answered by a vision-language model in words.

This module needs the extra `gradcost[transformers]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from gradcost.core.errors import BadInput
from gradcost.core.value import value
from gradcost.tasks import catalogue, data
from gradcost.tasks.answers import is_right, word_answer
from gradcost.tasks.architectures import Architecture
from gradcost.tasks.cifar10 import RECORD, SHAPE
from gradcost.tasks.generation import answer_texts, prompts_and_answers, question_tokens
from gradcost.tasks.task import Split, Splits, Task, score
from gradcost.tasks.vision_language import (
    ImageLanguage,
    ImageLogits,
    VisionLanguage,
    bytes_of_example,
    divided,
    generate,
    joined,
    vocabulary,
)

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
ANIMALS = frozenset(("bird", "cat", "deer", "dog", "frog", "horse"))
SHOWN, ANIMAL = "What is shown?", "Is this an animal?"


class Question(NamedTuple):
    """A question about an image, and its answer.

    Args:
        image: integers from 0 to 255, shape (3, side, side).
        question: the question.
        answer: the answer.
    """

    image: Tensor
    question: str
    answer: str


class AnswerScore(NamedTuple):
    """The score of a model that answers questions about images.

    Args:
        loss: mean cross-entropy per token of the gold answers, in nats.
        accuracy: fraction of the questions whose generated answer equals the gold answer, 0 to 1.
        token_accuracy: fraction of the tokens of the gold answers that are predicted, given those before.
        shown: the accuracy of the questions "What is shown?"; nan if there is none.
        animal: the accuracy of the questions "Is this an animal?"; nan if there is none.
    """

    loss: float
    accuracy: float
    token_accuracy: float
    shown: float = float("nan")
    animal: float = float("nan")


class ImageQuestions(Task):
    """Answer questions about images: x from `vision_language.joined`; y the next tokens, shape (N, length).

    Only the tokens of the answer and its end count: y is -100 in the question and in the padding. The accuracy is
    that of generated answers, which are parsed. Prompts for generation are padded on the left.
    """

    length: int
    generated: int

    @property
    def parse(self) -> Callable[[str], object]:
        """The function that returns the answer in a text."""
        return word_answer

    @property
    def inputs(self) -> tuple[int, ...]:
        return (bytes_of_example(image_model(self.model).side, self.length),)

    @property
    def classes(self) -> int:
        return len(vocabulary(image_model(self.model)))

    def gold_answers(self, split: Split) -> list[object]:
        """Return the right answer of each example of a split, parsed, for `majority` of a study.

        Args:
            split: one of the three `splits()`.
        """
        return [self.parse(text) for text in answer_texts(vocabulary(image_model(self.model)), split.y)]

    def answers(self, model: ImageLogits, split: Split) -> list[tuple[str, str, bool]]:
        """Return the question, the generated answer and whether it is right, for each example of a split.

        Args:
            model: the model of `objective`.
            split: one of the three `splits()`.
        """
        encode = vocabulary(image_model(self.model))
        found = []
        for x, y in zip(split.x.split(self.batch), split.y.split(self.batch), strict=True):
            images, tokens = divided(x, model.side)
            prompts, gold = prompts_and_answers(encode, tokens, y)
            texts = generate(model, images, prompts, encode, self.generated)
            asked = [encode.decode(prompt, skip_special_tokens=True) for prompt in prompts]
            for question, text, right in zip(asked, texts, gold, strict=True):
                found.append((question, text, is_right(text, right, self.parse)))
        return found

    def score(self, model: nn.Module, split: Split) -> AnswerScore:  # type: ignore[override]
        """Return the loss on the gold answers, and the accuracy of generated answers.

        Args:
            model: the model of `objective`.
            split: one of the three `splits()`.
        """
        assert isinstance(model, ImageLogits)
        parts = [score(model, Split(x, y)) for x, y in zip(split.x.split(64), split.y.split(64), strict=True)]
        targets = sum(part.targets or 0 for part in parts)
        loss, tokens = (
            sum(getattr(part, name) * (part.targets or 0) for part in parts) / targets
            for name in ("loss", "accuracy")
        )
        found = self.answers(model, split)
        of = {kind: [right for asked, _, right in found if kind in asked] for kind in (SHOWN, ANIMAL)}
        by_kind = (sum(each) / len(each) if each else float("nan") for each in of.values())
        return AnswerScore(loss, sum(right for _, _, right in found) / len(found), tokens, *by_kind)


@value
class Vqa(ImageQuestions):
    """Questions about the images of CIFAR-10: what is shown (ten words), and whether it is an animal (yes or no).

    Each image has one of the two questions, in turn. Always answering with the most frequent word gives an accuracy
    of 0.35: 0.1 for what is shown, and 0.6 for animals.

    Args:
        model: the architecture.
        batch: number of images per batch.
        length: number of tokens per question with its answer.
        examples: number of images in the training split, the first of the first four training files.
        held_out: number of images in the validation split, the first of the last training file, and in the test
            split, the first of the test file.
        generated: the largest number of generated tokens.
    Raises:
        BadInput: `examples` is not in 2 ... 40,000, or `held_out` not in 2 ... 10,000.
    """

    model: Architecture = VisionLanguage()
    batch: int = 16
    length: int = 16
    examples: int = 4000
    held_out: int = 200
    generated: int = 4
    models: ClassVar[dict[str, Architecture]] = {"smollm2-lora": VisionLanguage()}
    steps: ClassVar[int] = 200

    def __post_init__(self) -> None:
        if not (2 <= self.examples <= 40_000 and 2 <= self.held_out <= 10_000):
            raise BadInput(
                f"Vqa has 2 to 40,000 examples and 2 to 10,000 held out, not {self.examples} and {self.held_out}."
            )

    def splits(self) -> Splits:
        return _cifar10(image_model(self.model), self.length, self.examples, self.held_out)


@lru_cache(maxsize=2)
def _cifar10(model: ImageLanguage, length: int, examples: int, held_out: int) -> Splits:
    if model.side != SHAPE[1]:
        raise BadInput(f"the images of CIFAR-10 have {SHAPE[1]} pixels per side: set side={SHAPE[1]} of {model!r}.")
    folder = data.verified(catalogue.CIFAR10)
    files = ([f"data_batch_{number}.bin" for number in range(1, 5)], ["data_batch_5.bin"], ["test_batch.bin"])
    parts = []
    for names, count in zip(files, (examples, held_out, held_out), strict=True):
        content = b"".join((folder / name).read_bytes() for name in names)[: count * RECORD]
        records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, RECORD)
        parts.append(encoded(asked(records[:, 1:].view(-1, *SHAPE), records[:, 0].tolist()), model, length))
    return Splits(*parts)


def asked(images: Tensor, labels: Sequence[int]) -> list[Question]:
    """Return one question per image of CIFAR-10: what is shown and whether it is an animal, in turn.

    Args:
        images: integers from 0 to 255, shape (N, 3, 32, 32).
        labels: the classes.
    """
    found = []
    for place, (image, label) in enumerate(zip(images, labels, strict=True)):
        name = NAMES[label]
        yes_no = "yes" if name in ANIMALS else "no"
        found.append(Question(image, *((ANIMAL, yes_no) if place % 2 else (SHOWN, name))))
    return found


def encoded(questions: Iterable[Question], model: ImageLanguage, length: int) -> Split:
    """Return the examples of questions. Questions that are too long with their answers are left out.

    Args:
        questions: questions with images of `model.side` pixels per side.
        model: the vision-language model, for its tokenizer.
        length: number of tokens per question with its answer, without the end.
    Raises:
        BadInput: no question is short enough.
    """
    encode = vocabulary(model)
    examples, targets = [], []
    for image, question, answer in questions:
        if (pair := question_tokens(encode, question, answer, length)) is not None:
            examples.append(joined(image[None], torch.tensor(pair[:1], dtype=torch.int64)))
            targets.append(pair[1])
    if not examples:
        raise BadInput(f"no question with its answer has at most {length} tokens: choose a larger length.")
    return Split(torch.cat(examples), torch.tensor(targets, dtype=torch.int64))


def image_model(model: Any) -> ImageLanguage:
    """Return the model if it is a vision-language model.

    Raises:
        BadInput: it is another architecture.
    """
    if not isinstance(model, ImageLanguage):
        raise BadInput(
            f"questions about images need a vision-language model, such as VisionLanguage(), not {model!r}."
        )
    return model
