"""A damaged results folder: never another number, never a traceback; what is whole stays readable."""

from __future__ import annotations

import json
import os
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
from report_records import cost, quality, study, trial, write_folder

from damage import damaged, flipped
from gradcost.core.errors import BadInput
from gradcost.core.notes import Note
from gradcost.report.tables import table
from gradcost.results import ledger
from gradcost.results.facts import facts
from gradcost.results.lint import lint
from gradcost.results.records import Results, read

CURVE = {"step": [1, 2], "loss": [2.0, 1.5], "slope": [], "validation_step": [2], "validation_loss": [1.25]}
SCORES = {"loss": 0.5, "accuracy": 0.875}
LINES = [
    cost("a", 1024, 1.5, "Reverse()"),
    *(trial("a", "tune", lr, curve=CURVE, validation=SCORES) for lr in (0.1, 1.0)),
    *(trial("a", "final", 0.1, seed, curve=CURVE, validation=SCORES, test=SCORES) for seed in (1, 2)),
    quality("a", "Probing()", 2),
    {"schema": 1, "kind": "refused", "method": "b", "estimator": "Probing()", "reason": "no rule"},
]


def sealed_folder(folder: Path) -> Path:
    """A folder as this version writes it, with checksums."""
    folder.mkdir(exist_ok=True)
    ledger.write_document(folder / "study.json", study(["a", "b"]))
    ledger.write_document(folder / "environment.json", {"python": "3.11.9", "threads": 2})
    for line in LINES:
        ledger.append(folder, line)
    return folder


def parts(results: Results) -> set[str]:
    return {
        repr(vars(item)) for group in ("trials", "costs", "refused", "qualities") for item in getattr(results, group)
    }


def test_a_checksum_is_written_and_not_shown(tmp_path: Path):
    folder = sealed_folder(tmp_path)
    assert list(ledger.records(folder)) == LINES
    assert ledger.document(folder / "study.json") == study(["a", "b"])
    for line in (folder / "records.jsonl").read_text().splitlines():
        assert list(json.loads(line))[-1] == "crc", "any JSON reader can still read it"
    assert "crc" in json.loads((folder / "study.json").read_text())


def test_a_folder_without_checksums_stays_readable_and_may_be_continued(tmp_path: Path):
    old = read(write_folder(tmp_path, LINES))
    assert (old.torn, len(old.trials)) == (0, 4)
    ledger.append(tmp_path, trial("a", "final", 0.1, 3))
    new = read(tmp_path)
    assert (new.torn, len(new.trials)) == (0, 5)
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write(json.dumps(trial("a", "final", 0.1, 4)) + "\n")
    edited = read(tmp_path)
    assert (edited.torn_lines, len(edited.trials)) == ((9,), 5), "after a checksum, a line without one is damaged"


@pytest.mark.parametrize("number", [1000, pytest.param(5000, marks=pytest.mark.slow)])
def test_no_damage_to_the_records_changes_a_number(tmp_path: Path, number: int):
    """Before, one in three single bit flips changed a number without a word."""
    folder = sealed_folder(tmp_path)
    path = folder / "records.jsonl"
    content, whole = path.read_bytes(), parts(read(folder))
    chance, torn = random.Random(19), 0
    for _ in range(number):
        path.write_bytes(damaged(content, chance))
        found = read(folder)
        assert parts(found) <= whole
        assert len(parts(found)) == len(whole) or found.torn or path.stat().st_size < len(content)
        torn += found.torn > 0
    print({"damaged files": number, "with damaged lines": torn})
    assert torn > 0.8 * number


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_every_cut_and_bit_of_study_json_is_a_sentence_or_changes_nothing(tmp_path: Path, step: int):
    path = sealed_folder(tmp_path) / "study.json"
    content, whole = path.read_bytes(), ledger.document(path)
    known: dict[str, Any] = {"read": 0, "refused": 0}
    cuts = [content[:at] for at in range(len(content))]
    for changed in (*cuts, *(flipped(content, bit) for bit in range(0, 8 * len(content), step))):
        path.write_bytes(changed)
        try:
            found = ledger.document(path)
        except BadInput as error:
            assert str(path) in str(error)  # noqa: PT017 (not every change raises)
            known["refused"] += 1
        else:
            assert found is not None
            assert {name: item for name, item in found.items() if name in study([])} == whole
            known["read"] += 1
    print(known)
    assert known["read"] < 0.02 * (known["read"] + known["refused"])
    path.write_bytes(content[: content.index(b'"steps"')])
    with pytest.raises(BadInput, match=r"study\.json line \d+ is damaged .* No record is lost: delete it"):
        read(tmp_path)


