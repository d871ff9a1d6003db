"""Tasks: splits, batches as functions of a key, scores and models."""

from __future__ import annotations

import hashlib
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradcost.core.errors import MissingExtra
from gradcost.core.key import Key
from gradcost.estimators.presets import backprop, checkpointed
from gradcost.planning.forecast import forecast
from gradcost.tasks import (
    TASKS,
    CharLm,
    Cifar10,
    Digits,
    FashionMnist,
    Mnist,
    Task,
    architectures,
    catalogue,
    charlm,
    cifar10,
    digits,
    idx_images,
    pretrained,
    vision_language,
)
from gradcost.tasks.architectures import Cnn, Gpt, Logistic, Mlp, Vgg
from gradcost.tasks.cifar10_png import write_batch
from gradcost.tasks.data import Dataset
from gradcost.tasks.idx import read_idx
from gradcost.tasks.sources import DataError, Piece
from gradcost.tasks.task import Batch, Score, Split, cross_entropy, score

SMALL = Gpt(layers=1, width=16, heads=2)
LOCAL = [
    Digits(),
    Digits(model=Logistic(), batch=100),
    CharLm(model=SMALL),
    CharLm(SMALL, batch=8, length=32),
]


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_task_is_a_value_with_models_for_the_command_line(name):
    task = TASKS[name]()
    names = (
        vars(architectures)
        | vars(pretrained)
        | vars(vision_language)
        | {kind.__name__: kind for kind in TASKS.values()}
    )
    assert eval(repr(task), names) == task
    assert task.model in task.models.values()
    assert len({task, TASKS[name](), TASKS[name](batch=3)}) == 2  # pyright: ignore[reportCallIssue]
    assert all(eval(repr(model), names) == model for model in task.models.values())


@pytest.mark.parametrize("task", LOCAL, ids=repr)
def test_a_task_agrees_with_itself(task: Task):
    splits = task.splits()
    assert splits is task.splits(), "the data are loaded once"
    for split in splits:
        assert len(split.x) == len(split.y) > 0
        assert split.x.shape[1:] == task.inputs
        assert split.y.dtype == torch.int64
        assert 0 <= split.y.min() <= split.y.max() < task.classes
    batch = task.batch_at(Key(0), 0)
    objective = task.objective(Key(0))
    logits = objective.model(batch.x)
    assert logits.shape == (*batch.y.shape, task.classes)
    loss = objective.evaluate(batch, Key(1))
    assert loss == cross_entropy(objective.model, batch)
    assert abs(loss.item() - torch.tensor(float(task.classes)).log().item()) < 0.5


@pytest.mark.parametrize("task", LOCAL[:3], ids=repr)
def test_the_initial_weights_are_a_function_of_the_key(task: Task):
    before = torch.get_rng_state()
    first = weights(task.objective(Key(3)).model)
    torch.rand(5)
    assert torch.equal(first, weights(task.objective(Key(3)).model))
    assert not torch.equal(first, weights(task.objective(Key(4)).model))
    torch.set_rng_state(before)
    task.objective(Key(3))
    assert torch.equal(before, torch.get_rng_state())


def same(one: Batch, other: Batch) -> bool:
    return torch.equal(one.x, other.x) and torch.equal(one.y, other.y)


def test_a_batch_is_a_function_of_the_key_and_the_step():
    task = Digits()
    steps = [0, 17, 18, 500, 3]
    forwards = {step: task.batch_at(Key(1), step) for step in steps}
    for step in reversed(steps):
        task.batch_at(Key(2), step + 1)
        assert same(task.batch_at(Key(1), step), forwards[step])
    assert not same(task.batch_at(Key(1), 0), task.batch_at(Key(2), 0))


def test_an_epoch_has_no_example_twice_and_its_own_order():
    task = CharLm(SMALL, batch=64)
    train = task.splits().train
    place = {tuple(row): index for index, row in enumerate(train.x.tolist())}
    assert len(place) == len(train.x), "all windows of the text differ"
    per_epoch = task.steps_per_epoch
    assert per_epoch == len(train.x) // 64

    def epoch(number: int) -> list[int]:
        steps = range(number * per_epoch, (number + 1) * per_epoch)
        return [place[tuple(row)] for step in steps for row in task.batch_at(Key(0), step).x.tolist()]

    first, second = epoch(0), epoch(1)
    assert len(set(first)) == len(first) == per_epoch * 64
    assert len(set(second)) == len(second)
    assert first != second


