"""Panchal, Choudhary, Brun and Guan 2025: backprop, forward mode and zero-order on pretrained language models.

`methods` contains the methods of the paper as estimators, and beside them what the paper's public code computes where
that is another estimate. `study` trains a pretrained model with every method at equal FLOPs and equal tuning.
`headline` has the three headline claims, and `page` writes the page about them.
"""
