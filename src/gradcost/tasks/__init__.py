"""The tasks that come with the package, by the names that the command line takes."""

from gradcost.tasks.charlm import CharLm
from gradcost.tasks.digits import Digits
from gradcost.tasks.mnist import Mnist
from gradcost.tasks.task import Task

TASKS: dict[str, type[Task]] = {"digits": Digits, "mnist": Mnist, "charlm": CharLm}

__all__ = ["TASKS", "CharLm", "Digits", "Mnist", "Task"]
