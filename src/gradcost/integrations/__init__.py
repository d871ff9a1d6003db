"""Adapters for other libraries: transformers and TRL, Lightning, accelerate. Each needs its library installed."""
