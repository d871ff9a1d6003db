"""Questions about images of the Hugging Face hub: VQAv2 and TextVQA.

`source` is the name on the hub, or a folder with files of the same columns, such as `train.jsonl`, whose images are
nested lists of integers (rows, columns, 3). Images are decoded one at a time and kept as bytes, 3 * side * side per
question. A question has the answers of ten people. They are normalised (`answers.normal_answer`), and the most
frequent one is the gold answer. Questions without such an answer are left out. The accuracy is the agreement with the
gold answer; it cannot be compared with the published accuracy of VQA, min(1, number of people who agree / 3).

This module needs the extras `gradcost[hub,transformers]`; images of the hub also need pillow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gradcost.core.errors import BadInput
from gradcost.core.value import value
from gradcost.tasks.answers import normal_answer
from gradcost.tasks.architectures import Architecture
from gradcost.tasks.hub_rows import Parts, Row, rows
from gradcost.tasks.task import Splits, note_left_out
from gradcost.tasks.vision_language import ImageLanguage, QwenVl, VisionLanguage
from gradcost.tasks.vqa import ImageQuestions, Question, encoded, image_model

MODELS: dict[str, Architecture] = {
    "smollm2-lora": VisionLanguage(side=112, size=96),
    "qwen2-vl": QwenVl(side=112),
}


class HubQuestions(ImageQuestions):
    """Questions of a data set on the hub.

    Class attributes:
    - `parts`: the splits of the data set.
    """

    source: str
    examples: int | None
    held_out: int | None
    parts: ClassVar[Parts]

    def __post_init__(self) -> None:
        for name in ("examples", "held_out"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise BadInput(f"{name} of {type(self).__name__} is 1 or more, or None for all, not {count!r}.")

    @property
    def parse(self) -> Callable[[str], object]:
        return normal_answer

    def splits(self) -> Splits:
        most = (self.examples, self.held_out)
        return _splits(self.source, self.parts, image_model(self.model), self.length, most)


@value
class VqaV2(HubQuestions):
    """VQAv2: questions about photographs, answered in one or a few words.

    Args:
        model: the architecture.
        batch: number of questions per batch.
        length: number of tokens per question with its answer. Longer examples are left out of every split.
        generated: the largest number of generated tokens.
        source: the data set.
        examples: the largest number of questions in the training split, chosen at random; None: all.
        held_out: the largest number of questions in the validation split and in the test split; None: all. The
            validation split has at most a tenth of the official training split.
    Raises:
        BadInput: `examples` or `held_out` is less than 1.
    Source: Goyal et al. 2017 (arXiv 1612.00837).
    """

    model: Architecture = MODELS["smollm2-lora"]
    batch: int = 6
    length: int = 32
    generated: int = 8
    source: str = "HuggingFaceM4/VQAv2"
    examples: int | None = 10_000
    held_out: int | None = 1_000
    models: ClassVar[dict[str, Architecture]] = MODELS
    parts: ClassVar[Parts] = Parts("validation", group="image_id")


@value
class TextVqa(HubQuestions):
    """TextVQA: questions about text in photographs.

    Args:
        model: the architecture.
        batch: number of questions per batch.
        length: number of tokens per question with its answer. Longer examples are left out of every split.
        generated: the largest number of generated tokens.
        source: the data set.
        examples: the largest number of questions in the training split, chosen at random; None: all.
        held_out: the largest number of questions in the validation split and in the test split; None: all. The
            validation split has at most a tenth of the official training split.
    Raises:
        BadInput: `examples` or `held_out` is less than 1.
    Source: Singh et al. 2019 (arXiv 1904.08920).
    """

    model: Architecture = MODELS["smollm2-lora"]
    batch: int = 8
    length: int = 32
    generated: int = 8
    source: str = "facebook/textvqa"
    examples: int | None = 10_000
    held_out: int | None = 1_000
    models: ClassVar[dict[str, Architecture]] = MODELS
    parts: ClassVar[Parts] = Parts("validation", group="image_id")


@lru_cache(maxsize=2)
def _splits(
    source: str, parts: Parts, model: ImageLanguage, length: int, most: tuple[int | None, int | None]
) -> Splits:
    questions = [list(_questions(part, model.side)) for part in rows(source, parts, *most)]
    found = Splits(*(encoded(part, model, length) for part in questions))
    note_left_out("Questions", found, [len(part) for part in questions], length)
    return found


def _questions(part: Iterable[Row], side: int) -> Iterator[Question]:
    for row in part:
        if (gold := _gold(row["answers"])) is not None:
            yield Question(_square(row["image"], side), row["question"], gold)


def _gold(answers: Any) -> str | None:
    """Return the most frequent normalised answer, the first of equals; None if there is none.

    Args:
        answers: a list of texts or of mappings with a text, or a mapping with a list of texts.
    """
    if isinstance(answers, Mapping):
        answers = answers["answer"]
    texts = (each["answer"] if isinstance(each, Mapping) else each for each in answers)
    found = Counter(normal for text in texts if (normal := normal_answer(text)) is not None)
    return found.most_common(1)[0][0] if found else None


def _square(image: Any, side: int) -> Tensor:
    """Return an image as integers from 0 to 255, shape (3, side, side). It is stretched to a square."""
    image = image.convert("RGB") if hasattr(image, "convert") else image
    pixels = torch.from_numpy(np.asarray(image, dtype=np.uint8).copy()).permute(2, 0, 1)[None].float()
    resized = F.interpolate(pixels, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
    return resized[0].round().to(torch.uint8)
