"""Questions about images of the Hugging Face hub: VQAv2 and TextVQA.

`source` is the name on the hub, or a folder with files of the same columns, such as `train.jsonl`, whose images are
nested lists of integers (rows, columns, 3). Answers are compared as words; a question of the data set has the answers
of ten people, and the most frequent one is the gold answer.

This module needs the extras `gradcost[hub,transformers]`; images of the hub also need pillow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gradcost.core.value import value
from gradcost.tasks.answers import normal_answer
from gradcost.tasks.architectures import Architecture
from gradcost.tasks.hub import Parts, Row, rows
from gradcost.tasks.task import Splits
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
    parts: ClassVar[Parts]

    @property
    def parse(self) -> Callable[[str], object]:
        return normal_answer

    def splits(self) -> Splits:
        return _splits(self.source, self.parts, image_model(self.model), self.length)


@value
class VqaV2(HubQuestions):
    """VQAv2: questions about photographs, answered in one or a few words.

    Args:
        model: the architecture.
        batch: number of questions per batch.
        length: number of tokens per question with its answer. Longer examples are left out of every split.
        generated: the largest number of generated tokens.
        source: the data set.
    Source: Goyal et al. 2017 (arXiv 1612.00837).
    """

    model: Architecture = MODELS["smollm2-lora"]
    batch: int = 6
    length: int = 32
    generated: int = 8
    source: str = "HuggingFaceM4/VQAv2"
    models: ClassVar[dict[str, Architecture]] = MODELS
    parts: ClassVar[Parts] = Parts("validation")


@value
class TextVqa(HubQuestions):
    """TextVQA: questions about text in photographs.

    Args:
        model: the architecture.
        batch: number of questions per batch.
        length: number of tokens per question with its answer. Longer examples are left out of every split.
        generated: the largest number of generated tokens.
        source: the data set.
    Source: Singh et al. 2019 (arXiv 1904.08920).
    """

    model: Architecture = MODELS["smollm2-lora"]
    batch: int = 8
    length: int = 32
    generated: int = 8
    source: str = "facebook/textvqa"
    models: ClassVar[dict[str, Architecture]] = MODELS
    parts: ClassVar[Parts] = Parts("validation")


@lru_cache(maxsize=2)
def _splits(source: str, parts: Parts, model: ImageLanguage, length: int) -> Splits:
    return Splits(
        *(encoded((_question(row, model.side) for row in part), model, length) for part in rows(source, parts))
    )


def _question(row: Row, side: int) -> Question:
    return Question(_square(row["image"], side), row["question"], _gold(row["answers"]))


def _gold(answers: list[Any]) -> str:
    """Return the most frequent answer, the first of equals. An answer is a text, or a mapping with its text."""
    texts = [each["answer"] if isinstance(each, dict) else each for each in answers]
    return Counter(texts).most_common(1)[0][0]


def _square(image: Any, side: int) -> Tensor:
    """Return an image as integers from 0 to 255, shape (3, side, side). It is stretched to a square."""
    image = image.convert("RGB") if hasattr(image, "convert") else image
    pixels = torch.from_numpy(np.asarray(image, dtype=np.uint8).copy()).permute(2, 0, 1)[None].float()
    resized = F.interpolate(pixels, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
    return resized[0].round().to(torch.uint8)
