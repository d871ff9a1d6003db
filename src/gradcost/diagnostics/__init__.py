"""Is it right here: an estimator looked at on the user's own model and data, before training and during it."""
