"""Questions about emoji pictures, answered by a vision-language model in words.

This module needs the extras `gradcost[tasks,transformers]`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from gradcost.core.errors import BadInput
from gradcost.core.key import Key
from gradcost.core.value import value
from gradcost.tasks import catalogue, data
from gradcost.tasks.architectures import Architecture
from gradcost.tasks.png import read_png
from gradcost.tasks.task import Splits, permutation
from gradcost.tasks.vision_language import ImageLanguage, VisionLanguage
from gradcost.tasks.vqa import ANIMAL, SHOWN, ImageQuestions, Question, encoded, image_model

SIDE = 32  # pixels of a picture; each has a border of one more on all sides
# The answer to "What is shown?", by the beginning of the subcategory. Emojis of other subcategories are left out.
KINDS = {
    "face-": "face",
    "person": "person",
    "family": "person",
    "hand": "hand",
    "animal-": "animal",
    "plant-": "plant",
    "food-": "food",
    "transport-air": "vehicle",
    "transport-ground": "vehicle",
    "transport-water": "vehicle",
    "place-building": "building",
    "place-religious": "building",
    "country-flag": "flag",
    "flag": "flag",
    "subdivision-flag": "flag",
    "clothing": "clothes",
}


class Picture(NamedTuple):
    """An emoji.

    Args:
        image: integers from 0 to 255, shape (3, 32, 32), on white.
        kind: one of the values of `KINDS`.
    """

    image: Tensor
    kind: str


@value
class Emoji(ImageQuestions):
    """Questions about 1,138 emojis: what kind of thing is shown (ten words), and whether it is an animal (yes or no).

    Each picture of a split has the first question. All animals and as many other pictures have the second one, too.

    Args:
        model: the architecture.
        batch: number of questions per batch.
        length: number of tokens per question with its answer.
        held_out: number of pictures in the validation split and in the test split.
        generated: the largest number of generated tokens.
    Raises:
        BadInput: `held_out` is not in 20 ... 500.
    """

    model: Architecture = VisionLanguage()
    batch: int = 16
    length: int = 16
    held_out: int = 200
    generated: int = 4
    models: ClassVar[dict[str, Architecture]] = {"smollm2-lora": VisionLanguage()}
    steps: ClassVar[int] = 200

    def __post_init__(self) -> None:
        if not 20 <= self.held_out <= 500:
            raise BadInput(f"Emoji has 20 to 500 pictures held out, not {self.held_out}.")

    def splits(self) -> Splits:
        return _splits(image_model(self.model), self.length, self.held_out)


@lru_cache(maxsize=2)
def _splits(model: ImageLanguage, length: int, held_out: int) -> Splits:
    if model.side != SIDE:
        raise BadInput(f"the emojis have {SIDE} pixels per side: set side={SIDE} of {model!r}.")
    found = pictures()
    order = [found[place] for place in permutation(Key(0).fold("emoji"), len(found)).tolist()]
    parts = order[2 * held_out :], order[:held_out], order[held_out : 2 * held_out]
    return Splits(*(encoded(asked(part), model, length) for part in parts))


@lru_cache(maxsize=1)
def pictures() -> list[Picture]:
    """Return the emojis whose kind is one of `KINDS`, without skin tones, in the order of the data set.

    Of equal pictures, such as the flags of Norway and Svalbard, only the first is returned: a picture that is held
    out is not trained on.
    """
    folder = data.verified(catalogue.EMOJI)
    sheet = torch.from_numpy(read_png(folder / "32.png", "RGBA")).permute(2, 0, 1).to(torch.float32)
    colours = (sheet[:3] * sheet[3] / 255 + 255 - sheet[3]).round().to(torch.uint8)
    found: dict[bytes, Picture] = {}
    for emoji in json.loads((folder / "emoji.json").read_text("utf-8")):
        kind = next((kind for start, kind in KINDS.items() if emoji["subcategory"].startswith(start)), None)
        if kind and emoji["has_img_twitter"]:
            x, y = (place * (SIDE + 2) + 1 for place in (emoji["sheet_x"], emoji["sheet_y"]))
            image = colours[:, y : y + SIDE, x : x + SIDE].clone()
            found.setdefault(image.numpy().tobytes(), Picture(image, kind))
    return list(found.values())


def asked(part: Sequence[Picture]) -> list[Question]:
    """Return the questions about some pictures: what is shown, then whether it is an animal.

    Args:
        part: the pictures.
    """
    shown = [Question(each.image, SHOWN, each.kind) for each in part]
    animals = [each for each in part if each.kind == "animal"]
    others = [each for each in part if each.kind != "animal"][: len(animals)]
    answers = [(each.image, "yes") for each in animals] + [(each.image, "no") for each in others]
    return shown + [Question(image, ANIMAL, answer) for image, answer in answers]
