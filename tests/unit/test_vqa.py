"""Vision-language models, questions about images, and the parsing of their answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import tiny_models
from gradcost.core.errors import BadInput
from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key
from gradcost.core.value import value
from gradcost.estimators.presets import backprop, forward_gradient
from gradcost.studies.task_info import guessing_fields
from gradcost.tasks import catalogue, data, emoji, hub_rows, vision_language
from gradcost.tasks.answers import is_right, normal_answer, word_answer
from gradcost.tasks.efficientnet import EfficientNetLite0, efficientnet_lite0, renamed
from gradcost.tasks.hub_images import TextVqa, VqaV2
from gradcost.tasks.metrics import IGNORED
from gradcost.tasks.pretrained import CausalLm, Lora
from gradcost.tasks.task import Splits, cross_entropy
from gradcost.tasks.vision_language import QwenVl, VisionLanguage, divided, generate, joined
from gradcost.tasks.vqa import ANIMAL, SHOWN, ImageQuestions, Question, asked, encoded
from hub_rows_in_memory import Part

# ---- answers


def test_an_answer_is_a_word_and_not_a_part_of_one():
    """A substring test finds "cat" in "caterpillar"; an empty answer scored 1.0 in a published metric."""
    assert [word_answer(text) for text in (" A cat.", "cat", "the  Cat and a dog", "a", "", " .")] == [
        *("cat", "cat", "cat", "a", None, None)
    ]
    assert not is_right("caterpillar", "cat", word_answer)
    assert not is_right("not a cat", "cat", word_answer)
    assert not is_right("", "no", word_answer)
    assert [normal_answer(text) for text in (" A red bus.\nNext", "red bus", "", "?")] == ["red bus"] * 2 + [None] * 2
    assert not is_right("red", "red bus", normal_answer)


# ---- the vision encoder


def test_the_encoder_is_padded_as_in_tensorflow():
    with seeded_generators(Key(1)):
        encoder = EfficientNetLite0().requires_grad_(False)
    assert encoder(torch.rand(2, 3, 64, 96)).shape == (2, 1280, 2, 3)
    assert encoder(torch.rand(1, 3, 33, 33)).shape == (1, 1280, 2, 2)
    image = torch.zeros(1, 1, 4, 4)
    image[..., 3, 3] = 1
    # A stride of 2 over 4 pixels has one pixel of padding, at the end: the last window starts at pixel 2.
    stem = encoder.stem.convolution
    padded = F.pad(image.expand(1, 3, 4, 4), encoder.stem._ends(4) * 2)
    assert padded.shape[-1] == 5
    assert torch.equal(padded[..., :4, :4], image.expand(1, 3, 4, 4))
    assert F.conv2d(padded, stem.weight, stride=2).shape[-1] == 2


def test_a_batch_and_the_mode_do_not_change_features():
    with seeded_generators(Key(1)):
        encoder = EfficientNetLite0().requires_grad_(False)
    images = torch.rand(3, 3, 64, 64)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    found = encoder.train()(images)
    torch.testing.assert_close(found[:1], encoder.eval()(images[:1]), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


def test_the_names_of_the_file_become_those_of_the_encoder():
    names = ["_conv_stem.weight", "_bn1.bias", "_blocks.0._bn1.weight", "_blocks.3._expand_conv.weight", "_fc.bias"]
    found = renamed({name: torch.ones(1) for name in names})
    assert list(found) == [
        "stem.convolution.weight",
        "head.norm.bias",
        "blocks.0.depthwise.norm.weight",
        "blocks.3.expand.convolution.weight",
    ]
    assert set(found) < set(EfficientNetLite0().state_dict())
    with pytest.raises(BadInput, match="is not a weight of EfficientNet-Lite0"):
        renamed({"_bn7.weight": torch.ones(1)})


# ---- models and questions


@value
class Colours(ImageQuestions):
    """A task for tests: is the image dark (a) or bright (b)? Half of the questions are longer."""

    model: Any = None
    batch: int = 4
    length: int = 12
    generated: int = 2

    def splits(self) -> Splits:
        return Splits(*(encoded(questions(count), self.model, self.length) for count in (16, 4, 6)))


def questions(count: int) -> list[Question]:
    images = [torch.full((3, 8, 8), 40 + 160 * (place % 2), dtype=torch.uint8) for place in range(count)]
    return [Question(each, "c" if place % 3 else "d e f", "ab"[place % 2]) for place, each in enumerate(images)]


@pytest.fixture(params=["projected", "qwen"])
def task(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Colours:
    """Return the task with a tiny model: a random encoder before a Llama, or a Qwen2-VL."""
    if request.param == "qwen":
        lora = Lora(rank=2, dropout=0.0, targets=("q_proj", "v_proj"))
        return Colours(QwenVl(tiny_models.vision_language(tmp_path), lora, side=8, size=56))

    def encoder() -> EfficientNetLite0:
        with seeded_generators(Key(1)):
            return EfficientNetLite0().requires_grad_(False)

    monkeypatch.setattr(vision_language, "efficientnet_lite0", encoder)
    lm = CausalLm(tiny_models.causal(tmp_path), Lora(rank=2, dropout=0.0))
    return Colours(VisionLanguage(lm, side=8, size=64))


def test_the_share_of_the_most_frequent_answer_is_recorded(task: Colours):
    assert task.gold_answers(task.splits().test) == ["a", "b", "a", "b", "a", "b"]
    assert guessing_fields(task)["majority"] == 0.5


def test_a_batch_has_pixels_then_tokens_and_only_the_answer_counts(task: Colours):
    split = task.splits().train
    assert split.x.shape == (16, *task.inputs)
    images, tokens = divided(split.x, 8)
    assert torch.equal(joined((images * 255).round(), tokens), split.x)
    assert images[0].unique().item() == pytest.approx(40 / 255)
    encode = vision_language.vocabulary(task.model)
    for target, place in zip(split.y, range(16), strict=True):
        assert encode.decode(target[target != IGNORED]).split() == ["ab"[place % 2], "[END]"]
    assert (split.y[0] != IGNORED).sum() == 2
    with pytest.raises(BadInput, match="at most 3 tokens: choose a larger length"):
        encoded(questions(2), task.model, 3)
    with pytest.raises(BadInput, match="need a vision-language model, such as"):
        replace(task, model=CausalLm()).inputs


def test_padding_on_the_left_does_not_change_what_is_generated(task: Colours):
    """Prompts of different lengths in one batch are answered as each prompt alone."""
    model = task.objective(Key(3)).model
    assert isinstance(model, vision_language.ImageLogits)
    split = task.splits().test
    images, tokens = divided(split.x, 8)
    encode = vision_language.vocabulary(task.model)
    prompts = [row[: int((y != IGNORED).nonzero()[0]) + 1] for row, y in zip(tokens, split.y, strict=True)]
    assert len({len(prompt) for prompt in prompts}) == 2
    together = generate(model, images, prompts, encode, 4)
    alone = [generate(model, images[i : i + 1], prompts[i : i + 1], encode, 4)[0] for i in range(len(prompts))]
    assert together == alone
    # The first generated token is the most probable one of the logits in training.
    logits = model.eval()(split.x)
    for row, y, text in zip(logits, split.y, together, strict=True):
        first = row[int((y != IGNORED).nonzero()[0])].argmax()
        expected = encode.decode([first], skip_special_tokens=True).split()
        assert text.split()[: len(expected)] == expected


def test_forward_mode_has_the_loss_of_backprop_and_the_image_changes_it(task: Colours):
    objective, batch = task.objective(Key(3)), task.batch_at(Key(1), 0)
    first = backprop().estimate(objective, batch, Key(0))
    slope = forward_gradient().estimate(objective, batch, Key(0))
    assert float(slope.loss) == pytest.approx(float(first.loss), rel=1e-5)
    if not isinstance(task.model, QwenVl):
        return  # a random EfficientNet gives all images the same features
    other = joined(255 - (divided(batch.x, 8)[0] * 255).round(), divided(batch.x, 8)[1])
    changed = backprop().estimate(objective, batch._replace(x=other), Key(0))
    assert float(changed.loss) != float(first.loss)


def test_after_training_the_image_decides_the_answer(tmp_path: Path):
    weights = tiny_models.vision_language(tmp_path)
    task = Colours(QwenVl(weights, None, side=8, size=56))  # adapters of a random model are too weak
    objective, whole = task.objective(Key(3)), task.splits().train
    optimizer = torch.optim.Adam([leaf.parameter for leaf in objective.leaves], lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        cross_entropy(objective.model, whole).backward()
        optimizer.step()
    score = task.score(objective.model, task.splits().test)
    assert score.accuracy == 1.0
    assert score.loss < 0.3
    model = objective.model
    assert isinstance(model, vision_language.ImageLogits)
    assert [right for _, _, right in task.answers(model, task.splits().test)] == [True] * 6


def test_the_patches_of_qwen_are_those_of_a_plain_loop(tmp_path: Path):
    built = QwenVl(tiny_models.vision_language(tmp_path), None, side=8, size=56).build((3 * 64 + 12,), 0)
    image = torch.rand(2, 3, 56, 56)
    found = built.patches(image)  # type: ignore[operator]
    mean, deviation = (torch.tensor(each)[:, None, None] for each in (built.MEAN, built.DEVIATION))  # type: ignore[union-attr]
    expected = []
    for each in (image - mean) / deviation:
        for row, column in ((r, c) for r in range(0, 4, 2) for c in range(0, 4, 2)):
            for y, x in ((row, column), (row, column + 1), (row + 1, column), (row + 1, column + 1)):
                patch = each[:, 14 * y : 14 * y + 14, 14 * x : 14 * x + 14]
                expected.append(torch.stack([patch, patch], 1).flatten())
    torch.testing.assert_close(found, torch.stack(expected))
    with pytest.raises(BadInput, match="multiple of 28"):
        QwenVl(size=100)
    with pytest.raises(BadInput, match="multiple of 32"):
        VisionLanguage(size=100)


def test_the_questions_about_cifar10():
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    found = [(each.question, each.answer) for each in asked(images, [0, 0, 3, 3])]
    assert found == [(SHOWN, "airplane"), (ANIMAL, "no"), (SHOWN, "cat"), (ANIMAL, "yes")]


def test_the_questions_about_emojis_have_as_many_animals_as_others():
    part = [emoji.Picture(torch.zeros(3, 32, 32), kind) for kind in ("face", "animal", "flag", "flag", "animal")]
    found = [(each.question, each.answer) for each in emoji.asked(part)]
    assert found[:5] == [(SHOWN, kind) for kind in ("face", "animal", "flag", "flag", "animal")]
    assert found[5:] == [(ANIMAL, "yes"), (ANIMAL, "yes"), (ANIMAL, "no"), (ANIMAL, "no")]


def test_an_emoji_is_cut_out_of_its_sheet_on_white(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sheet = np.zeros((2 * 34, 2 * 34, 4), np.uint8)
    sheet[1:33, 35:67] = (10, 20, 30, 255)  # row 0, column 1
    sheet[34, 34] = (1, 2, 3, 255)  # in the border of row 1, column 1, whose picture is transparent
    sheet[1:33, 1:33] = sheet[1:33, 35:67]
    Image.fromarray(sheet).save(tmp_path / "32.png")
    emojis = [("animal-bug", 1, 0, True), ("face-hat", 1, 1, True), ("keycap", 0, 0, True), ("flag", 0, 0, False)]
    emojis += [("animal-bird", 0, 0, True)]  # the first picture again
    names = ("subcategory", "sheet_x", "sheet_y", "has_img_twitter")
    (tmp_path / "emoji.json").write_text(json.dumps([dict(zip(names, each, strict=True)) for each in emojis]))
    monkeypatch.setattr(data, "verified", lambda dataset: tmp_path)
    found = emoji.pictures.__wrapped__()
    assert [each.kind for each in found] == ["animal", "face"]
    assert found[0].image.flatten(1).unique(dim=1).flatten().tolist() == [10, 20, 30]
    assert found[1].image.unique().tolist() == [255]


# ---- the hub


@pytest.mark.parametrize("kind", [VqaV2, TextVqa])
def test_the_columns_of_the_hub_become_questions(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = pytest.importorskip("datasets.config")
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "model").mkdir()
    (tmp_path / "data").mkdir()
    answers = ["a", "b", "b"]
    given = (
        [{"answer": each, "answer_id": number} for number, each in enumerate(answers)] if kind is VqaV2 else answers
    )
    image = [[[0, 128, 255]] * 6] * 4  # four rows, six columns
    rows = [{"image_id": id, "image": image, "question": "what is c ?", "answers": given} for id in range(20)]
    for part in ("train", "validation"):
        (tmp_path / "data" / f"{part}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    model = QwenVl(tiny_models.vision_language(tmp_path / "model"), side=8, size=28)
    task = kind(model=model, length=12, source=str(tmp_path / "data"))
    train, validation, test = task.splits()
    assert [len(part.x) for part in (train, validation, test)] == [18, 2, 20]
    images, _ = divided(train.x, 8)
    assert (images[0] * 255).round().flatten(1).unique(dim=1).flatten().tolist() == [0.0, 128.0, 255.0]
    encode = vision_language.vocabulary(model)
    assert encode.decode(train.y[0][train.y[0] != IGNORED]).split() == ["b", "[END]"]


def asked_of_the_hub(rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let the hub have these rows in both splits, and return the list of the rows that are read."""
    read: list[Any] = []
    parts = {name: Part(rows, read) for name in ("train", "validation")}
    monkeypatch.setattr(hub_rows, "require", lambda *_: SimpleNamespace(load_dataset=lambda *_: parts))
    return read


