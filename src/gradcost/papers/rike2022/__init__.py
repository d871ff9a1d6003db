"""Rike and Førland 2022: forward gradients against backprop on MNIST and CIFAR-10.

`table` contains Table 1 of the paper. `study` trains each row with the published settings, and again with settings
that are tuned equally for both gradients.
"""
