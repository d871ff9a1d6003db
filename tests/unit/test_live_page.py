"""The page of a comparison that runs: rewritten now and then, reloaded until the comparison ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_records import write_folder

from gradcost.cli import live
from gradcost.cli.live import LivePage
from gradcost.report import html


class Clock:
    """What stands for the module `time`. Each look at the clock takes `step` seconds."""

    now, step = 0.0, 0.0

    def monotonic(self) -> float:
        self.now += self.step
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(live, "time", fake)
    return fake


def test_a_page_is_rewritten_now_and_then_and_reloaded_until_the_end(tmp_path: Path, clock: Clock):
    write_folder(tmp_path)
    page, path = LivePage(tmp_path), tmp_path / "report.html"
    assert not page.update()
    assert not path.exists()
    clock.now = live.FIRST
    assert page.update()
    assert '<meta http-equiv="refresh" content="30">' in path.read_text("utf-8")
    assert "still running" in path.read_text("utf-8")
    path.unlink()
    clock.now += live.RELOAD - 1
    assert not page.update()
    assert not path.exists()
    clock.now += 1
    assert not page.update()  # written again, and not announced again
    assert path.exists()
    page.end()
    assert 'http-equiv="refresh"' not in path.read_text("utf-8")
    assert [each.name for each in tmp_path.glob(".*")] == []


def test_slow_pages_are_written_less_often(tmp_path: Path, clock: Clock):
    write_folder(tmp_path)
    page = LivePage(tmp_path)
    clock.now, clock.step = live.FIRST, 6.0
    assert page.update()
    assert page.due - clock.now == pytest.approx(6.0 / live.SHARE)


def test_without_the_packages_of_a_report_nothing_is_written(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
):
    def missing(*args: object, **kwargs: object) -> None:
        raise ImportError

    monkeypatch.setattr(html, "write", missing)
    page = LivePage(tmp_path)
    clock.now = live.FIRST
    assert not page.update()
    page.end()
    assert page.due == float("inf")
