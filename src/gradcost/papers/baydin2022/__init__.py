"""Baydin et al. 2022: forward gradients against backprop on MNIST, at one learning rate for both.

`table` contains the published settings and numbers. `study` trains each experiment with the shared learning rate, and
again with a learning rate for each gradient from a tuning that has equal effort for both. `speed` compares the times
of a step.
"""