def test_a_batch_that_does_not_fit_is_refused():
    assert len(Digits(batch=1197).batch_at(Key(0), 5).x) == 1197
    for size in (0, 1198):
        with pytest.raises(ValueError, match="choose 1 to 1197"):
            Digits(batch=size).batch_at(Key(0), 0)
    with pytest.raises(ValueError, match="steps count from 0"):
        Digits().batch_at(Key(0), -1)


@pytest.mark.parametrize("task", [Digits(), CharLm(model=SMALL)], ids=repr)
def test_a_score_is_the_mean_over_the_split(task: Task):
    model = task.objective(Key(0)).model
    split = task.splits().train
    assert len(split.x) > 1000, "more than one chunk"
    with torch.no_grad():
        logits = model(split.x).double()
    result = score(model, split)
    expected = F.cross_entropy(logits.flatten(0, -2), split.y.flatten()).item()
    assert result.loss == pytest.approx(expected, rel=1e-6)
    assert result.accuracy == pytest.approx((logits.argmax(-1) == split.y).double().mean().item(), abs=1e-4)


def test_a_score_does_not_depend_on_the_order():
    model = Digits().objective(Key(0)).model
    x, y = Digits().splits().train
    assert score(model, Split(x.flip(0), y.flip(0))) == pytest.approx(score(model, Split(x, y)), rel=1e-6)


def test_a_score_uses_evaluation_mode_and_restores_every_mode():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10), nn.Dropout(0.9))
    model[3].eval()
    split = Digits().splits().validation
    assert score(model, split) == score(model, split), "dropout is off"
    assert [module.training for module in model.modules()] == [True, True, True, True, False]
    with pytest.raises(RuntimeError):
        score(model, Split(split.x[:, :, :4], split.y))
    assert [module.training for module in model.modules()] == [True, True, True, True, False]
    with pytest.raises(ValueError, match="empty split"):
        score(model, Split(split.x[:0], split.y[:0]))
    with pytest.raises(ValueError, match="all targets are -100, which are ignored"):
        score(model, Split(split.x, torch.full_like(split.y, -100)))


