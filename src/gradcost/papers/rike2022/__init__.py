"""Rike and Førland 2022: forward gradients against backprop on MNIST and CIFAR-10.

Table 1 of the paper is data. Each row is trained as published, and again with equal tuning.
"""
