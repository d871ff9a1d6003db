"""The command line: parse arguments, call one public function, print what it returns.

Nothing here computes.
"""
