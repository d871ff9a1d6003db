"""`gradcost lint`: what is unfair or inconclusive in a results folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from gradcost.cli import console
from gradcost.core.units import count
from gradcost.results.facts import facts
from gradcost.results.lint import lint, unchecked
from gradcost.results.records import read

STRICT = 3  # the exit code if there is an error


def lint_folder(folder: Path, strict: bool, as_json: bool) -> int:
    """Print what the rules find in a folder. Returns the exit code."""
    known = facts(read(folder))
    findings, rules = lint(known), unchecked(known)
    errors = sum(finding.severity == "error" for finding in findings)
    code = STRICT if strict and errors else 0
    if as_json:
        records = [dataclasses.asdict(finding) | {"severity": finding.severity} for finding in findings]
        answer = {"folder": str(folder), "errors": errors, "warnings": len(findings) - errors}
        print(json.dumps(answer | {"findings": records, "unlooked": [rule.code for rule in rules]}, indent=2))
        return code
    rows = [[f.code, f.rule, f.method, f"{f.found}. {f.remedy}"] for f in findings]
    if rows:
        console.show_table(["code", "rule", "method", "finding and remedy"], rows, left=True)
    console.show(f"{count(errors, 'error')}, {count(len(findings) - errors, 'warning')}")
    if rules:
        names = ", ".join(f"{rule.code} {rule.name}" for rule in rules)
        console.show(f"not checked, because the records do not contain what they need: {names}")
    return code
