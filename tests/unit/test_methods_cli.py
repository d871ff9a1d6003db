"""`gradcost methods`: the text of each method is its docstring, and every preset says all there is to ask."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
from test_cli import inside

from gradcost.cli import spec
from gradcost.cli.methods import SECTIONS, entry, sections

PRESETS = spec.presets()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_formula_and_every_section_in_order(name: str):
    told = sections(PRESETS[name])
    assert "g = " in told[""] or "g_W = " in told[""]
    assert tuple(section for section in told if section not in ("Args", "Returns", "Raises")) == ("", *SECTIONS)
    assert all(told.values())
    assert told["Law"].startswith(("unbiased", "biased: "))
    assert "forward" in told["Cost"]
    assert any(year in told["Source"] for year in map(str, range(1980, 2030)))
    for text in told.values():
        assert text.endswith(".")


def test_no_text_is_lost_or_written_twice():
    for preset in PRESETS.values():
        words = " ".join((inspect.getdoc(preset) or "").split())
        told = sections(preset)
        assert " ".join([told[""], *(f"{name}: {text}" for name, text in told.items() if name)]) == words


def test_a_part_is_told_of_by_its_docstring(tmp_path: Path):
    ran = inside("methods", "CentralDifference", folder=tmp_path)
    assert ran.returncode == 0
    assert (inspect.getdoc(spec.names("method")["CentralDifference"]) or "") in ran.stdout
    found = json.loads(inside("methods", "CentralDifference", "--json", folder=tmp_path).stdout)
    assert found["kind"] == "slope"
    assert "Spall 1992" in found["text"]


def test_the_list_has_a_row_a_preset_and_one_a_part(tmp_path: Path):
    ran = inside("methods", folder=tmp_path)
    assert ran.returncode == 0
    lines = ran.stdout.splitlines()
    assert lines[0].split() == ["method", "law", "cost", "memory", "source"]
    for name in spec.names("method"):
        assert any(f"{name}(" in line for line in lines), name
    found = json.loads(inside("methods", "--json", folder=tmp_path).stdout)
    assert {one["name"] for one in found} == set(spec.names("method"))
    kinds = {one["name"]: one["kind"] for one in found}
    assert kinds["mezo"] == "preset"
    assert kinds["Jvp"] == "slope"
    assert kinds["Probing"] == "estimator"
    assert kinds["LowRank"] == kinds["Masked"] == "directions"
    assert next(one for one in found if one["name"] == "mezo") == entry("mezo", PRESETS["mezo"])


@pytest.mark.parametrize("written", ["mezo", "mezo()", "mezo(probes=4)"])
def test_one_is_explained_however_it_is_written(tmp_path: Path, written: str):
    ran = inside("methods", written, folder=tmp_path)
    assert ran.returncode == 0
    for said in ("mezo(eps=0.001, probes=1)", "2 forwards per probe", "arXiv 2305.17333", "Probing(slope=Central"):
        assert said in ran.stdout
    for section in SECTIONS:
        assert section.lower() in ran.stdout


def test_an_unknown_name_gets_a_hint(tmp_path: Path):
    ran = inside("methods", "meso", folder=tmp_path)
    assert ran.returncode == 2
    assert "Did you mean mezo" in ran.stderr
    assert len(ran.stderr.splitlines()) == 1
