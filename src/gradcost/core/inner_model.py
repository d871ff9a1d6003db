"""The model inside the wrapper of peft."""

from __future__ import annotations

from typing import Any


def inner_model(model: Any) -> Any:
    """Return the transformers model inside peft's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
