"""EfficientNet-Lite0 with ImageNet weights, as the vision encoder of a vision-language model."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradcost.core.errors import BadInput
from gradcost.tasks import catalogue, data

FEATURES = 1280
STRIDE = 32  # pixels per feature
# repeats, kernel size, stride, expansion, channels
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class EfficientNetLite0(nn.Module):
    """Map images (N, 3, H, W) in [0, 1] to features (N, 1280, ceil(H / 32), ceil(W / 32)).

    Convolutions are padded as in TensorFlow, where the weights come from: with a stride of 2, one pixel more at the
    right and the bottom. Normalisation uses the running statistics in training mode too.

    Source: Tan and Le 2019 (arXiv 1905.11946); the variant "Lite" has no squeeze-and-excitation, and ReLU6.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Convolution(3, 32, 3, 2)
        blocks: list[nn.Module] = []
        inputs = 32
        for repeats, kernel, stride, expansion, outputs in _STAGES:
            for repeat in range(repeats):
                blocks.append(_Block(inputs, outputs, kernel, stride if repeat == 0 else 1, expansion))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = _Convolution(inputs, FEATURES, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(2 * images - 1)))


class _Convolution(nn.Module):
    """Convolution, normalisation by running statistics, and ReLU6 where wanted."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1, relu: bool = True
    ) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3)
        self.kernel, self.stride, self.relu = kernel, stride, relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolution(F.pad(x, (*self._ends(x.shape[3]), *self._ends(x.shape[2]))))
        norm = self.norm
        x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        return F.relu6(x) if self.relu else x

    def _ends(self, length: int) -> tuple[int, int]:
        """Return the padding before and after, so that there are ceil(length / stride) outputs."""
        total = max((ceil(length / self.stride) - 1) * self.stride + self.kernel - length, 0)
        return total // 2, total - total // 2


class _Block(nn.Module):
    """Expand the channels, convolve each alone, and project; with a skip connection where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = _Convolution(inputs, wide, 1, 1) if expansion > 1 else nn.Identity()
        self.depthwise = _Convolution(wide, wide, kernel, stride, groups=wide)
        self.project = _Convolution(wide, outputs, 1, 1, relu=False)
        self.skips = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.skips else y


def efficientnet_lite0() -> EfficientNetLite0:
    """Return the encoder with ImageNet weights. All of it is frozen.

    Raises:
        DataError: the file is missing or damaged.
    """
    path = data.verified(catalogue.EFFICIENTNET) / catalogue.EFFICIENTNET.pieces[0].name
    model = EfficientNetLite0()
    model.load_state_dict(renamed(torch.load(path, map_location="cpu", weights_only=True)))
    return model.requires_grad_(False)


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of `EfficientNetLite0` from one with the names of the file; the classifier is left out.

    Raises:
        BadInput: the file has an unknown name.
    """
    found = {}
    for name, tensor in weights.items():
        if name.startswith("_fc."):
            continue
        *place, layer, field = name.split(".")
        parts = _BLOCK_PARTS if place else _PARTS
        if layer not in parts:
            raise BadInput(f"{name!r} is not a weight of EfficientNet-Lite0: fetch the file again.")
        part, kind = parts[layer]
        found[".".join([*(("blocks", place[1]) if place else ()), part, kind, field])] = tensor
    return found


_PARTS = {
    "_conv_stem": ("stem", "convolution"),
    "_bn0": ("stem", "norm"),
    "_conv_head": ("head", "convolution"),
    "_bn1": ("head", "norm"),
}
_BLOCK_PARTS = {
    "_expand_conv": ("expand", "convolution"),
    "_bn0": ("expand", "norm"),
    "_depthwise_conv": ("depthwise", "convolution"),
    "_bn1": ("depthwise", "norm"),
    "_project_conv": ("project", "convolution"),
    "_bn2": ("project", "norm"),
}
