"""Comparisons as runs that are made once: trials, their ledger, the pool that works on them."""
