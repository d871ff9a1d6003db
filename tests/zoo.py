"""Models as people have them: small configurations with random weights, dropout, padding, tied weights and caches.

`ZOO` maps a name to a function that returns an objective in float64 and a batch. Equal calls return equal weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from tables import cross_entropy

Made = tuple[Objective, Any]
ZOO: dict[str, Callable[[], Made]] = {}

LABELS: dict[str, Any] = {"num_labels": 3}
WIDTHS: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
}
SEQUENCES: dict[str, Any] = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
SEQUENCES |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 41}
SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}


def zoo(make: Callable[[], tuple[nn.Module, Any, Callable[[nn.Module, Any], Tensor]]]) -> Callable[[], Made]:
    """Add a model to `ZOO`: seeded, in float64, in training mode."""

    @functools.wraps(make)
    def made() -> Made:
        with seeded_generators(Key(14)):
            model, batch, loss = make()
        return Objective(model.double().train(), loss), batch

    ZOO[make.__name__] = made
    return made


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss


def words(length: int = 9, count: int = 4, vocabulary: int = 41) -> dict[str, Tensor]:
    """A batch of texts, the second one padded on the right."""
    ids, mask = torch.randint(3, vocabulary, (count, length)), torch.ones(count, length, dtype=torch.long)
    mask[1, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


# ---- transformers


@zoo
def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=16, n_head=2, n_layer=3, vocab_size=41, n_positions=16, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config), words(), own_loss


@zoo
def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**WIDTHS, num_key_value_heads=2, vocab_size=41, tie_word_embeddings=True)
    return LlamaForCausalLM(config), words(), own_loss


@zoo
def bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    batch = words() | {"labels": torch.randint(3, (4,))}
    return BertForSequenceClassification(BertConfig(**WIDTHS, **LABELS, vocab_size=41)), batch, own_loss


@zoo
def bert_masked() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**WIDTHS, vocab_size=41)), words(), own_loss


@zoo
def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=16, d_kv=8, d_ff=24, num_heads=2, num_layers=3, vocab_size=41, **SPECIAL)
    return T5ForConditionalGeneration(config), words(), own_loss


@zoo
def bart_with_layerdrop() -> Any:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        **SEQUENCES, **SPECIAL, encoder_layerdrop=0.3, decoder_layerdrop=0.3, max_position_embeddings=32
    )
    return BartForConditionalGeneration(config), words(), own_loss


@zoo
def whisper() -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        **SEQUENCES, **SPECIAL, num_mel_bins=8, max_source_positions=12, max_target_positions=16, dropout=0.1
    )
    batch = {"input_features": torch.randn(3, 8, 24).double(), "labels": torch.randint(3, 41, (3, 7))}
    return WhisperForConditionalGeneration(config), batch, own_loss


@zoo
def wav2vec2_with_masked_spans() -> Any:
    """Masks time spans drawn by NumPy's global generator, and drops layers."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    config = Wav2Vec2Config(
        **WIDTHS, vocab_size=41, conv_dim=(8, 8), conv_stride=(4, 2), conv_kernel=(6, 3),
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, mask_time_prob=0.4, mask_time_length=2,
        layerdrop=0.2, classifier_proj_size=8, **LABELS,
    )  # fmt: skip
    batch = {"input_values": torch.randn(3, 160).double(), "labels": torch.randint(3, (3,))}
    return Wav2Vec2ForSequenceClassification(config), batch, own_loss


@zoo
def clip() -> Any:
    from transformers import CLIPConfig, CLIPModel

    vision = WIDTHS | {"image_size": 8, "patch_size": 4}
    config = CLIPConfig(
        text_config=WIDTHS | {"vocab_size": 41, "bos_token_id": 1, "eos_token_id": 40},
        vision_config=vision,
        projection_dim=8,
    )
    batch = words()
    batch = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    pixels = {"pixel_values": torch.randn(4, 3, 8, 8).double()}
    return CLIPModel(config), batch | pixels, lambda model, batch: model(**batch, return_loss=True).loss


@zoo
def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    # Routers far from ties: where a probe changes the choice of experts, the loss jumps and has no slope.
    sizes: dict[str, Any] = {"num_key_value_heads": 2, "num_local_experts": 3, "vocab_size": 41}
    sizes |= {"initializer_range": 0.3, "experts_implementation": "eager"}
    config = MixtralConfig(**WIDTHS, **sizes)
    return MixtralForCausalLM(config), words(), own_loss


