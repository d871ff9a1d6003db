"""Tasks: data in three splits, a model and a loss. Subclass `Task` to train on other data.

`TASKS` maps the names on the command line to the tasks of this package.
"""

from gradcost.tasks.architectures import Architecture, Cnn, Gpt, Logistic, Mlp
from gradcost.tasks.charlm import CharLm
from gradcost.tasks.digits import Digits
from gradcost.tasks.mnist import Mnist
from gradcost.tasks.task import Score, Split, Splits, Task, cross_entropy, score

TASKS: dict[str, type[Task]] = {"digits": Digits, "mnist": Mnist, "charlm": CharLm}

__all__ = [
    "TASKS",
    "Architecture",
    "CharLm",
    "Cnn",
    "Digits",
    "Gpt",
    "Logistic",
    "Mlp",
    "Mnist",
    "Score",
    "Split",
    "Splits",
    "Task",
    "cross_entropy",
    "score",
]
