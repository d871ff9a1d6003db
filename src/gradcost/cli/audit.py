"""`gradcost audit`: run the laws on a gradient function of another package."""

from __future__ import annotations

from gradcost.checks.audit import audit
from gradcost.cli import console, spec
from gradcost.cli.check import show
from gradcost.cli.options import AuditOptions
from gradcost.core.key import Key


def audit_function(options: AuditOptions) -> int:
    """Print the report of a gradient function, and return the exit code."""
    function = spec.named(options.function, "FUNCTION")
    with console.status(f"auditing {options.function}"):
        report = audit(function, Key(0), options.draws, options.function)
    if options.as_json:
        console.print_json(report.record())
    else:
        show(report)
    return 1 if report.failed else 0
