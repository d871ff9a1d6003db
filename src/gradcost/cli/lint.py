"""`gradcost lint`: find what makes a study unfair or inconclusive."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from gradcost.cli import console
from gradcost.core.units import count
from gradcost.results.facts import facts
from gradcost.results.lint import lint, unchecked
from gradcost.results.records import read

STRICT = 3  # exit code with --strict if a finding is an error, or no trial is on record


def lint_folder(folder: Path, strict: bool, as_json: bool) -> int:
    """Print the findings on a results folder, and return the exit code."""
    results = read(folder)
    study_facts = facts(results)
    console.complain_of(results)
    findings, unchecked_rules = lint(study_facts), unchecked(study_facts)
    errors = sum(finding.severity == "error" for finding in findings)
    code = STRICT if strict and (errors or not results.trials) else 0
    if as_json:
        records = [dataclasses.asdict(finding) | {"severity": finding.severity} for finding in findings]
        answer: dict[str, Any] = {"folder": str(folder), "errors": errors, "warnings": len(findings) - errors}
        answer |= {"findings": records, "unchecked": [rule.code for rule in unchecked_rules]}
        console.print_json(answer)
        return code
    rows = [[each.code, each.rule, each.method, f"{each.found}. {each.remedy}"] for each in findings]
    if rows:
        console.show_table(["code", "rule", "method", "finding and remedy"], rows, left=True)
    console.show(f"{count(errors, 'error')}, {count(len(findings) - errors, 'warning')}")
    if unchecked_rules:
        names = ", ".join(f"{rule.code} {rule.name}" for rule in unchecked_rules)
        console.show(f"rules not checked, because the records lack the data: {names}")
    return code
