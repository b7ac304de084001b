"""The line that shows how far work is, and durations in words."""

from __future__ import annotations

import pytest

from vlm_cli.cli import progress as module
from vlm_cli.cli.progress import ProgressLine, format_duration


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the line sees: the last number of the list."""
    times = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: times[-1])
    return times


def test_items_of_an_earlier_run_do_not_count_for_the_rate(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressLine(None, noun="rows", done_before=50, has_summary=False) as line:
        clock.append(110.0)
        line.show(70)
        line.notify("Note: a message")
    assert capsys.readouterr().err.splitlines() == ["  70 rows, 2.0 rows/s", "Note: a message"]


def test_a_terminal_has_one_line_that_messages_do_not_overwrite(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressLine(4) as line:
        line.is_terminal, line.interval = True, 0.2
        clock.append(101.0)
        line.show(1)
        line.notify("Note: a message")
        clock.append(104.0)
        line.show(4)
    shown = capsys.readouterr().err
    assert shown == (
        "\r  1 of 4, 1.0 items/s, 3.0 s left\x1b[K\nNote: a message\n\r  4 items in 4.0 s, 1.0 items/s\x1b[K\n"
    )


def test_an_error_leaves_no_summary(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError), ProgressLine(4):
        raise ValueError
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (9.96, "10.0 s"), (59.6, "1 min 00 s"), (95, "1 min 35 s"), (3725, "1 h 02 min")],
)
def test_durations(seconds: float, words: str) -> None:
    assert format_duration(seconds) == words
