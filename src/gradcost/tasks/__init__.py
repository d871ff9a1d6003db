"""Tasks: data in three splits, a model and a loss. Subclass `Task` to train on other data.

`TASKS` maps the names on the command line to the tasks of this package.
"""

from gradcost.tasks.architectures import Architecture, Cnn, Gpt, Logistic, Mlp, Vgg
from gradcost.tasks.charlm import CharLm
from gradcost.tasks.cifar10 import Cifar10
from gradcost.tasks.digits import Digits
from gradcost.tasks.fashion_mnist import FashionMnist
from gradcost.tasks.mnist import Mnist
from gradcost.tasks.task import Score, Split, Splits, Task, cross_entropy, score

TASKS: dict[str, type[Task]] = {
    "digits": Digits,
    "mnist": Mnist,
    "fashion_mnist": FashionMnist,
    "cifar10": Cifar10,
    "charlm": CharLm,
}

__all__ = [
    "TASKS",
    "Architecture",
    "CharLm",
    "Cifar10",
    "Cnn",
    "Digits",
    "FashionMnist",
    "Gpt",
    "Logistic",
    "Mlp",
    "Mnist",
    "Score",
    "Split",
    "Splits",
    "Task",
    "Vgg",
    "cross_entropy",
    "score",
]
