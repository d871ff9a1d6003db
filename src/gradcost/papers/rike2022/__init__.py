"""Rike and Førland 2022: forward gradients against backprop on MNIST and CIFAR-10.

- `table`: Table 1 of the paper. `printed`: the losses that the authors' notebooks print.
- `differences`: where the paper and its code differ. `protocols`: the rows as the paper says, and as the code ran.
- `study`: trains each row with its published settings, and again with a learning rate from a tuning that has equal
  effort for both gradients.
- `claims` and `page`: what our records show about the paper's claims.
"""
