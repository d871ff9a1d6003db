"""Restore all state after an exception at any moment, also after a KeyboardInterrupt inside restoring code.

Python raises KeyboardInterrupt between any two calls. A `with` statement or a `finally` then leaves
changed state in three cases:

- `__enter__` has changed something, and its `with` block has not begun;
- `__exit__` or `finally` has begun, and has not restored everything;
- a context manager made by `contextlib` is suspended. It would restore later, when its generator is collected.

`undoing` registers a function that restores some state, before the state changes. `interruptible` wraps the functions
that a user calls. After an exception, it closes the suspended context managers, calls every registered function that
has not finished, and restores the modes that torch had in this thread at the call. A call that returns
normally does none of this.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType, GeneratorType
from typing import Any, TypeVar

import torch
from torch import nn

from gradcost.core.evaluation.one_at_a_time import one_at_a_time
from gradcost.core.evaluation.torch_modes import Modes, modes

Function = TypeVar("Function", bound=Callable[..., Any])
TORCH_AND_GRADCOST = tuple(  # their folders, each with a separator at its end
    os.path.join(os.path.dirname(os.path.abspath(path)), "") for path in (torch.__file__, os.path.dirname(__file__))
)


class _Registered(threading.local):
    """The undo functions of this thread whose context has not ended, in the order of registration.

    handled: the exception that the caller of the current interruptible function was handling. It belongs to the
    caller, although Python makes it the `__context__` of every exception raised meanwhile.
    """

    def __init__(self) -> None:
        self.contexts: list[undoing] = []
        self.handled: BaseException | None = None


_registered = _Registered()


class undoing:
    """Context manager that calls `undo` at its end, also if an interrupt prevents `__exit__`.

    Enter it before the state changes. Inside an `interruptible` function, `undo` runs to its end at least once.

    Args:
        undo: restores some state. It may be called again after an interruption, so calling it twice must equal
            calling it once.
    """

    __slots__ = ("undo",)

    def __init__(self, undo: Callable[[], object]) -> None:
        self.undo: Callable[[], object] | None = undo

    def __enter__(self) -> None:
        _registered.contexts.append(self)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        contexts = _registered.contexts
        if kind is not None and self in contexts:
            while contexts[-1] is not self:  # an inner context, whose end an interrupt prevented
                contexts[-1].finish()
                contexts.pop()
        self.finish()
        if contexts and contexts[-1] is self:
            contexts.pop()
        elif self in contexts:
            contexts.remove(self)

    def finish(self) -> None:
        """Call `undo`, unless it has finished before."""
        undo = self.undo
        if undo is None:
            return
        try:
            undo()
        except BaseException:  # an interrupt
            undo()
            raise
        self.undo = None


def interruptible(function: Function) -> Function:
    """Wrap a function so that an exception at any moment leaves no state changed.

    The result restores the state registered by `undoing`, and torch's modes: gradients, forward mode, function
    and dispatch modes, functorch levels, hooks of saved tensors, attention kernels, autocast. Cost: about 1 us.

    Calls in different threads run one after the other (`one_at_a_time`).

    Args:
        function: the function to wrap.
    Returns:
        The wrapped function. If another exception replaced a KeyboardInterrupt while state was restored, it raises
        the KeyboardInterrupt.
    """

    @one_at_a_time
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        before, depth, outer = modes(), len(_registered.contexts), _registered.handled
        try:
            _registered.handled = sys.exc_info()[1]
            return function(*args, **kwargs)
        except BaseException as error:
            try:
                _restore(error, Modes(*before), depth)
            except BaseException:  # another interrupt
                _restore(error, Modes(*before), depth)
                raise
            raise_interrupt(error)
            raise
        finally:
            _registered.handled = outer

    return run  # pyright: ignore[reportReturnType]


def _restore(error: BaseException, before: Modes, depth: int) -> None:
    """Restore everything that changed since the call. depth: number of contexts registered before the call."""
    with torch._C._DisableFuncTorch():  # if a functorch level is missing, the next operation ends the process
        for frame in _frames(error):
            for suspended in _suspended(frame):
                if suspended is not None:
                    _close(suspended)
        contexts = _registered.contexts
        while len(contexts) > depth:
            contexts[-1].finish()
            contexts.pop()
    before.restore()


def _close(suspended: Any) -> None:
    """Close a generator or exit stack. Only a KeyboardInterrupt leaves this function.

    Closing may fail, as by popping a mode twice or by a mode that raises a BaseException of its own.
    """
    try:
        suspended.close()
    except KeyboardInterrupt:
        raise
    except BaseException:
        pass


def raise_interrupt(error: BaseException) -> None:
    """Raise the KeyboardInterrupt whose clean-up raised this exception, if there is one.

    Call it before an exception is handled by another attempt: after an interrupt, clean-up code may fail, and its
    exception then hides the interrupt.

    Args:
        error: an exception that was raised inside an interruptible function.
    Raises:
        KeyboardInterrupt: an exception in the `__context__` chain of `error` is one.
    """
    for seen in _chain(error):
        if isinstance(seen, KeyboardInterrupt):
            if seen is error:
                return
            raise seen from None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and those in its `__context__` chain, without what the caller was handling before."""
    seen: BaseException | None = error
    for _ in range(100):
        if seen is None or seen is _registered.handled:
            return
        yield seen
        seen = seen.__context__


