"""Published comparisons: the numbers of each paper as data, and a study that repeats the experiments of the paper.

Each paper is a package. Its modules contain the published numbers, the study and the page. The claims of all papers
have one format and one set of rules, in `claims`.
"""
