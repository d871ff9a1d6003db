"""Schedules: the laws against a machine that executes them, the frontier against all schedules."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import chain, islice, pairwise, product
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradcost.checkpointing.optimal import cheapest, frontier
from gradcost.checkpointing.schedule_cost import Epilogue, Point, Stage, peak, recomputed
from gradcost.checkpointing.schedules import Items

Chain = tuple[list[Stage], Epilogue]


def physical(count: int, seed: int) -> Chain:
    """A realistic unequal chain: each peak is at least what remains allocated after it."""
    draw = random.Random(seed).randrange
    stages, given = [], draw(1, 90)
    for _ in range(count):
        out, saved, flops = draw(1, 90), draw(120), draw(1, 50)
        gradients = given + out
        dropped, recorded, backward = out + draw(150), out + saved + draw(100), gradients + draw(150)
        stages.append(Stage(out, saved, dropped, recorded, backward, flops, flops - draw(flops)))
        given = out
    saved = draw(150)
    return stages, Epilogue(saved + draw(90), saved, given + draw(90))


def arbitrary(count: int, seed: int) -> Chain:
    """Arbitrary numbers: the laws and the search assume nothing about them."""
    draw = random.Random(seed).randrange
    stages = []
    for _ in range(count):
        flops = draw(1, 40)
        stages.append(Stage(draw(30), draw(30), draw(30), draw(30), draw(30), flops, draw(1, flops + 1)))
    return stages, Epilogue(draw(30), draw(30), draw(30))


def divisible(count: int, seed: int) -> Chain:
    """As `arbitrary`, with blocks that may also run again in 2 or 3 parts, or be recorded selectively."""
    draw = random.Random(seed + 1).randrange
    stages, epilogue = arbitrary(count, seed)
    parts = [tuple((draw(30), draw(40)) for _ in range(draw(3))) for _ in stages]
    kept = [(draw(30), draw(30), draw(30), draw(3)) if draw(3) else None for _ in stages]
    triples = zip(stages, parts, kept, strict=True)
    return [replace(stage, parts=some, selective=figures) for stage, some, figures in triples], epilogue


def in_parts(items: Items, stages: list[Stage], is_region: bool = False) -> Iterator[Items]:
    """Yield a schedule with each choice of parts for the last blocks of its regions, and of selective blocks."""
    start, choices = 0, []
    for number, item in enumerate(items):
        part = stages[start : (start := start + blocks(item))]
        choices.append([(item,)] if isinstance(item, int) else [(i,) for i in in_parts(item, part, True)])
        if not is_region and isinstance(item, int) and all(stage.selective for stage in part):
            choices[-1].append((-item,))
        if is_region and isinstance(item, int) and number == len(items) - 1:
            before = (item - 1,) if item > 1 else ()
            choices[-1] += [(*before, *(0,) * count, 1) for count in range(1, 1 + len(part[-1].parts))]
    return (tuple(chain.from_iterable(chosen)) for chosen in product(*choices))


# ---- an oracle that executes


class Machine:
    """Runs a schedule one operation at a time over a set of live buffers, without using M."""

    def __init__(self, stages: list[Stage], epilogue: Epilogue) -> None:
        self.stages, self.epilogue = [*stages], epilogue
        self.live: dict[tuple[str, int], int] = {("y", -1): 0}  # the chain's input is the caller's
        self.most = self.flops = 0
        self.done: list[int] = []

    def execute(self, items: Items) -> tuple[int, int]:
        """Peak bytes, and FLOPs beyond those of one forward."""
        last = len(self.stages) - 1
        pending = self.forward(items, 0, -1)
        self.needs(self.epilogue.recorded, ("y", last))
        self.live["saved", last + 1] = self.epilogue.saved
        self.needs(self.epilogue.backward, ("saved", last + 1))
        del self.live["saved", last + 1]
        self.pass_gradient_to(last)
        self.backward(pending)
        assert self.done == list(range(last, -1, -1))
        assert set(self.live) == {("gradient", -1)}
        return self.most, self.flops - sum(stage.flops for stage in self.stages)

    def forward(self, items: Items, block: int, stop: int) -> list[tuple[int, Items | int | None]]:
        """Run items from a block on, ending early in block `stop`. Return the work of their backward, last first."""
        pending: list[tuple[int, Items | int | None]] = []
        parts = 1 + items.count(0)
        for item in items:
            if isinstance(item, int) and item < 0:
                for at in range(block, block - item):
                    self.select(at)
                    pending.insert(0, (at, None))
                block -= item
            elif isinstance(item, int):
                for at in range(block, block + item):
                    if at == stop and parts > 1:
                        pending.insert(0, (at, parts))
                        continue
                    self.record(at, early=at == stop)
                    pending.insert(0, (at, None))
                block += item
            else:
                end = block + blocks(item)
                if end - 1 != stop:
                    for at in range(block, end):
                        self.drop(at, first=at == block)
                pending.insert(0, (block, item))
                block = end
        return pending

    def backward(self, pending: list[tuple[int, Items | int | None]]) -> None:
        for at, inner in pending:
            if inner is None or isinstance(inner, int):
                self.backward_of(at, inner)
            else:
                assert ("gradient", at + blocks(inner) - 1) in self.live
                self.backward(self.forward(inner, at, at + blocks(inner) - 1))

    def record(self, at: int, early: bool) -> None:
        stage = self.stages[at]
        self.needs(stage.recorded, ("y", at - 1))
        self.live["saved", at] = stage.saved
        if not early:
            self.live["y", at] = stage.output
        self.flops += stage.stopped if early else stage.flops

    def select(self, at: int) -> None:
        """Record a block selectively: from here on it has other figures."""
        figures = self.stages[at].selective
        assert figures is not None
        saved, recorded, backward, again = figures
        self.stages[at] = replace(self.stages[at], saved=saved, recorded=recorded, backward=backward)
        self.record(at, early=False)
        self.flops += again

    def drop(self, at: int, first: bool) -> None:
        self.needs(self.stages[at].dropped, ("y", at - 1))
        self.live["y", at] = self.stages[at].output
        if not first:
            del self.live["y", at - 1]
        self.flops += self.stages[at].flops

    def backward_of(self, at: int, parts: int | None) -> None:
        del self.live["gradient", at]  # counted in the peak of the backward
        assert ("y", at) not in self.live
        if parts is None:
            self.needs(self.stages[at].backward, ("saved", at))
            del self.live["saved", at]
        else:
            most, flops = self.stages[at].parts[parts - 2]
            self.needs(most, ("y", at - 1))
            self.flops += flops
        assert ("y", at - 1) in self.live
        self.pass_gradient_to(at - 1)
        self.done.append(at)

    def pass_gradient_to(self, at: int) -> None:
        """Block `at + 1` is done: replace the output of block `at` by its gradient."""
        del self.live["y", at]
        self.live["gradient", at] = self.stages[at].output if at >= 0 else 0

    def needs(self, transient: int, buffer: tuple[str, int]) -> None:
        assert buffer in self.live
        self.most = max(self.most, sum(self.live.values()) + transient)


def blocks(item: int | Items) -> int:
    return abs(item) if isinstance(item, int) else sum(blocks(inner) for inner in item)


def executed(items: Items, chain: Chain) -> tuple[int, int]:
    return Machine(*chain).execute(items)


def computed(items: Items, chain: Chain) -> tuple[int, int]:
    return peak(items, *chain), recomputed(items, chain[0])


def any_items(draw: random.Random, count: int, depth: int = 5) -> Items:
    """A random nested schedule of `count` blocks, regions that end reruns and regions of regions among them."""
    items: list[int | Items] = []
    while count:
        size = draw.randint(1, count)
        count -= size
        items.append(any_items(draw, size, depth - 1) if depth and draw.random() < 0.6 else size)
    return tuple(items)


@settings(max_examples=400, deadline=None)
@given(st.integers(1, 14), st.integers(0, 2**32), st.sampled_from([physical, arbitrary, divisible]))
def test_peak_and_recomputation_are_what_an_execution_takes(count: int, seed: int, make):
    items, made = any_items(random.Random(seed), count), make(count, seed)
    for some in islice(in_parts(items, made[0]), 0, 40, 7):
        assert computed(some, made) == executed(some, made)


def test_buffers_between_operations_never_exceed_the_peak(monkeypatch: pytest.MonkeyPatch):
    """For realistic sizes the buffers between operations never exceed the peak of an operation."""

    class Watched(dict):
        def __setitem__(self, key, bytes_):
            super().__setitem__(key, bytes_)
            rest.append(sum(self.values()))

    for seed in range(200):
        rest: list[int] = []
        machine = Machine(*physical(9, seed))
        machine.live = Watched(machine.live)
        most, _ = machine.execute(any_items(random.Random(seed), 9))
        assert max(rest) <= most


def test_the_figures_of_a_schedule_by_hand():
    stages = [Stage(5, 30, 7, 36, 10, 100, 90), Stage(6, 20, 8, 27, 11, 200, 150)]
    epilogue = Epilogue(3, 2, 4)
    assert peak((2,), stages, epilogue) == (30 + 5) + (20 + 6) + (2 + 4)  # the backward of the epilogue, all kept
    assert recomputed((2,), stages) == 0
    assert peak(((1,), 1), stages, epilogue) == 5 + 36  # the first run again while its output's gradient is held
    assert recomputed(((1,), 1), stages) == 90
    assert recomputed(((2,),), stages) == 100 + 150
    assert recomputed((((1,), 1),), stages) == 100 + 150 + 90


# ---- all schedules


def sequences(count: int) -> tuple[Items, ...]:
    """Every nested tuple over `count` blocks; blocks recorded one by one, as (1, 1) is the same as (2,)."""
    return reruns(count) + tuple((inner,) for inner in reruns(count)) if count else ((),)


@cache
def reruns(count: int) -> tuple[Items, ...]:
    """All but those that are one region: its rerun would be itself, without end."""
    recorded: list[Items] = [(1, *rest) for rest in sequences(count - 1)]
    regions = (product(reruns(size), sequences(count - size)) for size in range(1, count))
    return (*recorded, *((inner, *rest) for pairs in regions for inner, rest in pairs))


def staircase(figures: set[tuple[int, int]]) -> list[tuple[int, int]]:
    """The Pareto-optimal (peak, flops), by the definition."""
    steps: list[tuple[int, int]] = []
    for most, flops in sorted(figures):
        if not steps or flops < steps[-1][1]:
            steps.append((most, flops))
    return steps


@pytest.mark.parametrize(("count", "seed", "make"), [
    *product(range(1, 5), range(6), [physical, arbitrary]), (5, 0, physical), (5, 1, arbitrary), (6, 2, physical)
])  # fmt: skip
def test_no_nested_tuple_beats_the_frontier(count: int, seed: int, make):
    """All are executed, including regions at the end of reruns."""
    chain = make(count, seed)
    every = list(sequences(count))
    assert len(set(every)) == len(every) == [2, 8, 48, 352, 2880, 25216][count - 1]
    points = frontier(*chain)
    assert [point[:2] for point in points] == staircase({executed(items, chain) for items in every})
    assert all(executed(point.items, chain) == point[:2] for point in points)


@pytest.mark.parametrize(("count", "seed"), product(range(1, 5), range(8)))
def test_no_choice_of_parts_beats_the_frontier(count: int, seed: int):
    of_parts = divisible(count, seed)
    every = {some for items in sequences(count) for some in in_parts(items, of_parts[0])}
    points = frontier(*of_parts)
    fewest = {flops: most for most, flops in sorted((point[:2] for point in points), reverse=True)}  # of equal FLOPs
    assert [(most, flops) for flops, most in fewest.items()][::-1] == staircase(
        {executed(items, of_parts) for items in every}
    )
    assert all(executed(point.items, of_parts) == point[:2] for point in points)


class Census:
    """(peak, flops) of every schedule of a chain in which each rerun ends in a recorded block.

    No dominated schedule is dropped: a rerun of n blocks has as many as the n-th large Schröder number.
    """

    def __init__(self, stages: list[Stage], epilogue: Epilogue) -> None:
        self.stages, self.epilogue = [*stages], epilogue
        self.reruns = {}
        for size in range(1, len(stages) + 1):
            for start in range(len(stages) - size + 1):
                self.reruns[start, start + size] = self.rerun(start, start + size)

    def rerun(self, start: int, end: int) -> np.ndarray:
        last = self.stages[end - 1]
        if end - start == 1:
            return np.array([[max(last.output + last.recorded, last.saved + last.backward)], [last.stopped]])
        rests = {cut: self.reruns[cut, end] for cut in range(start + 1, end)}
        return np.concatenate([*self.starting(start, last.output, 1, rests)], axis=1)

    def schedules(self) -> Iterator[np.ndarray]:
        """All schedules of the chain, in pieces that end with the last choice of the first item."""
        end = len(self.stages)
        leaf = max(self.epilogue.recorded, self.epilogue.saved + self.epilogue.backward)
        rests = {end: np.array([[leaf], [0]])}
        for start in range(end - 1, 0, -1):
            rests[start] = np.concatenate([*self.starting(start, 0, 0, rests)], axis=1)
        yield from self.starting(0, 0, 0, rests)

    def starting(self, start: int, held: int, price: int, rests: dict[int, np.ndarray]) -> Iterator[np.ndarray]:
        first = self.stages[start]
        most, flops = rests[start + 1]
        alone = max(held + first.recorded, first.saved + first.backward)
        yield np.stack([np.maximum(alone, first.saved + first.output + most), price * first.flops + flops])
        for cut in sorted(cut for cut in rests if cut > start):
            run = self.stages[start:cut]
            inputs = [0, *(stage.output for stage in run[:-1])]
            running = held + max(stage.dropped + given for stage, given in zip(run, inputs, strict=True))
            inner = self.reruns[start, cut][:, :, None]
            rest = rests[cut][:, None, :]
            most = np.maximum(np.maximum(inner[0], run[-1].output + rest[0]), running)
            yield np.stack([most, inner[1] + rest[1] + price * sum(stage.flops for stage in run)]).reshape(2, -1)


def schedules_compared_with(points: list[Point], chain: Chain) -> int:
    """Compare the frontier with every schedule; the number of those."""
    peaks, flops = (np.array(numbers) for numbers in list(zip(*points, strict=True))[:2])
    reached = np.full(len(points), np.iinfo(np.int64).max)
    count = 0
    for most, cost in Census(*chain).schedules():
        step = np.searchsorted(peaks, most, side="right") - 1
        assert step.min() >= 0, "a schedule takes less than the least peak"
        assert (cost >= flops[step]).all(), "a schedule is cheaper than the point of its budget"
        np.minimum.at(reached, step, cost)
        count += most.size
    assert (reached == flops).all(), "a point that no schedule has"
    return count


def test_the_census_equals_the_executed_schedules():
    """So the numbers of twelve blocks, which are not executed, are those of schedules."""

    def ends_recorded(items: Items, rerun: bool) -> bool:
        inner = all(ends_recorded(item, True) for item in items if not isinstance(item, int))
        return inner and (not rerun or isinstance(items[-1], int))

    chain = physical(5, 4)
    pieces = np.concatenate([*Census(*chain).schedules()], axis=1)
    expected = [executed(items, chain) for items in sequences(5) if ends_recorded(items, False)]
    assert sorted(zip(*pieces.tolist(), strict=True)) == sorted(expected)


@pytest.mark.parametrize(
    ("count", "make"), [(7, arbitrary), (8, physical), (9, arbitrary), (12, physical), (12, arbitrary)]
)
def test_the_frontier_is_the_optimum_of_all_schedules_at_every_budget(count: int, make):
    chain = make(count, count)
    points = frontier(*chain)
    assert schedules_compared_with(points, chain) == {7: 8558, 8: 41586, 9: 206098, 12: 27297738}[count]
    assert [computed(point.items, chain) for point in points] == [point[:2] for point in points]
    assert len(points) > 5


# ---- a known optimum


@pytest.mark.parametrize("count", [2, 3, 7, 12, 31])
def test_where_two_recorded_blocks_never_fit_it_is_revolve(count: int):
    """t(l, s) = r l - C(s + r, r - 1), r the least with l <= C(s + r, s): Griewank and Walther 2000.

    Their s counts states besides the one that the current step starts from, the chain's input among them. Here
    an output takes 1 byte, the chain's input none, and the block that is recorded a great many. They count the
    advances of the first sweep (l - 1) and not the recorded forward of a step; here the first sweep is free and all
    recorded forwards but the last block's are reruns (l - 1): the same number.
    """
    huge = 1000
    stage = Stage(output=1, saved=huge, dropped=1, recorded=huge + 1, backward=9, flops=1, stopped=1)
    points = frontier([stage] * count, Epilogue(0, 0, 0))
    assert points[0].peak == huge + 9 + 1
    for states in range(1, count + 2):
        r = next(r for r in range(count + 1) if count <= comb(states + r, states))
        found = cheapest(points, huge + 9 + states)
        assert found is not None
        assert found.flops == r * count - comb(states + r, r - 1)


# ---- what budgets and resolutions do


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10), st.integers(0, 2**32), st.sampled_from([physical, arbitrary]))
def test_more_budget_never_costs_more(count: int, seed: int, make):
    chain = make(count, seed)
    points = frontier(*chain)
    for before, after in pairwise(points):
        assert before.peak < after.peak
        assert before.flops > after.flops
    assert points[-1] == Point(peak=points[-1].peak, flops=0, items=(count,) if count else ())
    assert cheapest(points, 10**9) == points[-1]
    assert cheapest(points, points[0].peak) == points[0]
    assert cheapest(points, points[0].peak - 1) is None


def test_equal_blocks_are_solved_once_and_no_differently():
    """A chain of a repeated pair of blocks, against all its schedules."""
    pair = arbitrary(2, 5)[0]
    chain = pair * 5, Epilogue(1, 2, 3)
    assert schedules_compared_with(frontier(*chain), chain) == 1037718


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 10), st.integers(0, 2**32), st.integers(1, 200))
def test_a_resolution_costs_at_most_itself_a_block(count: int, seed: int, resolution: int):
    chain = physical(count, seed)
    exact, rounded = frontier(*chain), frontier(*chain, resolution=resolution)
    assert [computed(point.items, chain) for point in rounded] == [point[:2] for point in rounded]
    assert rounded[0].peak == exact[0].peak
    assert rounded[-1] == exact[-1]
    assert len(rounded) <= min(len(exact), 2 + exact[-1].peak // resolution)
    for point in exact:
        found = cheapest(rounded, point.peak + count * resolution)
        assert found is not None
        assert found.flops <= point.flops
    assert frontier(*chain, resolution=1) == exact


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(0, 2**32))
def test_items_are_read_back_in_their_shortest_form(count: int, seed: int):
    def short(items: Items) -> bool:
        numbers = [isinstance(item, int) for item in items]
        merged = not any(left and right for left, right in pairwise(numbers))
        return merged and all(
            short(item) and isinstance(item[-1], int) for item in items if not isinstance(item, int)
        )

    assert all(short(point.items) for point in frontier(*physical(count, seed)))


# ---- refusals

CHAIN = physical(3, 0)


@pytest.mark.parametrize("items", [(2,), (4,), (1, (1,)), ((2, 2),)])
def test_a_schedule_of_another_number_of_blocks_is_refused(items: Items):
    with pytest.raises(ValueError, match="blocks and the chain has 3: cover each"):
        peak(items, *CHAIN)
    with pytest.raises(ValueError, match="the chain has 3"):
        recomputed(items, CHAIN[0])


@pytest.mark.parametrize("items", [(), (0, 3), ((2, -1),), ((), 3), (((),), 3), ((0,), 3)])
def test_an_item_without_blocks_is_refused(items: Items):
    with pytest.raises(ValueError, match=r"1 or more|one item or more|zeros in a schedule"):
        peak(items, *CHAIN)


def test_parts_without_figures_are_refused():
    with pytest.raises(ValueError, match="in 3 parts are not known: use 1 or fewer"):
        peak(((0, 0, 1), 2), *CHAIN)


def test_figures_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="saved of Stage is a count of bytes or FLOPs, not -1"):
        Stage(1, -1, 1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="backward of Epilogue"):
        Epilogue(1, 1, -1)
    with pytest.raises(ValueError, match="stopped=3 is more than flops=2"):
        Stage(1, 1, 1, 1, 1, 2, 3)
    with pytest.raises(ValueError, match="1 byte or more, not 0: None is exact"):
        frontier(*CHAIN, resolution=0)
