"""Rike and Førland 2022: forward gradients against backprop on MNIST and CIFAR-10.

`table` contains Table 1 of the paper. `study` trains each row with its published settings, and again with a learning
rate from a tuning that has equal effort for both gradients.
"""
