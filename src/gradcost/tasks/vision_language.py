"""Vision-language models: an image and tokens to the logits of the next tokens, and generated answers.

An example is one row of bytes: the pixels of an image, plane by plane, then the tokens of a text in eight bytes each,
padded on the right (`joined`). So a batch is one tensor, as for the other tasks.

This module needs the extra `gradcost[transformers]`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradcost.core.errors import BadInput
from gradcost.core.inner_model import inner_model
from gradcost.core.value import value
from gradcost.tasks.architectures import Architecture
from gradcost.tasks.efficientnet import FEATURES, STRIDE, efficientnet_lite0
from gradcost.tasks.generation import continuations
from gradcost.tasks.pretrained import CausalLm, Lora
from gradcost.tasks.pretrained_files import load_model, tokenizer

TOKEN = 8  # bytes


def bytes_of_example(side: int, length: int) -> int:
    """Return the length of a row of `joined`.

    Args:
        side: pixels per side of the image.
        length: number of tokens.
    """
    return 3 * side**2 + TOKEN * length


def joined(images: Tensor, tokens: Tensor) -> Tensor:
    """Return examples of images and texts: uint8, shape (N, 3 * side * side + 8 * length).

    Args:
        images: integers from 0 to 255, shape (N, 3, side, side).
        tokens: int64, shape (N, length).
    """
    return torch.cat([images.flatten(1).to(torch.uint8), tokens.contiguous().view(torch.uint8)], 1)


def divided(examples: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Return the images of examples, float32 in [0, 1], shape (N, 3, side, side), and their tokens, int64.

    Args:
        examples: from `joined`.
        side: pixels per side of an image.
    """
    pixels = 3 * side * side
    tokens = examples[:, pixels:].clone(memory_format=torch.contiguous_format).view(torch.int64)
    return examples[:, :pixels].to(torch.float32).div(255).view(-1, 3, side, side), tokens


class ImageLanguage(Architecture):
    """A vision-language model: examples (N, bytes) from `joined` -> logits (N, length, vocabulary).

    Args:
        side: pixels per side of the images in the examples.
        size: pixels per side of the images that the vision encoder gets; they are interpolated.
    """

    side: int
    size: int

    @property
    @abstractmethod
    def weights(self) -> str:
        """The name of the language model's weights."""

    @abstractmethod
    def build(self, inputs: tuple[int, ...], classes: int) -> ImageLogits:
        """Build the model for examples of shape `inputs`. `classes` is the size of the vocabulary and not used."""


