"""Adapters for other libraries.

Each module needs the extra of the library that it is named after.
"""