def test_a_cut_environment_is_a_note_and_nothing_else(tmp_path: Path):
    path = sealed_folder(tmp_path) / "environment.json"
    content, whole = path.read_bytes(), parts(read(tmp_path))
    for at in range(len(content) - 1):
        path.write_bytes(content[:at])
        with pytest.warns(Note, match=r"environment\.json.* is damaged .* nothing is lost"):
            results = read(tmp_path)
        assert results.environment == {}
        assert parts(results) == whole


DEEP = '{"schema":1,"kind":"trial","trial":' + "[" * 100_000 + "]" * 100_000 + "}"
BAD_LINES = {
    "without a trial": {"trial": ...},
    "without a status": {"status": ...},
    "lr is text": {"lr": "0.1"},
    "lr is not finite": {"lr": float("nan")},
    "trial is a list": {"trial": ["a"]},
    "method is null": {"method": None},
    "curve is a number": {"curve": 5},
    "curve is a list": {"curve": [1, 2]},
    "losses are text": {"curve": {"step": [1], "loss": ["x"]}},
    "steps are nested": {"curve": {"step": [[1]], "loss": [1.0]}},
    "validation is a list": {"validation": [1]},
    "accuracy is text": {"validation": {"loss": 1.0, "accuracy": "0.9"}},
    "slopes are text": {"slopes": "many"},
    "environment is a number": {"environment": 3},
    "reason is a number": {"reason": 3},
    "seed is a fraction": {"seed": 0.5},
    "kind is a list": {"kind": ["trial"], "trial": 5},
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_line_that_is_no_record_is_skipped_and_counted(tmp_path: Path, name: str):
    """In a folder without checksums, where such a line is the only sign. The other lines are read."""
    line = {key: item for key, item in {**trial("a"), **BAD_LINES[name]}.items() if item is not ...}
    folder = write_folder(tmp_path, LINES)
    path = folder / "records.jsonl"
    path.write_text(json.dumps(line) + "\n" + path.read_text())
    results = read(folder)
    assert results.torn_lines == ((1,) if name != "kind is a list" else ())
    assert len(results.trials) == 4
    lint(facts(results))
    table(results)


@pytest.mark.parametrize("line", [DEEP, "[1]", "null", '"text"', "\udcff", "{", '{"lr": ' + "9" * 5000 + "}"])
def test_a_line_that_is_no_object_is_skipped(tmp_path: Path, line: str):
    folder = write_folder(tmp_path, LINES)
    with (folder / "records.jsonl").open("ab") as file:
        file.write(line.encode(errors="surrogateescape") + b"\n")
    results = read(folder)
    assert len(results.trials) == 4
    assert results.torn_lines in {(8,), ()}


def test_another_schema_is_a_sentence_with_the_line(tmp_path: Path):
    folder = write_folder(tmp_path, [*LINES, trial("c", schema=2)])
    with pytest.raises(BadInput, match=r"records\.jsonl line 8 has schema 2, but this version of gradcost reads 1"):
        read(folder)


@pytest.mark.parametrize("change", [{"seeds": "x"}, {"steps": "many"}, {"task_name": 5}, {"weights": [3]}], ids=repr)
def test_a_study_json_of_other_types_is_a_sentence(tmp_path: Path, change: dict[str, Any]):
    with pytest.raises(BadInput, match=rf"study\.json is damaged: .* its {next(iter(change))} is"):
        read(write_folder(tmp_path, LINES, **change))


def test_what_is_no_regular_file_is_refused_and_not_read_for_ever(tmp_path: Path):
    for name in ("records.jsonl", "study.json"):
        folder = sealed_folder(tmp_path / name)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(BadInput, match="is not a regular file"):
            read(folder)
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")
        with pytest.raises(BadInput, match="is not a regular file"):
            read(folder)


def test_line_ends_and_a_byte_order_mark_change_nothing(tmp_path: Path):
    folder = sealed_folder(tmp_path)
    whole = read(folder)
    for name in ("records.jsonl", "study.json", "environment.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read(folder)
    assert (parts(found), found.study, found.environment) == (parts(whole), whole.study, whole.environment)
