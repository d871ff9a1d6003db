"""A task from the user's own model, loss and loaders: any pytree as a batch, any metric, no classes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gradcost.core.batching.batches import Batches
from gradcost.core.errors import BadInput
from gradcost.core.evaluation.user_modules import Global, find_global
from gradcost.core.isolation import eval_mode, seeded_generators
from gradcost.core.key import Key
from gradcost.core.metric import Metric
from gradcost.core.objective import Objective
from gradcost.core.pytree import batch_size, tree_map
from gradcost.core.value import value
from gradcost.tasks import contract
from gradcost.tasks.content import stamp
from gradcost.tasks.metrics import NAMED, Measure, default_loss

PARTS = contract.PARTS
_losses: WeakKeyDictionary[nn.Module, Callable[[nn.Module, Any], Any]] = WeakKeyDictionary()  # of each made model


@value
class Loader:
    """A loader of the user, found again in each worker process.

    Args:
        source: a global: the loader, a function that returns it, or a function that returns a dictionary of loaders.
            A loader that is no global is stored itself, and pickled.
        part: the key in the dictionary that `source` returns; "" if it returns the loader.
        batch: the batch size with which `source` is called. None: it is called without arguments.
        stamp: a hash of a sample of the data. Every process checks it.
    """

    source: Any
    part: str
    batch: int | None
    stamp: str

    def __repr__(self) -> str:
        name = repr(self.source) if isinstance(self.source, Global) else type(self.source).__name__
        sized = name if self.batch is None else f"{name}({self.batch})"
        return f"{sized}{f'[{self.part}]' if self.part else ''}#{self.stamp}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Loader) and repr(self) == repr(other)

    def open(self) -> Iterable[Any]:
        """Return the user's loader. It is made once per process.

        Raises:
            BadInput: the data are not those of the process that made this value.
        """
        return _checked(self, _Same(_resolved(self.source, self.part, self.batch)))

    def batches(self) -> Batches:
        """Return the batches of the loader by the number of the step. There is one such object per loader."""
        return _batches(_Same(self.open()))


class _Same:
    """A key of a cache that is equal for the same object only. Loaders with equal stamps may have other batches."""

    def __init__(self, of: Any) -> None:
        self.of = of

    def __hash__(self) -> int:
        return id(self.of)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.of is other.of


@lru_cache(maxsize=16)
def _checked(loader: Loader, opened: _Same) -> Iterable[Any]:
    if stamp(opened.of) != loader.stamp:
        raise BadInput(
            f"{loader} has other data in this process: data that are drawn or shuffled need a fixed seed, such as "
            "torch.Generator().manual_seed(0)."
        )
    return opened.of


@lru_cache(maxsize=16)
def _batches(opened: _Same) -> Batches:
    return Batches(opened.of)


def _resolved(source: Any, part: str, batch: int | None) -> Any:
    if not isinstance(source, Global):
        return source
    made = source.get()
    if inspect.isroutine(made):
        made = _called(made, source.label, batch)
    return made[part] if part else made


@lru_cache(maxsize=16)
def _called(function: Callable[..., Any], label: str, batch: int | None) -> Any:
    """Return what the user's function returns: it is called once per process, with equally seeded generators."""
    with seeded_generators(Key(0).fold("loaders")), contract.naming(label, "make the loaders"):
        return function(*(() if batch is None else (batch,)))


class LoaderSplits(NamedTuple):
    """The three loaders of a task."""

    train: Iterable[Any]
    validation: Iterable[Any]
    test: Iterable[Any]


