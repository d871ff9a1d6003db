"""Restore all state after an exception at any moment, also after a KeyboardInterrupt inside restoring code.

Python raises KeyboardInterrupt between any two calls. A `with` statement or a `finally` then misses state at three
places:

- `__enter__` has changed something, and its `with` block has not begun;
- `__exit__` or `finally` has begun, and has not restored everything;
- a context manager made by `contextlib` is suspended. It would restore later, when its generator is collected.

`undoing` registers a function that restores some state, before the state changes. `interruptible` wraps the functions
that a user calls. After an exception, it closes the suspended context managers, calls every registered function that
has not finished, and sets torch's modes of this thread to what they were at the call. A call that returns does none
of this.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from types import FrameType, GeneratorType
from typing import Any, TypeVar

import torch
from torch import nn

from gradcost.core.torch_modes import Modes, modes

Function = TypeVar("Function", bound=Callable[..., Any])
_LIBRARIES = tuple(
    os.path.join(os.path.dirname(os.path.abspath(path)), "")
    for path in (torch.__file__, os.path.dirname(__file__))  # torch and gradcost
)


class _Registered(threading.local):
    """The undo functions of this thread whose context has not ended, in the order of registration."""

    def __init__(self) -> None:
        self.contexts: list[undoing] = []


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
            while contexts[-1] is not self:  # an interrupt prevented the end of a context inside this one
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

    Restored are the state registered by `undoing` and torch's modes: gradients, forward mode, function and dispatch
    modes, functorch levels, hooks of saved tensors, attention kernels, autocast. Cost of a call: about 1 us.

    Args:
        function: the function to wrap.
    Returns:
        The wrapped function. A KeyboardInterrupt that the restoring code turned into another exception is raised
        as KeyboardInterrupt.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        before, first = modes(), len(_registered.contexts)
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            try:
                _restore(error, Modes(*before), first)
            except BaseException:  # another interrupt
                _restore(error, Modes(*before), first)
                raise
            interrupt = _interrupt(error)
            if interrupt is error:
                raise
            raise interrupt from None

    return run  # pyright: ignore[reportReturnType]


def _restore(error: BaseException, before: Modes, first: int) -> None:
    """Restore everything that changed since the call. first: number of contexts registered before it."""
    with torch._C._DisableFuncTorch():  # with a level missing, functorch would end the process at the next operation
        for frame in _frames(error):
            for suspended in _suspended(frame):
                if suspended is not None:
                    with contextlib.suppress(Exception):  # such as popping a mode that is gone already
                        suspended.close()
        contexts = _registered.contexts
        while len(contexts) > first:
            contexts[-1].finish()
            contexts.pop()
    before.restore()


def _interrupt(error: BaseException) -> BaseException:
    """Return the KeyboardInterrupt during which this exception was raised, or the exception itself."""
    seen: BaseException | None = error
    for _ in range(100):
        if seen is None or isinstance(seen, KeyboardInterrupt):
            break
        seen = seen.__context__
    return seen if isinstance(seen, KeyboardInterrupt) else error


def _frames(error: BaseException) -> Iterator[FrameType]:
    """Yield the frames that an exception and those before it have passed, innermost first."""
    frames: list[FrameType] = []
    seen: BaseException | None = error
    for _ in range(100):
        if seen is None:
            break
        trace = seen.__traceback__
        while trace is not None:
            frames.append(trace.tb_frame)
            trace = trace.tb_next
        seen = seen.__context__
    yield from reversed(frames)


def _suspended(frame: FrameType) -> Iterator[Any]:
    """Yield what a frame of contextlib, torch or gradcost has left open: generators and exit stacks."""
    file = frame.f_code.co_filename
    if file != contextlib.__file__ and not file.startswith(_LIBRARIES):
        return
    for value in list(frame.f_locals.values()):
        if isinstance(value, contextlib._GeneratorContextManagerBase):
            yield vars(value).get("gen")
        elif isinstance(value, contextlib.closing):
            yield vars(value).get("thing")
        elif isinstance(value, contextlib.ExitStack) or (
            isinstance(value, GeneratorType) and value.gi_code.co_filename.startswith(_LIBRARIES)
        ):
            yield value


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
        hooks[self] = hook  # a key of our own: an identifier from torch would be lost in an interrupt
        if first:
            hooks.move_to_end(self, last=False)

    def remove(self) -> None:
        """Remove all hooks. Calling it again does nothing."""
        for hooks in self._dictionaries:
            hooks.pop(self, None)
