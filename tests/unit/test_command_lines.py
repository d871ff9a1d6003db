"""Random command lines: each ends within a minute of CPU with a documented exit code; none prints a traceback."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import typer
from report_records import write_folder
from typer.testing import CliRunner

from gradcost.cli.main import app

SECONDS = 60
NUMBER = 50  # in each of ten parts
CODES = {0, 1, 2, 4, 130}
DRY = ("compare", "study", "reproduce")  # these train for minutes, so that they get --dry-run here
LEFT_OUT = ("data",)  # it downloads
USUAL = {"study": "small.py", "check": "mezo()", "reproduce": "baydin2022", "compare": "mezo()", "init": "new"}
VALUES = (
    *("backprop()", "mezo(eps=1)", "mezo", "fzoo(probes=3)", "Clipped(mezo())", "mezo(", "os.system('x')", "-mezo()"),
    *("digits", "mnist", "charlm", "none.py:X", "small.py", "small.py:small", "hf:config.json", "small.py:nothing"),
    *(
        "results",
        "results/records.jsonl",
        "empty",
        "nowhere",
        "/dev/null",
        ".",
        "",
        "\udcff",
        "a\nb",
        "-1",
        "--",
        "-",
    ),
    *("64MiB", "1GiB", "0B", "9" * 400 + "GiB", "lots", "1", "2", "0", "0.5", "nan", "inf", "1e999", "9" * 30),
    *("1e-3:1", "1:1e-3", "0:0", "SGD", "Adam(0.1)", "Adam()", "local", "ray!", "a.html", "a.parquet", "None", "[]"),
    *("deadbeef", "61", "x" * 5000, "../../etc", "~", "$HOME", "%s", "{}", "'", '"', "\x1b[31m", "\N{SKULL}"),
)
STUDY = """
from gradcost import SGD, Trial, backprop, study
from gradcost.tasks import Digits

@study("Does it learn?")
def small():
    yield [Trial(Digits(), "backprop", backprop(), SGD(0.1), 3, "tune", 0)]
"""


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """Interrupt what takes more seconds of CPU, or ten times as many on a clock: others may use the machine."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"it took more than {seconds} s")

    previous = {number: signal.signal(number, ring) for number in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.alarm(10 * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for number, handler in previous.items():
            signal.signal(number, handler)


def line(commands: dict[str, Any], chance: random.Random) -> list[str]:
    """Return a command with random arguments and options, most of them with a value."""
    name = chance.choice(sorted(commands))
    found = [name, *(["--dry-run"] if name in DRY else [])]
    for parameter in commands[name].params:
        is_argument = parameter.param_type_name == "argument"
        if "--dry-run" in parameter.opts or chance.random() < (0.05 if is_argument else 0.88):
            continue
        if not is_argument:
            found.append(chance.choice(parameter.opts))
        if is_argument or (not getattr(parameter, "is_flag", False) and chance.random() < 0.95):
            usual = chance.random() < (0.7 if is_argument else 0.2)
            found.append(USUAL.get(name, "results") if usual else chance.choice(VALUES))
    for _ in range(chance.choice((0, 0, 0, 0, 0, 1, 2))):
        found.insert(chance.randrange(1, len(found) + 1), chance.choice((*VALUES, "--nothing", "--json", "-h")))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_a_random_command_line_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int):
    """Before, 10 of 530 printed a traceback, and one took more than a minute."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    write_folder(tmp_path / "results")
    (tmp_path / "empty").mkdir()
    (tmp_path / "small.py").write_text(STUDY)
    (tmp_path / "config.json").write_text('{"architectures": [1]}')
    known = vars(typer.main.get_command(app))["commands"]
    commands = {name: each for name, each in known.items() if name not in LEFT_OUT}
    chance, codes, longest = random.Random(part), Counter[int](), 0.0
    for _ in range(NUMBER):
        arguments = line(commands, chance)
        start = time.process_time()
        with within(SECONDS):
            ran = CliRunner().invoke(app, arguments)
        longest = max(longest, time.process_time() - start)
        assert isinstance(ran.exception, SystemExit | None), arguments
        allowed = CODES | ({3} if arguments[0] == "lint" else set())  # 3: a comparison that is not fair
        assert ran.exit_code in allowed, (arguments, ran.output)
        assert "Traceback" not in ran.output, arguments
        codes[ran.exit_code] += 1
    print({"command lines": NUMBER, "exit codes": dict(codes), "longest, s of CPU": round(longest, 1)})