@value
class LoaderTask:
    """A task of the user's own model, loss and loaders. `from_loaders` makes it.

    Args:
        make_model: the global that makes a model, or a model and its loss.
        loss: the global that is the loss. None: what `make_model` returns, or `default_loss`.
        train: the batches to train on.
        validation: the batches on which learning rates are chosen.
        test: the batches for the final score, which is computed once.
        metric: the name and direction of the metric.
        measure: the global that computes the metric. None: the metric of that name.
    """

    make_model: Global
    loss: Global | None
    train: Loader
    validation: Loader
    test: Loader
    metric: Metric
    measure: Global | None = None
    steps: ClassVar[int] = 1000

    @property
    def name(self) -> str:
        """The name of the task in reports: that of the file of `make_model`."""
        return self.make_model.label.partition(":")[0].rpartition(".")[2]

    @property
    def model(self) -> Global:
        """What reports print as the model."""
        return self.make_model

    @property
    def batch(self) -> int | None:
        """The number of examples in the first training batch; None if a batch does not say it."""
        try:
            return batch_size(self.train.batches().at(Key(0), 0))
        except BadInput:
            return None

    def objective(self, key: Key) -> Objective:
        """Return a newly made model with its loss.

        Args:
            key: seeds the default generators while the model is made. Equal keys give equal weights.
        """
        with seeded_generators(key.fold("init")), contract.naming(self.make_model.label, "make a model"):
            made = self.make_model.get()()
        model, loss = contract.model_and_loss(made, self.make_model.label)
        chosen = (loss if self.loss is None else self.loss.get()) or default_loss
        _losses[model] = chosen
        return Objective(model, chosen, data=self.once_through)

    def once_through(self) -> Iterator[Any]:
        """Return the training batches once, in an order that is the same in every pass."""
        return self.train.batches().once(Key(0).fold("once"))

    def batch_at(self, key: Key, step: int) -> Any:
        """Return the training batch of one step. It depends only on `key` and `step`.

        Args:
            key: the source of the order of the data, in a loader that shuffles.
            step: the number of the step, from 0.
        """
        return self.train.batches().at(key, step)

    def splits(self) -> LoaderSplits:
        """Return the loaders. They are made once per process and shared."""
        return LoaderSplits(self.train.open(), self.validation.open(), self.test.open())

    def score(self, model: nn.Module, split: Iterable[Any]) -> dict[str, float]:
        """Return the mean loss and the metric over the batches of a loader, in evaluation mode.

        Each mean is over the examples: a batch counts by its number of examples, or as one if it does not say it.
        If a target is -100, the mean loss is over the targets that are not -100, and a batch that has none is left
        out (`Measure`). Batches are moved to the device of the model's parameters.

        Args:
            model: the model of `objective`.
            split: one of the three `splits()`, or a list of batches.
        Returns:
            {"loss": ..., metric: ...}
        Raises:
            BadInput: the split has no batch, or all its targets are -100.
        """
        loss = _losses.get(model) or self.objective(Key(0)).loss
        measure = Measure(self.metric.name, None if self.measure is None else self.measure.get(), loss)
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        with eval_mode(model), torch.no_grad(), seeded_generators(Key(0).fold("score")):
            for batch in split:
                measure.add(
                    model, tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)
                )
        return measure.result()

    def check(self) -> None:
        """Compute the loss and the metric on one batch of each loader.

        Raises:
            BadInput: the loss or the metric cannot be computed; the message names it.
        """
        objective = self.objective(Key(0))
        contract.check_model(objective.model, self.make_model.label)
        for name, loader in zip(PARTS, (self.train, self.validation, self.test), strict=True):
            batch = loader.batches().at(Key(0), 0)
            contract.check_loss(objective, batch, name, hint=objective.loss is default_loss)
            with contract.naming(f"the metric {self.metric.name}", f"be computed on a {name} batch"):
                self.score(objective.model, [batch])


