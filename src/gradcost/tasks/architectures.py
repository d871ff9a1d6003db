"""Architectures: values that build a fresh module from the shape of an input and a number of classes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import pairwise
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradcost.core.errors import BadInput
from gradcost.core.value import value


class Architecture(ABC):
    """How to build a model; a value, so that its repr names the model in a report and on the command line."""

    @abstractmethod
    def build(self, inputs: tuple[int, ...], classes: int) -> nn.Module:
        """A freshly initialised float32 module on the CPU.

        `inputs` is the shape of one example without the batch dimension: (1, 28, 28) for an image in
        channels, height, width; (length,) for a sequence of tokens. `classes` is the size of the last
        dimension of the logits, and of the vocabulary where the inputs are tokens.

        The numbers come from torch's default generator, which the caller sets (`Task.objective` does).

        Raises: ValueError when inputs of this shape do not fit the architecture.
        """


@value
class Logistic(Architecture):
    """One linear layer on the flattened input: multinomial logistic regression."""

    def build(self, inputs: tuple[int, ...], classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(prod(inputs), classes))


@value
class Mlp(Architecture):
    """Dense ReLU layers of the widths `hidden`, then a linear one: [N, ...] -> [N, classes].

    `Mlp((1024, 1024))` is the MNIST network of Rike and Førland (2022).

    Raises: ValueError when `hidden` is empty or holds anything but positive whole numbers.
    """

    hidden: tuple[int, ...] = (64,)

    def __post_init__(self) -> None:
        if not isinstance(self.hidden, tuple) or not self.hidden:
            raise BadInput(
                f"Mlp needs a tuple with at least one width, such as (64,), not {self.hidden!r}; "
                "Logistic() is the one without a hidden layer."
            )
        _require_sizes("Mlp", **{f"hidden[{place}]": width for place, width in enumerate(self.hidden)})

    def build(self, inputs: tuple[int, ...], classes: int) -> nn.Module:
        widths = (prod(inputs), *self.hidden)
        dense = [layer for fan in pairwise(widths) for layer in (nn.Linear(*fan), nn.ReLU())]
        return nn.Sequential(nn.Flatten(), *dense, nn.Linear(widths[-1], classes))


@value
class Cnn(Architecture):
    """The MNIST CNN of Rike and Førland (2022): [N, C, H, W] -> [N, classes].

    Four 3x3 convolutions of `channels` without padding, a 2x2 max-pool after every second, a dense layer of
    `dense`, a linear one; ReLU after all but the last.

    Raises: ValueError for sizes that are not positive, and from `build` for anything but images of at
    least 16 x 16.
    """

    channels: int = 64
    dense: int = 1024

    def __post_init__(self) -> None:
        _require_sizes("Cnn", channels=self.channels, dense=self.dense)

    def build(self, inputs: tuple[int, ...], classes: int) -> nn.Module:
        if len(inputs) != 3 or min(inputs[1:]) < 16:
            raise BadInput(
                f"Cnn needs images of shape (channels, height, width) of at least 16 x 16, not {inputs}: its "
                "unpadded convolutions and pools would leave nothing. Mlp((64,)) takes any shape."
            )
        before, height, width = inputs
        layers: list[nn.Module] = []
        for _ in range(2):
            for fan_in in (before, self.channels):
                layers += [nn.Conv2d(fan_in, self.channels, 3), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
            before, height, width = self.channels, (height - 4) // 2, (width - 4) // 2
        flat = self.channels * height * width
        head = [nn.Flatten(), nn.Linear(flat, self.dense), nn.ReLU(), nn.Linear(self.dense, classes)]
        return nn.Sequential(*layers, *head)


@value
class Gpt(Architecture):
    """A small causal GPT: tokens [B, T] int64 -> logits [B, T, classes], T up to `inputs[0]`.

    Learned positions, pre-LayerNorm blocks, the head tied to the token embedding, no buffers; the layout and
    the initialisation are GPT-2's (Radford et al. 2019). `Gpt(layers=6, width=384, heads=6)` is the one with
    11 million weights.

    Raises: ValueError for sizes that are not positive, a width that the heads do not divide, or a dropout
    outside [0, 1); and from `build` when the inputs are not sequences.
    """

    layers: int = 4
    width: int = 128
    heads: int = 4
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _require_sizes("Gpt", layers=self.layers, width=self.width, heads=self.heads)
        if self.width % self.heads:
            raise BadInput(
                f"Gpt cannot share a width of {self.width} evenly among {self.heads} heads. A width of "
                f"{self.width + -self.width % self.heads} would do."
            )
        if not 0 <= self.dropout < 1:
            raise BadInput(f"Gpt needs a dropout of at least 0 and below 1, not {self.dropout!r}.")

    def build(self, inputs: tuple[int, ...], classes: int) -> nn.Module:
        if len(inputs) != 1:
            raise BadInput(
                f"Gpt reads sequences of tokens, of shape (length,), not {inputs}. For images there are "
                "Logistic(), Mlp((64,)) and Cnn()."
            )
        return GptModel(self, length=inputs[0], vocabulary=classes)


class GptModel(nn.Module):
    """The module that `Gpt` builds; its blocks stand in the ModuleList `blocks`."""

    def __init__(self, plan: Gpt, length: int, vocabulary: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, plan.width)
        self.positions = nn.Embedding(length, plan.width)
        self.drop = nn.Dropout(plan.dropout)
        self.blocks = nn.ModuleList(GptBlock(plan.width, plan.heads, plan.dropout) for _ in range(plan.layers))
        self.norm = nn.LayerNorm(plan.width)
        self.head = nn.Linear(plan.width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        _initialise_like_gpt2(self, plan.layers)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, vocabulary] for `tokens` [B, T] int64; position t sees the tokens up to t."""
        seen = tokens.shape[1]
        if seen > self.positions.num_embeddings:
            raise BadInput(
                f"this model has positions for {self.positions.num_embeddings} tokens and the sequence has "
                f"{seen}: cut it, or build the model for the longer one."
            )
        x = self.drop(self.tokens(tokens) + self.positions(torch.arange(seen, device=tokens.device)))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class GptBlock(nn.Module):
    """Attention, then two dense layers with a GELU between; each behind a LayerNorm, each added on."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] -> the same shape."""
        x = x + self.drop(self.proj(self._attend(self.norm1(x))))
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))

    def _attend(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind()
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return mixed.transpose(1, 2).reshape(batch, length, width)


def _initialise_like_gpt2(model: GptModel, layers: int) -> None:
    """Normal weights of 0.02; those that end in the residual stream by 1/sqrt(2 layers) less; no biases."""
    ends = {id(end) for block in model.blocks if isinstance(block, GptBlock) for end in (block.proj, block.down)}
    for module in model.modules():
        # the head shares its weight with the embedding, which has drawn it already
        if isinstance(module, nn.Linear | nn.Embedding) and module is not model.head:
            nn.init.normal_(module.weight, std=0.02 / (2 * layers) ** 0.5 if id(module) in ends else 0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def _require_sizes(owner: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise BadInput(f"{owner} needs a positive whole number for {name}, not {size!r}.")
