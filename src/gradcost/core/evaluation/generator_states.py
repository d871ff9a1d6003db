"""The states of the global random generators of Python and NumPy, read and written quickly.

Reading and writing a state takes 10 us with Python's functions and 70 us with NumPy's. Copying the memory of a state
takes less than 1 us.

- NumPy draws normal numbers in pairs, and stores the second number of a pair outside of this memory. Draws change the
  memory. So no number is stored while the memory equals a state that is known to have none.
- For Python's `random`, the import checks the address of the memory. If the check fails, `random.getstate` is used.
"""

from __future__ import annotations

import ctypes
import random
from collections import deque
from typing import Any

import numpy as np

_random: Any = np.random  # the type checker does not know `get_bit_generator`
NumpyState = tuple[Any, bytes] | dict[str, Any]  # (bit generator, its memory), or NumPy's own dictionary

_STATE_BYTES = 2500  # of the Mersenne Twister: 624 words of 32 bits and a position
_Memory = ctypes.c_char * _STATE_BYTES  # `raw` copies the bytes without releasing the interpreter lock
# The last states known to have no stored normal number: states that were read or restored, and seeded states.
_read_states: deque[bytes] = deque(maxlen=2)
_seeded_states: deque[bytes] = deque(maxlen=2)


def _memory_of_random() -> Any:
    """Return the memory of Python's `random`, a position and 624 words; None if it does not follow the header."""
    owner: Any = getattr(random, "_inst", None)
    address, base = id(owner) + object.__basicsize__, type(owner).__base__
    if base is None or base.__basicsize__ < object.__basicsize__ + _STATE_BYTES:
        return None
    position, *words = (ctypes.c_uint32 * 625).from_address(address)
    return _Memory.from_address(address) if owner.getstate()[1] == (*words, position) else None


_python_memory: Any = _memory_of_random()
_numpy_memory: tuple[Any, Any] = (None, None)  # a bit generator and its memory


def _memory_of(generator: Any) -> Any:
    global _numpy_memory
    if _numpy_memory[0] is not generator:
        _numpy_memory = generator, _Memory.from_address(generator.ctypes.state_address)
    return _numpy_memory[1]


def python_state() -> Any:
    """Return the state of Python's `random`, for `set_python_state`."""
    if _python_memory is None:
        return random.getstate()
    return _python_memory.raw, random._inst.gauss_next  # type: ignore[attr-defined]


def set_python_state(state: Any) -> None:
    """Give Python's `random` a state that `python_state` returned."""
    if _python_memory is None:
        random.setstate(state)
    else:
        _python_memory.raw, random._inst.gauss_next = state  # type: ignore[attr-defined]


def numpy_state() -> NumpyState:
    """Return the state of NumPy's global generator, for `set_numpy_state`."""
    generator: Any = _random.get_bit_generator()
    if type(generator) is not np.random.MT19937:
        return np.random.get_state(legacy=False)  # type: ignore[return-value]
    memory = _memory_of(generator).raw
    if memory not in _read_states and memory not in _seeded_states:
        state: Any = np.random.get_state(legacy=False)
        if state["has_gauss"]:
            return state
        _read_states.append(memory)
    return generator, memory


def numpy_words() -> Any:
    """Return the state of NumPy's global generator without a stored normal number, to compare two states."""
    generator: Any = _random.get_bit_generator()
    return _memory_of(generator).raw if type(generator) is np.random.MT19937 else repr(generator.state)


def set_numpy_state(state: NumpyState) -> None:
    """Give NumPy's global generator a state that `numpy_state` returned."""
    if isinstance(state, dict):
        np.random.set_state(state)
        return
    generator, saved = state
    memory = _memory_of(generator)
    if memory.raw not in _seeded_states and memory.raw not in _read_states:
        np.random.seed(0)  # drops a stored normal number
    memory.raw = saved
    if saved not in _read_states:
        _read_states.append(saved)


def seed_numpy(seed: int) -> None:
    """Seed NumPy's global generator.

    Args:
        seed: an integer from 0 to 2**64 - 1. Its last 32 bits are used.
    """
    generator: Any = _random.get_bit_generator()
    if type(generator) is np.random.MT19937:
        np.random.seed(seed & 0xFFFFFFFF)
        _seeded_states.append(_memory_of(generator).raw)
    else:
        state: Any = np.random.get_state(legacy=False)
        np.random.set_state(state | type(generator)(seed).state | {"has_gauss": 0, "gauss": 0.0})