def from_loaders(
    make_model: Callable[[], Any],
    loss: Callable[[nn.Module, Any], Any] | None = None,
    *,
    train: Any = None,
    validation: Any = None,
    test: Any = None,
    metric: str | Callable[[nn.Module, Any], Any] = "loss",
    lower_is_better: bool | None = None,
    loaders: Callable[..., Any] | None = None,
    batch: int | None = None,
) -> LoaderTask:
    """Return a task for `compare` from one's own model, loss and loaders.

    Worker processes import the file of the caller and find each argument again by its name. So functions and loaders
    are defined at the top level of a file. A loader that is not is sent to the workers as a copy.

    Args:
        make_model: called without arguments for each run; returns a new model, or (model, loss).
        loss: loss(model, batch) returns a scalar tensor. None: the loss that `make_model` returns; without one,
            `model(**batch).loss` for a batch that is a dictionary, and cross-entropy for a batch (x, y) with classes.
        train: the training batches: a DataLoader, a list of batches, or a function that returns one of them.
        validation: the batches on which learning rates are chosen.
        test: the batches for the final score.
        metric: what ranks the runs: "loss", "perplexity" (exp of the loss), "accuracy" (for batches (x, y), or
            dictionaries with "labels" and a model that returns `logits`), or a function metric(model, batch) that
            returns the mean over the examples of a batch.
        lower_is_better: whether smaller values of `metric` are better. Needed for a function.
        loaders: instead of the three loaders, a function that returns {"train": ..., "validation": ..., "test": ...}.
        batch: the batch size with which `loaders` is called. None: its own default.
    Returns:
        A task, for `compare`, `plan` and `Trial`.
    Raises:
        BadInput: an argument is wrong; the message names it and says what to give.
    """
    with_loss = None if loss is None else _global(contract.check_function(loss, "loss", "loss(model, batch)"), "loss")
    make = _global(contract.check_make(make_model), "make_model")
    if loaders is not None:
        if any(part is not None for part in (train, validation, test)):
            raise BadInput("give either train, validation and test, or loaders, which returns the three.")
        opened = _from_function(loaders, batch)
    else:
        given = dict(zip(PARTS, (train, validation, test), strict=True))
        contract.check_parts(given, "from_loaders")
        opened = {part: _loader(_source(given[part], part), "", None, part) for part in PARTS}
    contract.check_different({part: loader.open() for part, loader in opened.items()})
    chosen, measure = _metric(metric, lower_is_better)
    return LoaderTask(make, with_loss, **opened, metric=chosen, measure=measure)


def _from_function(loaders: Callable[..., Any], batch: int | None) -> dict[str, Loader]:
    contract.check_function(loaders, "loaders", "loaders() or loaders(batch_size)")
    source = _global(loaders, "loaders")
    size = contract.batch_argument(loaders, source.label, batch)
    made = _called(loaders, source.label, size)
    contract.check_parts(made, source.label)
    return {part: _loader(source, part, size, f"{source.label}: {part}") for part in PARTS}


def _source(given: Any, part: str) -> Any:
    """The global that a loader, or a function that returns one, is; otherwise the loader itself."""
    if inspect.isroutine(given):
        return _global(given, part)
    return find_global(given) or given


def _loader(source: Any, part: str, batch: int | None, name: str) -> Loader:
    opened = _resolved(source, part, batch)
    contract.check_loader(opened, name)
    return Loader(source, part, batch, stamp(opened))


def _global(thing: Any, name: str) -> Global:
    found = find_global(thing)
    if found is None:
        raise BadInput(
            f"{name} is {thing!r}, which worker processes cannot find: define it at the top level of a .py file, "
            "under a name of its own."
        )
    return found


def _metric(metric: Any, lower_is_better: bool | None) -> tuple[Metric, Global | None]:
    if isinstance(metric, str):
        if metric not in NAMED:
            raise BadInput(
                f"there is no metric {metric!r}: give one of {', '.join(NAMED)}, or a function metric(model, batch)."
            )
        if lower_is_better not in (None, NAMED[metric]):
            raise BadInput(f"the direction of {metric} is known: leave lower_is_better out.")
        return Metric(metric, NAMED[metric]), None
    contract.check_function(metric, "metric", "metric(model, batch)")
    if lower_is_better is None:
        raise BadInput(
            "say whether smaller values of the metric are better: lower_is_better=True or False; on the command line "
            "--lower-is-better or --higher-is-better."
        )
    found = _global(metric, "metric")
    name = found.name.rpartition(".")[2].replace("_", " ")
    if name in NAMED:
        raise BadInput(f"the function {found.name} has the name of a known metric: give it another name.")
    return Metric(name, lower_is_better), found
