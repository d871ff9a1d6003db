"""Tasks: data in three splits, a model and a loss. `from_loaders` makes one from your own model and loaders.

`TASKS` maps the names on the command line to the tasks of this package.
"""

from gradcost.tasks.architectures import Architecture, Cnn, Gpt, Logistic, Mlp, Vgg
from gradcost.tasks.charlm import CharLm
from gradcost.tasks.cifar10 import Cifar10
from gradcost.tasks.digits import Digits
from gradcost.tasks.emoji import Emoji
from gradcost.tasks.fashion_mnist import FashionMnist
from gradcost.tasks.hub import AgNews, BoolQ, Gsm8k, Mmlu, MultiRc
from gradcost.tasks.hub_images import TextVqa, VqaV2
from gradcost.tasks.loaders import LoaderTask, from_loaders
from gradcost.tasks.mnist import Mnist
from gradcost.tasks.placed import Placed, placed
from gradcost.tasks.pretrained import CausalLm, Encoder, Lora, Verbalizer
from gradcost.tasks.task import Score, Split, Splits, Task, cross_entropy, score
from gradcost.tasks.texts import Movies, Prompted, TextLm, TextTask, Trec
from gradcost.tasks.vision_language import QwenVl, VisionLanguage
from gradcost.tasks.vqa import Vqa

TASKS: dict[str, type[Task]] = {
    "digits": Digits,
    "mnist": Mnist,
    "fashion_mnist": FashionMnist,
    "cifar10": Cifar10,
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
    "vqa": Vqa,
    "emoji": Emoji,
    "vqav2": VqaV2,
    "textvqa": TextVqa,
}

__all__ = [
    "TASKS",
    "AgNews",
    "Architecture",
    "BoolQ",
    "CausalLm",
    "CharLm",
    "Cifar10",
    "Cnn",
    "Digits",
    "Emoji",
    "Encoder",
    "FashionMnist",
    "Gpt",
    "Gsm8k",
    "LoaderTask",
    "Logistic",
    "Lora",
    "Mlp",
    "Mmlu",
    "Mnist",
    "Movies",
    "MultiRc",
    "Placed",
    "Prompted",
    "QwenVl",
    "Score",
    "Split",
    "Splits",
    "Task",
    "TextLm",
    "TextTask",
    "TextVqa",
    "Trec",
    "Verbalizer",
    "Vgg",
    "VisionLanguage",
    "Vqa",
    "VqaV2",
    "cross_entropy",
    "from_loaders",
    "placed",
    "score",
]
