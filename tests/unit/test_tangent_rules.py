"""The forward-mode rules against PyTorch's own, for one direction and for several that share a pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]

from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key
from gradcost.slopes import tangent_rules
from gradcost.slopes.duals import apart, with_directions

Function = Callable[..., Tensor]

# Name: (function, its options, shapes of the arguments).
CASES: dict[str, tuple[Function, dict[str, Any], list[tuple[int, ...]]]] = {
    "linear": (F.linear, {}, [(2, 5, 4), (3, 4), (3,)]),
    "linear without bias": (F.linear, {}, [(5, 4), (3, 4)]),
    "linear of one vector": (F.linear, {}, [(4,), (3, 4), (3,)]),
    "linear with one output": (F.linear, {}, [(5, 4), (4,)]),
    "softmax": (F.softmax, {"dim": -1}, [(2, 3, 4)]),
    "softmax over the middle": (F.softmax, {"dim": 1}, [(2, 3, 4)]),
    "softmax in another dtype": (F.softmax, {"dim": 1, "dtype": torch.float32}, [(2, 3)]),
    "gelu": (F.gelu, {}, [(3, 4)]),
    "tanh gelu": (F.gelu, {"approximate": "tanh"}, [(3, 4)]),
    "silu": (F.silu, {"inplace": False}, [(3, 4)]),
    "group norm": (F.group_norm, {"num_groups": 2}, [(3, 4, 5)]),
}
NORMS: dict[str, list[tuple[int, ...]]] = {
    "weight and bias": [(2, 3, 4), (4,), (4,)],
    "weight": [(2, 3, 4), (4,)],
    "neither": [(2, 3, 4)],
}


def layer_norm(rule: Function) -> Function:
    return lambda x, weight=None, bias=None: rule(x, [4], weight, bias)


def along_one(function: Function, primals: list[Tensor], tangents: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Return the output and its tangent along one direction; the tangents of frozen arguments are None."""
    with torch.no_grad(), forward_ad.dual_level():
        duals = [p if t is None else forward_ad.make_dual(p, t) for p, t in zip(primals, tangents, strict=True)]
        out, tangent = forward_ad.unpack_dual(function(*duals))
        assert tangent is not None
        return out.clone(), tangent.clone()


def along_many(function: Function, primals: list[Tensor], stacks: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Return the output and its tangents along all directions, as `forward_mode.differentiate` computes them."""
    count = next(len(stack) for stack in stacks if stack is not None)
    unused = torch.zeros(())

    def of(index: Tensor) -> Any:
        level = functorch.maybe_get_level(index)

        def evaluate(_: Tensor) -> Tensor:
            return function(
                *(
                    p if stack is None else forward_ad.make_dual(p, with_directions(stack, level))
                    for p, stack in zip(primals, stacks, strict=True)
                )
            )

        return torch.func.jvp(evaluate, (unused,), (unused,))

    with torch.no_grad():
        outs, tangents = torch.func.vmap(of)(torch.arange(count))
    return outs[0], tangents


def assert_rule(rule: Function, function: Function, shapes: list[tuple[int, ...]], transposed: bool):
    """Compare along every choice of arguments that have tangents."""
    with seeded_generators(Key(1)):
        primals = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
        stacks = [torch.randn(3, *shape, dtype=torch.float64) for shape in shapes]
    if transposed:  # in another memory order
        primals = [p.mT.contiguous().mT if p.ndim > 1 else p for p in primals]
        stacks = [s.mT.contiguous().mT if s.ndim > 2 else s for s in stacks]
    for moves in itertools.product([False, True], repeat=len(shapes)):
        if not any(moves):
            continue
        chosen = [stack if move else None for stack, move in zip(stacks, moves, strict=True)]
        firsts = [[None if stack is None else stack[number] for stack in chosen] for number in range(3)]
        expected = [along_one(function, primals, each) for each in firsts]
        torch.testing.assert_close(along_one(rule, primals, firsts[0]), expected[0])
        out, tangents = along_many(rule, primals, chosen)
        torch.testing.assert_close(out, expected[0][0])
        torch.testing.assert_close(tangents, torch.stack([tangent for _, tangent in expected]))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_rule_gives_the_tangent_of_pytorch(name: str, transposed: bool):
    function, options, shapes = CASES[name]
    rule = tangent_rules.OF_DUALS[function]
    if function is F.group_norm:
        shapes = [*shapes, (4,), (4,)]

        def with_groups(of: Function) -> Function:
            return lambda x, weight, bias: of(x, options["num_groups"], weight, bias)

        if not transposed:
            assert_rule(with_groups(rule), _with_all_tangents(with_groups(function)), shapes, transposed)
        return
    assert_rule(lambda *a: rule(*a, **options), lambda *a: function(*a, **options), shapes, transposed)


def _with_all_tangents(function: Function) -> Function:
    """Return a function that gives zero tangents to the arguments that have none, as PyTorch's own rule needs."""

    def of(*arguments: Tensor) -> Tensor:
        unpacked = [forward_ad.unpack_dual(argument) for argument in arguments]
        return function(*(forward_ad.make_dual(p, torch.zeros_like(p) if t is None else t) for p, t in unpacked))

    return of


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_layer_norm_has_the_tangent_of_pytorch(name: str, transposed: bool):
    theirs = _with_all_tangents(layer_norm(F.layer_norm))
    assert_rule(layer_norm(tangent_rules.layer_norm), theirs, NORMS[name], transposed)


def test_tensors_are_not_taken_apart_where_torch_would_compute_something_else():
    x, weight = torch.randn(2, 3), torch.randn(4, 3)
    assert apart(x, weight) is not None
    assert apart(x, weight.double()) is None
    assert apart(x.to_sparse(), weight) is None
    with torch.autocast("cpu"):
        assert apart(x, weight) is None
    with torch.enable_grad():
        assert apart(x, weight.clone().requires_grad_()) is None
    with torch.no_grad():
        assert apart(x, weight.clone().requires_grad_()) is not None


def test_where_a_rule_does_not_serve_the_tangent_is_that_of_pytorch():
    x, weight, bias, moved = torch.randn(2, 4), torch.randn(4), torch.randn(4), torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, moved)
        ours = forward_ad.unpack_dual(tangent_rules.layer_norm(dual, [4], weight, bias)).tangent
    theirs = along_one(_with_all_tangents(layer_norm(F.layer_norm)), [x, weight, bias], [moved, None, None])[1]
    torch.testing.assert_close(ours, theirs)
