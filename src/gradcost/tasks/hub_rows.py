"""Rows of data sets of the Hugging Face hub, loaded by the library `datasets`. Rows are decoded one at a time.

This module needs the extra `gradcost[hub]`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from gradcost.core.errors import brief, require
from gradcost.core.key import Key
from gradcost.tasks.sources import DataError
from gradcost.tasks.task import permutation

Row = Mapping[str, Any]
MOST_HELD_OUT = 1000


class Parts(NamedTuple):
    """The names of the splits of a data set on the hub, and the configuration that has them.

    Args:
        test: the split for the final score.
        train: the split for training.
        validation: the split on which learning rates are chosen. None: a part of the training split.
        name: the configuration; None if the data set has only one.
        group: the column of which rows of the training split have equal values if they belong together, such as
            questions about one paragraph. They are never both in the training and in the validation split.
            None: no rows belong together.
    """

    test: str
    train: str = "train"
    validation: str | None = None
    name: str | None = None
    group: str | None = None


@lru_cache(maxsize=4)
def rows(
    source: str, parts: Parts, examples: int | None = None, held_out: int | None = None
) -> tuple[Iterable[Row], Iterable[Row], Iterable[Row]]:
    """Return the rows of the splits (train, validation, test), which are decoded when they are iterated over.

    Args:
        source: the name on the hub, or a folder.
        parts: the splits of the data set.
        examples: the largest number of rows of the training split, chosen at random; None: all.
        held_out: the largest number of rows of the validation split and of the test split; None: all, and 1,000 of
            a validation split that is part of the training split. Such a split has a tenth of the rows at most.
    Raises:
        DataError: the data set cannot be loaded, or lacks a split or a column.
        MissingExtra: `datasets` is not installed.
    """
    loaded = _loaded(source, parts)
    train, test = loaded[parts.train], loaded[parts.test]
    if parts.validation is None:
        most = min(MOST_HELD_OUT if held_out is None else held_out, len(train) // 10)
        trained, others = divided(_groups(source, train, parts), most)
        if not (trained and others):
            raise DataError(f"the split {parts.train!r} of {source!r} has too few rows for a validation split.")
        train, validation = train.select(trained), train.select(others)
    else:
        validation = loaded[parts.validation]
    return _some(train, examples), _some(validation, held_out), _some(test, held_out)


def divided(groups: Sequence[Hashable], held_out: int) -> tuple[list[int], list[int]]:
    """Divide rows by a fixed permutation of their groups. Rows of one group are not in both parts.

    Args:
        groups: the group of each row. A row without one, None, is a group of its own.
        held_out: number of rows in the second part. The other rows of its last group are in neither part.
    Returns:
        (places of the first part, places of the second part).
    """
    members: dict[Hashable, list[int]] = {}
    for place, group in enumerate(groups):
        members.setdefault((place,) if group is None else group, []).append(place)
    together = list(members.values())
    order = [together[number] for number in permutation(Key(0).fold("held out"), len(together)).tolist()]
    count, found = 0, 0
    while found < held_out:
        found += len(order[count])
        count += 1
    first, second = ([place for group in part for place in group] for part in (order[count:], order[:count]))
    return first, second[:held_out]


def _groups(source: str, train: Any, parts: Parts) -> Sequence[Hashable]:
    if parts.group is None:
        return range(len(train))
    if parts.group not in train.column_names:
        raise DataError(
            f"the split {parts.train!r} of {source!r} has no column {parts.group!r}, whose equal values mark rows "
            "that must not be in two splits."
        )
    return list(train[parts.group])


def _some(part: Any, count: int | None) -> Any:
    """Return `count` rows by a fixed permutation, in their order; all if there are not more."""
    if count is None or count >= len(part):
        return part
    return part.select(sorted(permutation(Key(0).fold("examples"), len(part))[:count].tolist()))


def _loaded(source: str, parts: Parts) -> Any:
    library = require("datasets", f"The data set {source}", "hub")
    paths = sorted(Path(source).glob("*.jsonl"))
    files = {path.stem: str(path) for path in paths}
    if Path(source).is_dir() and not files:
        raise DataError(
            f"the folder {source} holds no .jsonl file: put {parts.train}.jsonl and {parts.test}.jsonl there, or "
            "give a name on the Hugging Face hub."
        )
    empty = [path.name for path in paths if not _has_text(path)]
    if empty:
        raise DataError(f"the folder {source} has no row in {', '.join(empty)}: put one JSON object on each line.")
    try:
        where = ("json", None, None, files) if files else (source, parts.name)
        loaded = library.load_dataset(*where)
    except Exception as error:  # `datasets` raises exceptions of many types, also those of other libraries
        raise DataError(
            f"the data set {source!r} cannot be loaded: {brief(error)}. Give a name on the Hugging Face "
            f"hub (needs a network), or a folder with {parts.train}.jsonl and {parts.test}.jsonl."
        ) from error
    for part in {parts.train, parts.test, parts.validation or parts.train} - set(loaded):
        raise DataError(f"the data set {source!r} has no split {part!r}; it has {', '.join(loaded)}.")
    return loaded


def _has_text(path: Path) -> bool:
    with open(path, "rb") as file:
        return any(line.strip() for line in file)