@zoo
def qwen2_vl() -> Any:
    """Keeps `rope_deltas`, computed from the batch, in a plain attribute."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = WIDTHS | {"num_key_value_heads": 2, "vocab_size": 60, "max_position_embeddings": 64}
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 0]}, "rope_parameters": None}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 10000.0}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    vision |= {"spatial_merge_size": 2, "temporal_patch_size": 1, "in_channels": 3}
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=50, video_token_id=51, vision_start_token_id=52,
        vision_end_token_id=53,
    )  # fmt: skip
    ids = torch.randint(3, 50, (2, 8))
    ids[:, 1], ids[:, 2], ids[:, 3] = 52, 50, 53  # one image token each: 2 x 2 patches, merged
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.masked_fill(ids >= 50, -100)}
    batch |= {"pixel_values": torch.randn(8, 48).double(), "image_grid_thw": torch.tensor([[1, 2, 2]] * 2)}
    batch |= {"mm_token_type_ids": (ids == 50).long()}
    return Qwen2VLForConditionalGeneration(config), batch, own_loss


@zoo
def llama_with_lora() -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**WIDTHS, num_key_value_heads=2, vocab_size=41)
    adapters = LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(LlamaForCausalLM(config), adapters), words(), own_loss


# ---- convolutions and recurrence


class ResidualBlock(nn.Module):
    """conv, norm, relu, conv, norm, with the input added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm_one, self.norm_two = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.norm_one(self.one(x)))
        return self.relu(self.norm_two(self.two(out)) + x)


@zoo
def resnet() -> Any:
    blocks = nn.Sequential(*(ResidualBlock(4) for _ in range(3)))
    model = nn.Sequential(nn.Conv2d(1, 4, 3), blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return model, (torch.randn(4, 1, 8, 8).double(), torch.randint(3, (4,))), cross_entropy


class UNet(nn.Module):
    """Two levels down and up; the outputs of the way down are concatenated on the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)])
        self.middle = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU())
        self.up = nn.ModuleList([nn.Conv2d(16, 4, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)])
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for layer in self.down:
            x = F.silu(layer(x))
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        x = self.middle(x)
        for layer in self.up:
            x = F.silu(layer(torch.cat([F.interpolate(x, scale_factor=2.0), skips.pop()], 1)))
        return self.head(x)


@zoo
def unet() -> Any:
    batch = (torch.randn(3, 1, 8, 8).double(), torch.randn(3, 1, 8, 8).double())
    return UNet(), batch, lambda model, batch: F.mse_loss(model(batch[0]), batch[1])


class Recurrent(nn.Module):
    """Two recurrent layers, the second over the first's outputs, and a head on the last step."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind(6, 6, batch_first=True) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.dropout(layer(x)[0], 0.2, self.training)
        return self.head(x[:, -1])


@zoo
def lstm() -> Any:
    return Recurrent(nn.LSTM), (torch.randn(4, 5, 6).double(), torch.randint(3, (4,))), cross_entropy


@zoo
def gru() -> Any:
    return Recurrent(nn.GRU), (torch.randn(4, 5, 6).double(), torch.randint(3, (4,))), cross_entropy


# ---- weights and buffers that a forward writes


def chain_of(make: Callable[[], nn.Module]) -> Any:
    model = nn.Sequential(*(nn.Sequential(make(), nn.Tanh(), nn.Dropout(0.2)) for _ in range(4)), nn.Linear(6, 3))
    return model, (torch.randn(7, 6).double(), torch.randint(3, (7,))), cross_entropy


@zoo
def spectral_norm() -> Any:
    return chain_of(lambda: parametrizations.spectral_norm(nn.Linear(6, 6)))


@zoo
def weight_norm() -> Any:
    return chain_of(lambda: parametrizations.weight_norm(nn.Linear(6, 6)))


@zoo
def weight_norm_by_hooks() -> Any:
    """Recomputes the plain attribute `weight` before each forward."""
    return chain_of(lambda: nn.utils.weight_norm(nn.Linear(6, 6)))


class MovingAverage(nn.Module):
    """Centres its input by a moving average that it updates first."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return self.linear(x - self.mean)


@zoo
def moving_average() -> Any:
    return chain_of(MovingAverage)
