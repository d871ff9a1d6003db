"""The batches of a loader, and a batch in parts: micro-batches, their weights, and what a loss divides by."""
