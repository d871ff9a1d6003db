"""Published comparisons: the numbers of each paper as data, and a study that repeats the experiments of the paper.

Each paper is a package with the modules `table`, `study`, `verdicts` and `page`.
"""
