"""Data sets of the hub, from small files of the same columns, and the parsing of generated answers."""

from __future__ import annotations

import json
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from gradcost.core.errors import BadInput
from gradcost.core.key import Key
from gradcost.core.note import Note
from gradcost.studies.task_info import guessing_fields
from gradcost.tasks import hub, hub_rows, pretrained_files
from gradcost.tasks.answers import choice_answer, is_right, number_answer, yes_no_answer
from gradcost.tasks.hub import AgNews, BoolQ, Gsm8k, Mmlu, MultiRc, generate
from gradcost.tasks.hub_rows import divided
from gradcost.tasks.metrics import IGNORED
from gradcost.tasks.pretrained import CausalLm, Encoder, Verbalizer
from gradcost.tasks.sources import DataError
from gradcost.tasks.texts import Prompted
from hub_rows_in_memory import Jsonl

# ---- answers


def test_the_final_number_is_the_answer():
    """A substring test finds "5" in "15 apples ... #### 20" and counts a wrong answer as right."""
    assert number_answer("15 apples and 5 pears are 20. #### 20") == 20
    assert not is_right("15 apples ... #### 20", "#### 5", number_answer)
    assert number_answer("#### 1,234.50 dollars") == Decimal("1234.5")
    assert number_answer("so it costs $-3 or $7.") == 7
    assert number_answer("#### 18\nQuestion: what is 5?") == 18
    assert number_answer("-12") == -12
    assert is_right("the answer is 18.0", "#### 18", number_answer)
    assert number_answer("a #### none") is None


def test_a_hyphen_between_numbers_is_no_sign():
    for text, number in (("from 10-20", 20), ("answer: 5-3", 3), ("10%-20%", 20), ("5 - 3", 3), ("$10-$20", 20)):
        assert number_answer(text) == number
    for text, number in (("#### -20", -20), ("x=-3", -3), ("#### -$5", -5), ("(-7)", -7)):
        assert number_answer(text) == number


def test_a_decimal_number_needs_no_zero_before_its_point():
    for text, number in (("#### .5", "0.5"), ("#### -.25", "-0.25"), ("it is $.75.", "0.75"), ("part 1.2.3", "3")):
        assert number_answer(text) == Decimal(number)
    assert number_answer("it is 3.") == 3
    assert number_answer("we have apples.20 of them") == 20
    assert number_answer("none ...") is None


def test_no_answer_is_never_right():
    """An empty answer scored 1.0 in a published metric."""
    for parse, gold in ((number_answer, "#### 7"), (choice_answer, "B"), (yes_no_answer, "yes")):
        assert parse("") is None
        assert not is_right("", gold, parse)
        assert not is_right("I do not know", gold, parse)
        assert is_right(gold, gold, parse)
    with pytest.raises(ValueError, match="gold text has no answer"):
        is_right("", "", number_answer)


def test_a_choice_is_a_letter_and_not_an_article():
    assert [choice_answer(text) for text in ("B", "(C)", " D. Paris", "A\nQuestion", "The answer is B.")] == list(
        "BCDAB"
    )
    assert [choice_answer(text) for text in ("A dog is shown", "E", "Because", "The answer is a dog")] == [None] * 4
    assert choice_answer("A man. The answer: (D)") == "D"


def test_yes_and_no_are_first_words():
    assert [yes_no_answer(text) for text in ("Yes, it is", "no.", "  NO", "nothing", "maybe yes")] == [
        True,
        False,
        False,
        None,
        None,
    ]


# ---- data sets

NEWS = [{"text": f"a b {number}", "label": number % 4} for number in range(40)]
ROWS: dict[type[Any], tuple[dict[str, Any], str, int]] = {
    AgNews: ({"text": "a b c", "label": 2}, "a b c", 2),
    BoolQ: ({"question": "is a b", "passage": "a c", "answer": True}, "is a b?\na c", 1),
    MultiRc: ({"paragraph": "a b", "question": "who ?", "answer": "c", "label": 0}, "who ? c\na b", 0),
    Mmlu: (
        {"question": "what ?", "choices": ["a", "b", "c", "d"], "answer": 3},
        "what ?\nA. a\nB. b\nC. c\nD. d",
        3,
    ),
}
GROUPS = {AgNews: "text", BoolQ: "passage", MultiRc: "paragraph"}
FILES = {AgNews: ("train", "test"), BoolQ: ("train", "validation"), MultiRc: ("train", "validation")} | {
    Mmlu: ("auxiliary_train", "validation", "test")
}