def _frames(error: BaseException) -> Iterator[FrameType]:
    """Yield the frames in the tracebacks of an exception and of its `__context__` chain, innermost first."""
    frames: list[FrameType] = []
    for seen in _chain(error):
        trace = seen.__traceback__
        while trace is not None:
            frames.append(trace.tb_frame)
            trace = trace.tb_next
    yield from reversed(frames)


def _suspended(frame: FrameType) -> Iterator[Any]:
    """Yield the generators and exit stacks that a frame of contextlib, torch or gradcost has not closed."""
    file = frame.f_code.co_filename
    if file != contextlib.__file__ and not file.startswith(TORCH_AND_GRADCOST):
        return
    found = frame.f_locals
    values = list(found.values())
    if isinstance(found, dict) and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        found.clear()  # Python 3.11 and 3.12: a copy that the frame keeps, and in it the exception that is handled
    for value in values:
        if isinstance(value, contextlib._GeneratorContextManagerBase):
            yield vars(value).get("gen")
        elif isinstance(value, contextlib.closing):
            yield vars(value).get("thing")
        elif isinstance(value, contextlib.ExitStack) or (
            isinstance(value, GeneratorType) and value.gi_code.co_filename.startswith(TORCH_AND_GRADCOST)
        ):
            yield value


def is_own_hook(hook: Any) -> bool:
    """Return whether gradcost has registered this hook of a module or parameter."""
    return str(getattr(hook, "__module__", "")).startswith("gradcost.")


class Hooks:
    """Forward hooks on modules that can be removed completely after an interrupt.

    Register them inside `undoing(hooks.remove)`.
    """

    def __init__(self) -> None:
        self._dictionaries: list[dict[Any, Any]] = []

    def before(self, module: nn.Module, hook: Callable[[nn.Module, Any], Any]) -> None:
        """Call `hook(module, args)` before each forward pass, before all other hooks."""
        self._add(module._forward_pre_hooks, hook, first=True)

    def after(
        self, module: nn.Module, hook: Callable[[nn.Module, Any, Any], Any], first: bool = False, always: bool = False
    ) -> None:
        """Call `hook(module, args, output)` after each forward pass.

        Args:
            module: the module.
            hook: a hook as in `register_forward_hook`.
            first: whether it runs before all other hooks.
            always: whether it runs even if the forward pass raises; `output` is then None.
        """
        if always:
            self._add(module._forward_hooks_always_called, True)
        self._add(module._forward_hooks, hook, first)

    def _add(self, hooks: Any, hook: Any, first: bool = False) -> None:
        self._dictionaries.append(hooks)
        # The key is known before the hook is added: an interrupt could lose torch's removal handle. It is an integer
        # because the compiler of torch 2.9 fails on others.
        hooks[id(self)] = hook if hook is True else _Hook(hook)
        if first:
            hooks.move_to_end(id(self), last=False)

    def remove(self) -> None:
        """Remove all hooks. Calling it again does nothing."""
        for hooks in self._dictionaries:
            hooks.pop(id(self), None)


class _Hook(functools.partial[Any]):
    """A hook whose copies remove themselves: a loss may copy the module, as a teacher."""

    def __deepcopy__(self, memo: Any) -> Callable[..., None]:
        return _remove_copies


def _remove_copies(module: Any, *arguments: Any) -> None:
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook is _remove_copies]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)
