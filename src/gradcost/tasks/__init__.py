"""Tasks: data in three splits, a model and a loss. Subclass `Task` to train on other data.

`TASKS` maps the names on the command line to the tasks of this package.
"""

from gradcost.tasks.architectures import Architecture, Cnn, Gpt, Logistic, Mlp
from gradcost.tasks.charlm import CharLm
from gradcost.tasks.digits import Digits
from gradcost.tasks.hub import AgNews, BoolQ, Gsm8k, Mmlu, MultiRc
from gradcost.tasks.mnist import Mnist
from gradcost.tasks.pretrained import CausalLm, Encoder, Lora, Verbalizer
from gradcost.tasks.task import Score, Split, Splits, Task, cross_entropy, score
from gradcost.tasks.texts import Movies, Prompted, TextLm, TextTask, Trec

TASKS: dict[str, type[Task]] = {
    "digits": Digits,
    "mnist": Mnist,
    "charlm": CharLm,
    "trec": Trec,
    "movies": Movies,
    "smollm2": Prompted,
    "smollm2-text": TextLm,
    "ag_news": AgNews,
    "boolq": BoolQ,
    "multirc": MultiRc,
    "mmlu": Mmlu,
    "gsm8k": Gsm8k,
}

__all__ = [
    "TASKS",
    "AgNews",
    "Architecture",
    "BoolQ",
    "CausalLm",
    "CharLm",
    "Cnn",
    "Digits",
    "Encoder",
    "Gpt",
    "Gsm8k",
    "Logistic",
    "Lora",
    "Mlp",
    "Mmlu",
    "Mnist",
    "Movies",
    "MultiRc",
    "Prompted",
    "Score",
    "Split",
    "Splits",
    "Task",
    "TextLm",
    "TextTask",
    "Trec",
    "Verbalizer",
    "cross_entropy",
    "score",
]