def test_a_score_of_certain_models_is_exact():
    class Echo(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.one_hot(x.long(), 4) * 1000.0

    y = torch.arange(2500) % 4
    assert score(Echo(), Split(y, y)) == Score(0.0, 1.0, 2500)
    assert score(Echo(), Split(y, (y + 1) % 4)) == Score(1000.0, 0.0, 2500)


def test_digits_are_dealt_out_once():
    splits = Digits().splits()
    assert [len(split.x) for split in splits] == [1197, 300, 300]
    assert splits.train.x.dtype == torch.float32
    assert splits.train.x.shape[1:] == (1, 8, 8)
    assert (splits.train.x.min(), splits.train.x.max()) == (0, 1)
    rows = torch.cat([split.x for split in splits]).flatten(1).unique(dim=0)
    assert len(rows) == 1797, "no image is in two splits"
    assert all(split.y.unique().numel() == 10 for split in splits)
    digest = hashlib.md5(b"".join(bytes(split.y.tolist()) for split in splits)).hexdigest()
    assert digest == "9edc5738467946e2a571732d213e8335", (
        "the split has changed, and with it every number measured on it"
    )


def test_digits_without_scikit_learn_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    digits._splits.cache_clear()
    with pytest.raises(MissingExtra, match=r'pip install "gradcost\[tasks\]"'):
        Digits().splits()


def write_tiny_images(folder: Path) -> tuple[Piece, ...]:
    """Write thirty training and five test images in MNIST's format; return the files with their MD5s."""
    folder.mkdir()
    pieces = []
    for part, count in (("train", 30), ("t10k", 5)):
        pixels = bytes(index % 256 for index in range(count * 784))
        labels = bytes(index % 10 for index in range(count))
        for name, content in (
            (f"{part}-images-idx3-ubyte", struct.pack(">4i", 2051, count, 28, 28) + pixels),
            (f"{part}-labels-idx1-ubyte", struct.pack(">2i", 2049, count) + labels),
        ):
            (folder / name).write_bytes(content)
            pieces.append(Piece(name, hashlib.md5(content).hexdigest()))
    return tuple(pieces)


@pytest.fixture(params=[Mnist, FashionMnist], ids=["mnist", "fashion_mnist"])
def tiny_images(request, tmp_path, monkeypatch):
    """A task with 35 images, and the folder of its files."""
    kind = request.param
    monkeypatch.setenv("GRADCOST_CACHE", str(tmp_path))
    folder = tmp_path / kind.dataset.name
    monkeypatch.setattr(kind, "dataset", Dataset(kind.dataset.name, write_tiny_images(folder), (), "none"))
    monkeypatch.setattr(idx_images, "TRAIN", 20)
    idx_images._splits.cache_clear()
    yield kind(), folder
    idx_images._splits.cache_clear()


def test_mnist_and_fashion_mnist_read_the_idx_files(tiny_images):
    splits = tiny_images[0].splits()
    assert [len(split.x) for split in splits] == [20, 10, 5]
    assert splits.train.x.shape == (20, 1, 28, 28)
    assert splits.train.x.dtype == torch.float32
    flat = torch.cat([splits.train.x, splits.validation.x]).flatten()
    assert torch.equal(flat, (torch.arange(30 * 784) % 256) / 255)
    assert splits.validation.y.tolist() == [index % 10 for index in range(20, 30)]
    assert splits.test.y.dtype == torch.int64


def test_an_idx_file_has_the_shape_of_its_header(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(struct.pack(">4i", 2051, 2, 3, 1) + bytes(range(6)))
    assert torch.equal(read_idx(path), torch.arange(6, dtype=torch.uint8).reshape(2, 3, 1))
    for content, message in (
        (struct.pack(">2i", 2049, 7) + bytes(6), r"6 elements, but its header states \(7,\)"),
        (struct.pack(">2i", 0x0D01, 1) + bytes(4), "not an IDX file of unsigned bytes"),
        (b"\0\0", "not an IDX file"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_idx(path)


def test_a_damaged_file_is_refused_but_none_is_needed_for_the_shape(tiny_images):
    task, folder = tiny_images
    (folder / "t10k-labels-idx1-ubyte").write_bytes(b"cut")
    with pytest.raises(DataError, match=rf"t10k-labels-idx1-ubyte is damaged.*gradcost data fetch {folder.name}"):
        task.splits()
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=f"gradcost data fetch {folder.name}"):
        task.splits()
    assert task.objective(Key(0)).dimension == 784 * 1024 + 1024 + 1024 * 1024 + 1024 + 1024 * 10 + 10


def test_cifar10_reads_planes_of_colours(tmp_path, monkeypatch):
    """Two images per file. The value of a pixel tells its file, its image and its colour."""
    monkeypatch.setenv("GRADCOST_CACHE", str(tmp_path))
    folder = tmp_path / "cifar10"
    folder.mkdir()
    pieces = []
    for file, piece in enumerate(catalogue.CIFAR10.pieces):
        images = np.array([[[30 * file + 3 * image + colour for colour in range(3)]] * 1024 for image in range(2)])
        write_batch(folder / piece.name, images.astype(np.uint8), [file, 9 - file])
        pieces.append(Piece(piece.name, hashlib.md5((folder / piece.name).read_bytes()).hexdigest()))
    monkeypatch.setattr(catalogue, "CIFAR10", Dataset("cifar10", tuple(pieces), (), "none"))
    cifar10._splits.cache_clear()
    splits = Cifar10().splits()
    cifar10._splits.cache_clear()
    assert [tuple(split.x.shape) for split in splits] == [(8, 3, 32, 32), (2, 3, 32, 32), (2, 3, 32, 32)]
    assert splits.train.y.tolist() == [0, 9, 1, 8, 2, 7, 3, 6]
    assert (splits.validation.y.tolist(), splits.test.y.tolist()) == ([4, 5], [5, 4])
    expected = torch.tensor([[30 * 4 + 3 * image + colour for colour in range(3)] for image in range(2)]) / 255
    assert torch.equal(splits.validation.x, expected[:, :, None, None].expand(2, 3, 32, 32))


def test_the_activations_of_the_long_gpt_dominate():
    """They are the reason to avoid backprop. Checkpointing removes most of them."""
    task = CharLm(CharLm.models["gpt-long"], length=512)
    objective, batch = task.objective(Key(0)), task.batch_at(Key(0), 0)
    weights = sum(parameter.nbytes for parameter in objective.model.parameters())
    activations = forecast(backprop(), objective, batch).breakdown["saved activations"]
    assert activations >= 100 * weights
    assert forecast(checkpointed(), objective, batch).beyond <= activations / 3


def test_charlm_windows_follow_each_other():
    task = CharLm(length=50)
    text = charlm.plain_text("")
    assert len(text) == 169_034
    assert text.isascii()
    assert text.startswith("Call me Ishmael.")
    assert task.classes == 74
    alphabet = sorted(set(text))

    def read(tokens: torch.Tensor) -> str:
        return "".join(alphabet[token] for token in tokens.flatten().tolist())

    start = 0
    for split, end in zip(task.splits(), (152_130, 160_582, 169_034), strict=True):
        assert len(split.x) == (end - start - 1) // 50
        assert read(split.x) == text[start : start + split.x.numel()]
        assert read(split.y) == text[start + 1 : start + 1 + split.y.numel()]
        start = end


def test_charlm_reads_another_text_and_refuses_an_unusable_one(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("añb" * 1000, encoding="utf-8")
    task = CharLm(SMALL, length=10, text=str(path))
    assert task.classes == 3
    assert task.splits().test.x.shape == (14, 10)
    with pytest.raises(ValueError, match=r"none\.txt.*cannot be read \(No such file"):
        CharLm(text=str(tmp_path / "none.txt")).splits()
    with pytest.raises(ValueError, match="too short"):
        CharLm(length=150, text=str(path)).splits()
    (tmp_path / "latin.txt").write_bytes("añb".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8"):
        CharLm(text=str(tmp_path / "latin.txt")).classes
    for name in ("/dev/zero", str(tmp_path), "a\0b", "~nobody-of-this-name/text"):
        with pytest.raises(ValueError, match="cannot be read"):
            CharLm(text=name).splits()
    with pytest.raises(ValueError, match="at least 1 character"):
        CharLm(length=0)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_sizes_of_the_models():
    assert count(Logistic().build((1, 8, 8), 10)) == 650
    assert count(Mlp((32, 16)).build((1, 8, 8), 10)) == 64 * 32 + 32 + 32 * 16 + 16 + 16 * 10 + 10
    convolutions = (9 * 64 + 64) + 3 * (9 * 64 * 64 + 64)
    assert count(Cnn().build((1, 28, 28), 10)) == convolutions + 1024 * 1024 + 1024 + 1024 * 10 + 10
    with torch.device("meta"):
        large = Gpt(layers=6, width=384, heads=6).build((256,), 65)
    assert 10.5e6 < count(large) < 11.5e6
    assert not list(large.buffers())


def test_the_vgg_is_that_of_the_paper_and_its_width_scales_all_layers():
    assert count(Vgg().build((3, 32, 32), 10)) == 17_967_690
    for width in (1, 16):
        weights = [weight for weight in Vgg(width).build((3, 32, 32), 10).parameters() if weight.dim() > 1]
        assert [len(weight) for weight in weights] == [factor * width for factor in (1, 1, 2, 2, 4, 4, 64)] + [10]
    assert Vgg(2).build((1, 8, 13), 5)(torch.zeros(2, 1, 8, 13)).shape == (2, 5)


def test_the_cnn_takes_other_images():
    assert Cnn(channels=4, dense=8).build((3, 16, 21), 5)(torch.zeros(2, 3, 16, 21)).shape == (2, 5)


def test_the_gpt_is_causal_and_ties_its_head():
    model = Gpt(layers=2, width=16, heads=4).build((12,), 7).eval()
    tokens = torch.arange(12)[None] % 7
    changed = tokens.clone()
    changed[0, 6:] = 3
    one, other = model(tokens), model(changed)
    assert torch.equal(one[:, :6], other[:, :6])
    assert not torch.allclose(one[:, 6:], other[:, 6:])
    assert torch.allclose(model(tokens[:, :5]), one[:, :5], atol=1e-6)
    names = [name for name, _ in model.named_parameters()]
    assert "tokens.weight" in names
    assert "head.weight" not in names
    with pytest.raises(ValueError, match="sequence has 13 tokens and this model has positions for 12"):
        model(torch.zeros(1, 13, dtype=torch.int64))


def test_the_gpt_drops_out_only_in_training():
    model = Gpt(layers=1, width=16, heads=2, dropout=0.5).build((8,), 5)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Mlp(()), r"Logistic\(\) has no hidden layer"),
        (lambda: Mlp([64]), "must be a tuple"),  # type: ignore[arg-type]
        (lambda: Mlp((64, 0)), r"hidden\[1\] of Mlp must be a positive whole number, not 0"),
        (lambda: Cnn(channels=0), "channels of Cnn must be a positive whole number, not 0"),
        (lambda: Gpt(width=30, heads=4), "not 30: use 32"),
        (lambda: Gpt(layers=0), "layers of Gpt must be a positive whole number, not 0"),
        (lambda: Gpt(dropout=1.0), r"below 1, not 1\.0"),
        (lambda: Cnn().build((1, 8, 8), 10), "at least 16 x 16"),
        (lambda: Cnn().build((64,), 10), "at least 16 x 16"),
        (lambda: Vgg(width=0), "width of Vgg must be a positive whole number, not 0"),
        (lambda: Vgg().build((3, 7, 8), 10), "at least 8 x 8"),
        (lambda: Gpt().build((1, 8, 8), 10), "needs sequences"),
    ],
)
def test_an_impossible_model_is_refused_in_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
