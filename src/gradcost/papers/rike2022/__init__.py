"""Rike and Førland 2022: forward gradients on MNIST and CIFAR-10; their Table 1 as data, rerun and judged.

Each row of the table is trained as published, and again tuned alike.
"""