class ImageLogits(nn.Module):
    """Map examples to logits at each position of the text, and generate answers.

    A subclass defines `logits`, of images and tokens, and `continued`, which generates after given prompts.
    """

    def __init__(self, side: int, size: int) -> None:
        super().__init__()
        self.side, self.size = side, size

    def forward(self, examples: Tensor) -> Tensor:
        images, tokens = divided(examples, self.side)
        return self.logits(self.resized(images), tokens).float()

    def resized(self, images: Tensor) -> Tensor:
        """Return images of `size` pixels per side."""
        return F.interpolate(images, size=(self.size, self.size), mode="bilinear", align_corners=False)

    def logits(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Return the logits after each token."""
        raise NotImplementedError

    def continued(self, images: Tensor, prompts: Tensor, mask: Tensor, options: dict[str, Any]) -> Tensor:
        """Return the tokens that follow prompts, which are padded on the left where `mask` is 0."""
        raise NotImplementedError


def generate(model: ImageLogits, images: Tensor, prompts: Sequence[Tensor], encode: Any, tokens: int) -> list[str]:
    """Return the continuation of each prompt, given its image, by the most probable tokens (`continuations`).

    Args:
        model: the module that an `ImageLanguage` builds.
        images: float32 in [0, 1], shape (N, 3, side, side).
        prompts: int64 tokens, one dimension each.
        encode: the tokenizer, with a padding token.
        tokens: the largest number of tokens to generate.
    """

    def continued(padded: Tensor, mask: Tensor, options: dict[str, Any]) -> Tensor:
        return model.continued(model.resized(images.to(padded.device)), padded, mask, options)

    return continuations(model, continued, prompts, encode, tokens)


# ---- EfficientNet-Lite0, a projector and a language model


@value
class VisionLanguage(ImageLanguage):
    """A frozen EfficientNet-Lite0, a linear projector of its features, and a causal language model behind them.

    An image gives (size / 32)^2 visual tokens, before the tokens of the text. The projector is new and trained, with
    the language model's adapters or all its weights.

    Args:
        lm: the causal language model.
        side: pixels per side of the images in the examples.
        size: pixels per side of the images that the encoder gets, a multiple of 32.
    Raises:
        BadInput: `size` is not a multiple of 32.
    Source: Liu et al. 2023 (arXiv 2304.08485), with a smaller encoder and language model.
    """

    lm: CausalLm = CausalLm(lora=Lora(rank=8, alpha=8))
    side: int = 32
    size: int = 96

    def __post_init__(self) -> None:
        if self.size < STRIDE or self.size % STRIDE:
            raise BadInput(f"size of VisionLanguage is a multiple of {STRIDE} pixels, not {self.size!r}.")

    @property
    def weights(self) -> str:
        return self.lm.weights

    def build(self, inputs: tuple[int, ...], classes: int) -> ImageLogits:
        return _Projected(self.lm.language_model(), efficientnet_lite0(), self.side, self.size)


class _Projected(ImageLogits):
    def __init__(self, model: nn.Module, encoder: nn.Module, side: int, size: int) -> None:
        super().__init__(side, size)
        self.model, self.encoder = model, encoder
        self.projector = nn.Linear(FEATURES, inner_model(model).get_input_embeddings().embedding_dim)

    def logits(self, images: Tensor, tokens: Tensor) -> Tensor:
        visual, inner = self.visual(images), inner_model(self.model)
        embedded = torch.cat([visual, inner.get_input_embeddings()(tokens)], 1)
        # Not by its head alone: some models scale or cap the logits of the head.
        return inner(inputs_embeds=embedded, logits_to_keep=tokens.shape[1]).logits

    def continued(self, images: Tensor, prompts: Tensor, mask: Tensor, options: dict[str, Any]) -> Tensor:
        visual, inner = self.visual(images), inner_model(self.model)
        embedded, seen = inner.get_input_embeddings()(prompts), mask.new_ones(visual.shape[:2])
        rows = []
        for picture, text, shown in zip(visual, embedded, mask, strict=True):
            padding = int((shown == 0).sum())  # stays first, so that the image is next to its text
            rows.append(torch.cat([text[:padding], picture, text[padding:]]))
        order = torch.cat([mask, seen], 1).sort(1).values
        return inner.generate(inputs_embeds=torch.stack(rows), attention_mask=order, **options)

    def visual(self, images: Tensor) -> Tensor:
        """Return the visual tokens, shape (N, tokens, width)."""
        return self.projector(self.encoder(images).flatten(2).mT)


# ---- Qwen2-VL


@value
class QwenVl(ImageLanguage):
    """A model of the architecture Qwen2-VL: an image gives (size / 28)^2 visual tokens, before the text.

    Args:
        weights: a folder that transformers saved, or a name on the hub.
        lora: the adapters of the language model. None: all weights are trained, those of the vision encoder too.
        attention: transformers' `attn_implementation`, such as "sdpa" or "eager".
        side: pixels per side of the images in the examples.
        size: pixels per side of the images that the encoder gets: a multiple of 28, that is two patches.
    Raises:
        BadInput: `size` is not a multiple of 28.
    Source: Wang et al. 2024 (arXiv 2409.12191).
    """

    weights: str = "Qwen/Qwen2-VL-2B-Instruct"  # type: ignore[assignment]
    lora: Lora | None = Lora(targets=("q_proj", "v_proj"))
    attention: str = "sdpa"
    side: int = 32
    size: int = 112

    def __post_init__(self) -> None:
        if self.size < 28 or self.size % 28:
            raise BadInput(f"size of QwenVl is a multiple of 28 pixels, not {self.size!r}.")

    def build(self, inputs: tuple[int, ...], classes: int) -> ImageLogits:
        loaded, new = load_model("AutoModelForImageTextToText", self.weights, self.attention)
        loaded.config.use_cache = False
        length = (inputs[0] - bytes_of_example(self.side, 0)) // TOKEN
        adapted = loaded if self.lora is None else self.lora.applied(loaded, "CAUSAL_LM", new)
        return _Qwen(adapted, length, self.side, self.size)


class _Qwen(ImageLogits):
    # The normalisation of the images of Qwen2-VL.
    MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    prefix: Tensor
    positions: Tensor

    def __init__(self, model: nn.Module, length: int, side: int, size: int) -> None:
        super().__init__(side, size)
        self.model = model
        inner = inner_model(model)
        config = inner.config
        self.rows = size // config.vision_config.patch_size
        visual = [config.image_token_id] * (self.rows // config.vision_config.spatial_merge_size) ** 2
        prefix = torch.tensor([config.vision_start_token_id, *visual, config.vision_end_token_id])
        self.register_buffer("prefix", prefix, persistent=False)
        # The positions depend on the place of the image alone. The model's own code would read the tokens.
        tokens = torch.cat([prefix, prefix.new_full((length,), config.vision_end_token_id)])[None]
        given = {"mm_token_type_ids": self.kinds(tokens), "image_grid_thw": self.grid(1)}
        self.register_buffer("positions", inner.model.get_rope_index(tokens, **given)[0], persistent=False)

    def kinds(self, tokens: Tensor) -> Tensor:
        """Return 1 for visual tokens and 0 for others."""
        return (tokens == inner_model(self.model).config.image_token_id).long()

    def grid(self, images: int) -> Tensor:
        """Return the number of frames, rows and columns of patches of each image."""
        return torch.tensor([[1, self.rows, self.rows]] * images, device=self.prefix.device)

    def logits(self, images: Tensor, tokens: Tensor) -> Tensor:
        full = torch.cat([self.prefix.expand(len(tokens), -1), tokens], 1)
        given = {"pixel_values": self.patches(images), "image_grid_thw": self.grid(len(images))}
        positions = self.positions.expand(-1, len(tokens), -1)[..., : full.shape[1]]
        output = self.model(input_ids=full, position_ids=positions, **given)
        return output.logits[:, len(self.prefix) :]

    def continued(self, images: Tensor, prompts: Tensor, mask: Tensor, options: dict[str, Any]) -> Tensor:
        rows = []
        for prompt, shown in zip(prompts, mask, strict=True):
            padding = int((shown == 0).sum())
            rows.append(torch.cat([prompt[:padding], self.prefix, prompt[padding:]]))
        full = torch.stack(rows)
        order = torch.cat([mask, mask.new_ones(len(mask), len(self.prefix))], 1).sort(1).values
        given = {"pixel_values": self.patches(images), "image_grid_thw": self.grid(len(images))}
        kinds = self.kinds(full)
        model: Any = self.model
        output = model.generate(input_ids=full, attention_mask=order, mm_token_type_ids=kinds, **given, **options)
        return output[:, full.shape[1] :]

    def patches(self, images: Tensor) -> Tensor:
        """Return the patches of images in the order of Qwen2-VL: those that become one visual token are together.

        Returns:
            Shape (N * rows * rows, 3 * 2 * patch^2); an image is two equal frames.
        """
        config = inner_model(self.model).config.vision_config
        patch, merge = config.patch_size, config.spatial_merge_size
        mean, deviation = (images.new_tensor(each)[:, None, None] for each in (self.MEAN, self.DEVIATION))
        blocks = ((images - mean) / deviation).unflatten(3, (-1, merge, patch)).unflatten(2, (-1, merge, patch))
        # (N, channel, block row, row, y, block column, column, x)
        ordered = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)
        frames = ordered.unsqueeze(6).expand(*ordered.shape[:6], config.temporal_patch_size, patch, patch)
        return frames.flatten(5).flatten(0, 4)


def vocabulary(architecture: ImageLanguage) -> Any:
    """Return the tokenizer of a vision-language model."""
    return tokenizer(architecture.weights)