def folder_of(path: Path, names: tuple[str, ...], rows: list[dict[str, Any]]) -> str:
    for name in names:
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return `datasets` with its cache in a temporary folder, or a stand-in that reads jsonl files alone."""
    try:
        import datasets.config
    except ImportError:
        return monkeypatch.setattr(hub_rows, "require", lambda *_: Jsonl)
    return monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("kind", ROWS, ids=lambda kind: kind.__name__)
def test_the_columns_of_the_hub_become_texts_and_labels(kind: type[Any], tmp_path: Path, library: Any):
    row, text, label = ROWS[kind]
    group = GROUPS.get(kind, "question")
    rows = [{**row, group: f"{row[group]} {number}"} for number in range(20)]
    task = kind(source=folder_of(tmp_path, FILES[kind], rows))
    splits = task.texts()
    found = {(one, other) for part in splits for one, other in zip(part.texts, part.labels, strict=True)}
    assert found == {(text.replace(row[group], each[group]), label) for each in rows}
    assert task.texts is kind(source=task.source, batch=1).texts
    assert len(splits.test.texts) == 20
    held_out = 0 if kind is Mmlu else 2  # a tenth of the training split, where there is no third one
    assert len(splits.train.texts) == 20 - held_out
    assert len(splits.validation.texts) == (held_out or 20)


def test_the_choices_of_a_long_question_stay(tmp_path: Path, library: Any):
    for name in ("model", "data"):
        (tmp_path / name).mkdir()
    weights, (row, _, _) = tiny_models.causal(tmp_path / "model"), ROWS[Mmlu]
    source = folder_of(tmp_path / "data", FILES[Mmlu], [row | {"question": "a b c d e f what ?"}] * 2)
    task = Prompted(Mmlu(source=source), Verbalizer(CausalLm(weights), Mmlu.words), length=12)
    decode = pretrained_files.tokenizer(weights).decode
    assert decode(task.splits().train.x[0]) == "f what ? [UNK] a [UNK] b [UNK] c [UNK] d [UNK]"


def test_a_validation_split_is_taken_from_the_training_split(tmp_path: Path, library: Any):
    task = AgNews(source=folder_of(tmp_path, ("train", "test"), NEWS))
    train, validation, _ = task.texts()
    assert len(validation.texts) == 4
    assert sorted(train.texts + validation.texts) == sorted(row["text"] for row in NEWS)


@pytest.mark.parametrize("kind", [BoolQ, MultiRc])
def test_rows_that_belong_together_are_in_one_split(kind: type[Any], tmp_path: Path, library: Any):
    """All paragraphs of a validation split of MultiRC were once in the training split, too."""
    row, _, _ = ROWS[kind]
    rows = [row | {GROUPS[kind]: f"group{place % 20}", "question": str(place)} for place in range(100)]
    train, validation, test = kind(source=folder_of(tmp_path, FILES[kind], rows)).texts()
    groups = [{text.rpartition("\n")[2] for text in part.texts} for part in (train, validation)]
    assert not groups[0] & groups[1]
    assert [len(part.texts) for part in (train, validation, test)] == [90, 10, 100]


def test_groups_are_divided_by_a_fixed_permutation():
    groups = [place // 3 for place in range(30)]
    first, second = divided(groups, 4)
    assert len(second) == 4
    assert len(first) == 24, "the rest of the second group is in no part"
    assert not {groups[place] for place in first} & {groups[place] for place in second}
    assert divided(groups, 4) == (first, second)
    assert [len(part) for part in divided([None] * 30, 4)] == [26, 4], "rows without a group do not belong together"


def test_a_task_of_the_hub_has_tokens(tmp_path: Path, library: Any):
    (tmp_path / "model").mkdir()
    (tmp_path / "data").mkdir()
    weights = tiny_models.encoder(tmp_path / "model")
    task = AgNews(Encoder(weights), 4, 8, folder_of(tmp_path / "data", ("train", "test"), NEWS))
    assert task.batch_at(Key(1), 0).x.shape == (4, 8)
    assert task.objective(Key(1)).evaluate(task.batch_at(Key(1), 0), Key(1)).isfinite()


def test_what_the_hub_cannot_give_is_explained(tmp_path: Path, library: Any):
    with pytest.raises(DataError, match=r"holds no \.jsonl file: .* train\.jsonl and test\.jsonl"):
        AgNews(source=str(tmp_path)).texts()
    with pytest.raises(DataError, match="has no split 'test'; it has train"):
        AgNews(source=folder_of(tmp_path, ("train",), NEWS)).texts()
    with pytest.raises(DataError, match="has no column 'passage', whose equal values mark rows"):
        BoolQ(source=folder_of(tmp_path, ("train", "validation"), NEWS)).texts()
    with pytest.raises(DataError, match=r"the split 'train' of .* has too few rows for a validation split"):
        AgNews(source=folder_of(tmp_path, ("train", "test"), NEWS[:9])).texts()
    (tmp_path / "test.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"no row in test\.jsonl: put one JSON object on each line"):
        AgNews(source=str(tmp_path)).texts()


# ---- GSM8K


@pytest.fixture
def problems(tmp_path: Path, library: Any) -> Gsm8k:
    (tmp_path / "model").mkdir()
    (tmp_path / "data").mkdir()
    rows = [{"question": "what is a", "answer": "a b #### 1"}, {"question": "who", "answer": "c #### 2"}] * 10
    rows += [{"question": "a " * 50, "answer": "#### 3"}]
    weights = tiny_models.causal(tmp_path / "model")
    source = folder_of(tmp_path / "data", ("train", "test"), rows)
    return Gsm8k(CausalLm(weights), batch=3, length=16, source=source)


def test_only_the_answer_counts_and_long_examples_are_left_out(problems: Gsm8k):
    with pytest.warns(Note, match="Problems that do not fit into 16 tokens are left out: .*, 1 of 21 for test"):
        test = problems.splits().test
    decode = pretrained_files.tokenizer(problems.model.weights).decode  # pyright: ignore[reportAttributeAccessIssue]
    assert test.x.shape == test.y.shape == (20, 16)
    assert decode(test.y[0][test.y[0] != IGNORED]) == "a b #### 1 [END]"
    assert decode(test.y[1][test.y[1] != IGNORED]) == "c #### 2 [END]"
    counted = test.y != IGNORED
    after = torch.cat([test.x[:, 1:], test.x[:, :1]], 1)
    assert (after == test.y)[counted].all(), "y is x shifted by one token"


def test_generated_answers_are_parsed(problems: Gsm8k, monkeypatch: pytest.MonkeyPatch):
    model = problems.objective(Key(1)).model
    split = problems.splits().test
    monkeypatch.setattr(hub, "generate", lambda model, prompts, encode, tokens: ["1 2 #### 1"] * len(prompts))
    found = problems.score(model, split)
    assert found.accuracy == 0.5
    assert found.loss > 0
    assert 0 <= found.token_accuracy <= 1


def test_the_share_of_the_most_frequent_answer_is_recorded(problems: Gsm8k):
    assert guessing_fields(problems)["majority"] == 0.5


def test_the_longest_gold_answer_can_be_generated(problems: Gsm8k, monkeypatch: pytest.MonkeyPatch):
    """With at most 128 tokens, a perfect model once scored 0.75 on the official test split."""
    split = problems.splits().test
    gold = {"what": "a b #### 1", "who": "c #### 2"}

    def perfect(model: Any, prompts: list[torch.Tensor], encode: Any, tokens: int) -> list[str]:
        answers = (gold["what" if "what" in encode.decode(prompt) else "who"] for prompt in prompts)
        return [encode.decode(encode(answer)["input_ids"][:tokens]) for answer in answers]

    monkeypatch.setattr(hub, "generate", perfect)
    model = problems.objective(Key(1)).model
    assert problems.score(model, split).accuracy == 1.0
    assert replace(problems, generated=3).score(model, split).accuracy == 0.5


def test_a_continuation_does_not_depend_on_the_other_prompts_of_its_batch(problems: Gsm8k):
    """With padding on the right, short prompts are continued after their padding."""
    model = problems.objective(Key(1)).model
    encode = pretrained_files.tokenizer(problems.model.weights)  # pyright: ignore[reportAttributeAccessIssue]
    prompts = [torch.tensor(encode(text)["input_ids"]) for text in ("a b c d e f who what", "b", "c d")]
    together = generate(model, prompts, encode, 6)
    assert together == [generate(model, [prompt], encode, 6)[0] for prompt in prompts]
    assert len(set(together)) > 1
    assert model.training


def test_gsm8k_needs_a_language_model_and_short_examples(problems: Gsm8k):
    with pytest.raises(BadInput, match="causal language model"):
        Gsm8k(Encoder()).splits()
    with pytest.raises(BadInput, match="no example of"):
        Gsm8k(problems.model, 3, 4, 5, problems.source).splits()