def photographs(images: int, answers: Any = ("a",)) -> list[dict[str, Any]]:
    """Return two questions about each image."""
    image = Image.new("RGB", (6, 4), (0, 128, 255))
    return [
        {"image_id": place // 2, "image": image, "question": "what ?", "answers": answers}
        for place in range(2 * images)
    ]


@pytest.fixture
def model(tmp_path: Path) -> QwenVl:
    return QwenVl(tiny_models.vision_language(tmp_path), side=8, size=28)


def test_only_the_chosen_images_are_decoded_and_kept_as_bytes(model: QwenVl, monkeypatch: pytest.MonkeyPatch):
    """All images of VQAv2 in int64 would need a terabyte."""
    read = asked_of_the_hub(photographs(50), monkeypatch)
    task = VqaV2(model=model, length=12, source="chosen", examples=20, held_out=6)
    splits = task.splits()
    assert [len(part.x) for part in splits] == [20, 6, 6]
    assert len(read) == 32
    train, validation = ({row["image_id"] for row in part} for part in (read[:20], read[20:26]))
    assert not train & validation
    assert {part.x.dtype for part in splits} == {torch.uint8}
    assert splits.train.x.shape[1:] == task.inputs == (3 * 8 * 8 + 8 * 12,)
    assert task.objective(Key(1)).evaluate(task.batch_at(Key(1), 0), Key(1)).isfinite()
    everything = replace(task, examples=None, held_out=None).splits()
    assert [len(part.x) for part in everything] == [90, 10, 100]
    assert replace(task, source="other", held_out=50).splits().validation.x.shape[0] == 10
    with pytest.raises(BadInput, match="held_out of VqaV2 is 1 or more, or None for all, not 0"):
        replace(task, held_out=0)


@pytest.mark.parametrize(
    ("answers", "gold"),
    [
        (["b", "b", "a", "A", "a ", "A.", "a"], "a"),
        ([{"answer": "b"}, {"answer": "a"}, {"answer": "B"}], "b"),
        ({"answer": ["a", "b", "b."], "answer_id": [1, 2, 3]}, "b"),
        (["?", "?", "a"], "a"),
    ],
)
def test_answers_are_normalised_before_the_most_frequent_is_chosen(
    answers: Any, gold: str, model: QwenVl, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
):
    """Seven of ten people answered "no" in several spellings, and the gold answer was "yes"."""
    asked_of_the_hub(photographs(10, answers), monkeypatch)
    task = TextVqa(model=model, length=12, source=request.node.name)
    y = task.splits().train.y[0]
    assert vision_language.vocabulary(model).decode(y[y != IGNORED]).split() == [gold, "[END]"]


def test_a_question_without_an_answer_is_left_out(model: QwenVl, monkeypatch: pytest.MonkeyPatch):
    """Its gold answer, such as "?", once raised an error in scoring."""
    rows = photographs(20)
    asked_of_the_hub([*rows[:-2], *(row | {"answers": ["?"] * 10} for row in rows[-2:])], monkeypatch)
    assert len(VqaV2(model=model, length=12, source="without").splits().test.x) == 38


# ---- the real parts


@pytest.mark.slow
def test_the_emojis_are_as_many_as_the_documentation_says():
    train, validation, test = emoji.Emoji().splits()
    assert len(emoji.pictures()) == 1138
    questions = [len(part.x) for part in (train, validation, test)]
    assert sum(questions) == 1138 + 2 * 130


@pytest.mark.slow
def test_the_encoder_recognises_photographs():
    """The largest ImageNet logit, over the classes of each kind, names most images of the test file."""
    folder = data.verified(catalogue.EFFICIENTNET)
    head = torch.load(folder / catalogue.EFFICIENTNET.pieces[0].name, weights_only=True)
    content = (data.verified(catalogue.CIFAR10) / "test_batch.bin").read_bytes()[: 200 * 3073]
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, 3073)
    images = F.interpolate(records[:, 1:].view(-1, 3, 32, 32).float() / 255, size=(128, 128), mode="bilinear")
    with torch.no_grad():
        logits = F.linear(efficientnet_lite0()(images).mean((2, 3)), head["_fc.weight"], head["_fc.bias"])
    kinds = {0: [404, 895], 3: range(281, 288), 5: range(151, 269), 6: range(30, 33), 8: [510, 724, 814, 914]}
    of = torch.stack([logits[:, list(members)].amax(1) for members in kinds.values()], 1)
    counted = torch.isin(records[:, 0], torch.tensor(list(kinds)))
    right = torch.tensor(list(kinds))[of.argmax(1)] == records[:, 0]
    assert right[counted].float().mean() > 0.6
