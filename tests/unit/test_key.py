"""Keys: the one source of randomness folds to the same seeds everywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradcost.core.errors import BadInput
from gradcost.core.key import Key

seeds = st.integers(0, 2**64 - 1)
names = st.text(max_size=8)
indices = st.integers(-(2**70), 2**70)


def test_folds_are_pinned():
    """Written down once: a change here is a change of every run that was ever made."""
    assert Key(0).fold("step", 3) == Key(1360816722685172430)
    assert Key(0).fold("step", 3).fold("probe", 1) == Key(13677437759248882136)
    assert Key(2**64 - 1).fold("") == Key(12580193264808376534)


@given(seed=seeds, name=names, index=indices)
def test_the_same_fold_is_the_same_key_and_a_valid_one(seed: int, name: str, index: int):
    folded = Key(seed).fold(name, index)
    assert folded == Key(seed).fold(name, index)
    assert 0 <= folded.seed < 2**64
    assert folded != Key(seed)


@given(seed=seeds, name=names, index=indices, other_seed=seeds, other_name=names, other=indices)
def test_another_fold_is_another_key(seed: int, name: str, index: int, other_seed: int, other_name: str, other: int):
    same = (seed, name, index) == (other_seed, other_name, other)
    assert (Key(seed).fold(name, index) == Key(other_seed).fold(other_name, other)) == same


def test_a_whole_number_of_any_type_is_that_number_and_no_other_is_taken():
    """Before, 3.0 was silently another key than 3."""
    for index in (np.int64(3), np.uint8(3), torch.tensor(3)):
        assert Key(0).fold("step", index) == Key(0).fold("step", 3)  # type: ignore[arg-type]
    for index in (3.0, np.float32(3), "3"):
        with pytest.raises(BadInput, match="the index of a key is a whole number"):
            Key(0).fold("step", index)  # type: ignore[arg-type]


def test_the_order_of_folds_matters():
    assert Key(1).fold("a").fold("b") != Key(1).fold("b").fold("a")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([("a", 1), ("b", 2)], [("a", 12)]),
        ([("a/1", 2)], [("a", 12)]),
        ([("a/1", 2)], [("a", 1), ("", 2)]),
        ([("a/0", 0)], [("a", 0)]),
    ],
)
def test_names_and_numbers_do_not_run_into_each_other(one: list[tuple[str, int]], other: list[tuple[str, int]]):
    keys = []
    for folds in (one, other):
        key = Key(0)
        for name, index in folds:
            key = key.fold(name, index)
        keys.append(key)
    assert keys[0] != keys[1]


def test_seed_zero_is_a_seed_like_any_other():
    folded = {Key(seed).fold("step") for seed in range(1000)}
    assert len(folded) == 1000


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "1", None, np.float64(3)], ids=repr)
def test_a_seed_that_does_not_fit_is_refused_with_the_range(seed: object):
    with pytest.raises(ValueError, match=r"whole number( from 0 to 2\*\*64 - 1)?, not "):
        Key(seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_both_ends_of_the_range_are_seeds(seed: int):
    assert Key(seed).seed == seed
