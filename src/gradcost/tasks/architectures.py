"""Architectures: configurations that build a new module for an input shape and a number of classes."""

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
    """The configuration of a model. Reports and the command line use its repr as the name of the model."""

    @abstractmethod
    def build(self, inputs: tuple[int, ...], classes: int) -> nn.Module:
        """Build a newly initialised float32 module on the CPU.

        The initial weights come from torch's default generator, which `Task.objective` seeds from a key.

        Args:
            inputs: the shape of one example, without the batch dimension: (channels, height, width) for images,
                (length,) for sequences of tokens.
            classes: the last dimension of the logits. For sequences it is also the size of the input vocabulary.
        Returns:
            A module that maps inputs of shape (N, *inputs) to logits.
        Raises:
            BadInput: the architecture does not accept inputs of this shape.
        """


@value
class Logistic(Architecture):
    """Multinomial logistic regression: one linear layer on the flattened input, (N, ...) -> (N, classes)."""

    def build(self, inputs: tuple[int, ...], classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(prod(inputs), classes))


@value
class Mlp(Architecture):
    """A multilayer perceptron: dense ReLU layers, then a linear layer, (N, ...) -> (N, classes).

    Args:
        hidden: the widths of the ReLU layers, at least one.
    Source: Rike and Førland (2022) for `Mlp((1024, 1024))` on MNIST.
    """

    hidden: tuple[int, ...] = (64,)

    def __post_init__(self) -> None:
        if not isinstance(self.hidden, tuple) or not self.hidden:
            raise BadInput(
                f"hidden of Mlp must be a tuple of at least one width, such as (64,), not {self.hidden!r}. "
                "Logistic() has no hidden layer."
            )
        _require_sizes("Mlp", **{f"hidden[{place}]": width for place, width in enumerate(self.hidden)})

    def build(self, inputs: tuple[int, ...], classes: int) -> nn.Module:
        widths = (prod(inputs), *self.hidden)
        dense = [layer for sizes in pairwise(widths) for layer in (nn.Linear(*sizes), nn.ReLU())]
        return nn.Sequential(nn.Flatten(), *dense, nn.Linear(widths[-1], classes))


