"""The states of model, optimizer and estimator after the first step of a training, without taking it."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from typing import Any

import torch

from gradcost.core.key import Key
from gradcost.training.train_state import TrainState


def after_first_step(train_state: TrainState, batch: Any, unused: Set[str]) -> TrainState:
    """Return `train_state` with the states of model, optimizer and estimator of a training that took one step.

    Args:
        train_state: a training on fake tensors, before its first step; changed in place.
        batch: the batch of the step, of fake tensors.
        unused: names of the leaves that have no gradient, and therefore no state of the optimizer.
    """
    train_state.objective.advance(batch, Key(0))
    if train_state.state is not None:
        # The size of the state does not depend on the amount of data: one batch is enough.
        first = replace(train_state.objective, data=lambda: [batch])
        train_state.state = train_state.estimator.stream(
            first, batch, Key(0), lambda *_: None, train_state.state
        ).state
    leafwise = train_state.leafwise
    if leafwise is not None:
        for leaf in train_state.objective.leaves:
            if leaf.name in unused:
                leafwise.skip(leaf.name)
            else:
                leafwise.use(leaf.name, torch.zeros_like(leaf.parameter))
        leafwise.advance()
    return train_state
