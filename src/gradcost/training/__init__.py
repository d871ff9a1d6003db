"""The training loop and optimizers that take a gradient leaf by leaf."""
