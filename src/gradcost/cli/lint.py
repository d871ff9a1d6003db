"""`gradcost lint`: what is unfair in a results folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from gradcost.cli import console
from gradcost.core.units import count
from gradcost.results.facts import facts
from gradcost.results.lint import lint, unlooked
from gradcost.results.records import read

STRICT = 3  # the exit code for an error that was found


def lint_folder(folder: Path, strict: bool, as_json: bool) -> int:
    """Show what the rules find in a folder. Returns the exit code.

    Raises: ValueError when it is no results folder.
    """
    known = facts(read(folder))
    findings, blind = lint(known), unlooked(known)
    errors = sum(finding.severity == "error" for finding in findings)
    code = STRICT if strict and errors else 0
    if as_json:
        told = [dataclasses.asdict(finding) | {"severity": finding.severity} for finding in findings]
        answer = {"folder": str(folder), "errors": errors, "warnings": len(findings) - errors}
        print(json.dumps(answer | {"findings": told, "unlooked": [rule.code for rule in blind]}, indent=2))
        return code
    rows = [[f.code, f.rule, f.method, f"{f.found}. {f.remedy}"] for f in findings]
    if rows:
        console.show_table(["code", "rule", "method", "what was found, and what to do"], rows, left=True)
    console.show(f"{count(errors, 'error')}, {count(len(findings) - errors, 'warning')}")
    if blind:
        named = ", ".join(f"{rule.code} {rule.name}" for rule in blind)
        console.show(f"not looked at, for the records do not tell: {named}")
    return code
