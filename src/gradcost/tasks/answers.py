"""Parse generated answers. A generated answer is right if the parsed answer equals the gold answer.

No answer is never right: `is_right` is False if the generated text has no answer that can be parsed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

MARK = "####"  # precedes the final number in GSM8K
# A hyphen after a letter or digit is no sign: "10-20". A decimal point can come first: ".5", not in "apples.5".
_NUMBER = re.compile(r"(?:(?<![\w%])-)?\$?(?:\d[\d,]*(?:\.\d+)?|(?<![\w.])\.\d+)")


def number_answer(text: str) -> Decimal | None:
    """Return the final number of a text: the first after the last "####", else the last of the text.

    Args:
        text: such as "15 apples ... #### 20", whose answer is 20.
    Returns:
        The number, without `$` and thousands separators; None if there is none.
    """
    marked = MARK in text
    found = _NUMBER.findall(text.rpartition(MARK)[2])
    if not found:
        return None
    try:
        return Decimal((found[0] if marked else found[-1]).replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None


def choice_answer(text: str, letters: str = "ABCD") -> str | None:
    """Return the letter that a text chooses: the text begins with it, or has it after "answer is" or "answer:".

    Args:
        text: such as "B", "(B)", "B. Paris" or "The answer is B".
        letters: the letters of the choices.
    Returns:
        The letter; None if the text chooses none. An "A" that is an article is no choice.
    """
    said = re.search(rf"\b(?i:answer(?: is|:))\s*\(?([{letters}])(?=[.):]|\s*$|\s*\n)", text)
    alone = re.match(rf"\s*\(?([{letters}])(?:[.):]|\s*$|\s*\n)", text)
    found = said or alone
    return found[1] if found else None


def yes_no_answer(text: str) -> bool | None:
    """Return True for a text whose first word is "yes", False for "no", None for other texts."""
    first = re.match(r"\W*(\w+)", text)
    return {"yes": True, "no": False}.get(first[1].lower()) if first else None


def word_answer(text: str) -> str | None:
    """Return the first word of a text in lower case, without an article before it.

    Args:
        text: such as " A cat.", whose answer is "cat". "a caterpillar" is not an answer "cat".
    Returns:
        The word; None if there is none.
    """
    words = re.findall(r"\w+", text.lower())
    if len(words) > 1 and words[0] in ("a", "an", "the"):
        words = words[1:]
    return words[0] if words else None


def normal_answer(text: str) -> str | None:
    """Return the first line of a text in lower case, without punctuation at its ends and without an article.

    Args:
        text: such as " A red bus.", whose answer is "red bus".
    Returns:
        The words, with single spaces; None if there is none.
    """
    words = text.strip().partition("\n")[0].lower().strip(" .,;:!?\"'").split()
    if len(words) > 1 and words[0] in ("a", "an", "the"):
        words = words[1:]
    return " ".join(words) or None


def is_right(generated: str, gold: str, parse: Callable[[str], object]) -> bool:
    """Return whether the answers in two texts are equal.

    Args:
        generated: the generated text.
        gold: the text with the right answer.
        parse: returns the answer in a text, or None, such as `number_answer`.
    Raises:
        ValueError: the gold text has no answer.
    """
    right = parse(gold)
    if right is None:
        raise ValueError(f"the gold text has no answer: {gold!r}.")
    return parse(generated) == right
