"""Published comparisons: their numbers as data, and studies that repeat them.

Each paper is a package with its table, study, verdicts and page.
"""