@value
class Cnn(Architecture):
    """A convolutional network for images of at least 16 x 16: (N, C, H, W) -> (N, classes).

    Four 3x3 convolutions without padding, with a 2x2 max-pool after the second and the fourth; then a dense layer and
    a linear layer. ReLU follows each convolution and the dense layer.

    Args:
        channels: output channels of each convolution.
        dense: width of the dense layer.
    Source: Rike and Førland (2022), the MNIST network.
    """

    channels: int = 64
    dense: int = 1024

    def __post_init__(self) -> None:
        _require_sizes("Cnn", channels=self.channels, dense=self.dense)

    def build(self, inputs: tuple[int, ...], classes: int) -> nn.Module:
        if len(inputs) != 3 or min(inputs[1:]) < 16:
            raise BadInput(
                f"Cnn needs images of shape (channels, height, width) of at least 16 x 16, not {inputs}. "
                "Mlp((64,)) accepts any shape."
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
class Vgg(Architecture):
    """A VGG-like network for images of at least 8 x 8: (N, C, H, W) -> (N, classes).

    Three blocks of two 3x3 convolutions with padding 1 and a 2x2 max-pool; then a dense layer and a linear layer.
    ReLU follows each convolution and the dense layer. Widths of the blocks: `width`, 2 `width` and 4 `width`; of the
    dense layer: 64 `width`. `Vgg()` has 18 million weights on CIFAR-10, `Vgg(16)` has 1.1 million.

    Args:
        width: output channels of the first block. It scales all other widths.
    Source: Rike and Førland (2022), the CIFAR-10 network (`Vgg(64)`), after Simonyan and Zisserman (2015).
    """

    width: int = 64

    def __post_init__(self) -> None:
        _require_sizes("Vgg", width=self.width)

    def build(self, inputs: tuple[int, ...], classes: int) -> nn.Module:
        if len(inputs) != 3 or min(inputs[1:]) < 8:
            raise BadInput(
                f"Vgg needs images of shape (channels, height, width) of at least 8 x 8, not {inputs}. "
                "Mlp((64,)) accepts any shape."
            )
        before, height, width = inputs
        layers: list[nn.Module] = []
        for after in (self.width, 2 * self.width, 4 * self.width):
            for fan_in in (before, after):
                layers += [nn.Conv2d(fan_in, after, 3, padding=1), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
            before, height, width = after, height // 2, width // 2
        dense = 64 * self.width
        head = [nn.Flatten(), nn.Linear(before * height * width, dense), nn.ReLU(), nn.Linear(dense, classes)]
        return nn.Sequential(*layers, *head)


@value
class Gpt(Architecture):
    """A small causal GPT: int64 tokens (B, T) -> logits (B, T, classes), T up to `inputs[0]`.

    Learned position embeddings, pre-LayerNorm blocks, a head that shares the token embedding's weight, no buffers.
    `Gpt(layers=6, width=384, heads=6)` has 11 million weights.

    Args:
        layers: number of blocks.
        width: width of the residual stream; a multiple of `heads`.
        heads: number of attention heads.
        dropout: dropout probability, at least 0 and below 1.
    Source: Radford et al. 2019 (GPT-2) for layout and initialisation.
    """

    layers: int = 4
    width: int = 128
    heads: int = 4
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _require_sizes("Gpt", layers=self.layers, width=self.width, heads=self.heads)
        if self.width % self.heads:
            raise BadInput(
                f"width of Gpt must be a multiple of its {self.heads} heads, not {self.width}: use "
                f"{self.width + -self.width % self.heads}."
            )
        if not 0 <= self.dropout < 1:
            raise BadInput(f"dropout of Gpt must be at least 0 and below 1, not {self.dropout!r}.")

    def build(self, inputs: tuple[int, ...], classes: int) -> nn.Module:
        if len(inputs) != 1:
            raise BadInput(
                f"Gpt needs sequences of tokens, of shape (length,), not {inputs}. For images use Logistic(), "
                "Mlp((64,)) or Cnn()."
            )
        return GptModel(self, length=inputs[0], vocabulary=classes)


class GptModel(nn.Module):
    """The module that `Gpt` builds. `blocks` is the ModuleList of its transformer blocks."""

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
        """Map int64 tokens (B, T) to logits (B, T, vocabulary). The logits at position t depend on tokens 0 to t."""
        length = tokens.shape[1]
        if length > self.positions.num_embeddings:
            raise BadInput(
                f"the sequence has {length} tokens and this model has positions for {self.positions.num_embeddings}: "
                "shorten it, or build the model for longer sequences."
            )
        x = self.drop(self.tokens(tokens) + self.positions(torch.arange(length, device=tokens.device)))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class GptBlock(nn.Module):
    """Add pre-LayerNorm attention to the residual stream, then a pre-LayerNorm two-layer GELU network."""

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
        """Map a tensor of shape (B, T, width) to one of the same shape."""
        x = x + self.drop(self.proj(self._attend(self.norm1(x))))
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))

    def _attend(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        dropout = self.dropout if self.training else 0.0
        output = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return output.transpose(1, 2).reshape(batch, length, width)


def _initialise_like_gpt2(model: GptModel, layers: int) -> None:
    """Draw weights of std 0.02, times 1/sqrt(2 layers) in layers that write to the residual stream; zero biases."""
    residual_ids = {
        id(layer) for block in model.blocks if isinstance(block, GptBlock) for layer in (block.proj, block.down)
    }
    for module in model.modules():
        # Skip the head: its weight is that of the embedding, which would be drawn twice.
        if isinstance(module, nn.Linear | nn.Embedding) and module is not model.head:
            nn.init.normal_(module.weight, std=0.02 / (2 * layers) ** 0.5 if id(module) in residual_ids else 0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def _require_sizes(owner: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise BadInput(f"{name} of {owner} must be a positive whole number, not {size!r}.")
