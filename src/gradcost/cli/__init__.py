"""The command line. Each command parses its arguments, calls one public function and prints the result.

No module of this package computes results itself.
"""
