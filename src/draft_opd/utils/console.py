"""What the command line shows: results on standard output, progress on standard error."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

AGAIN = 2.0  # seconds after which a second signal is another request
QUIET_SECONDS = 10.0  # between progress lines when the output is a file

Update = Callable[..., None]  # update(done, note="")


def _console(stream: TextIO) -> Console:
    # A file has no width of its own, and 80 columns would cut tables.
    width = None if stream.isatty() else 120
    return Console(file=stream, highlight=False, soft_wrap=True, width=width)


class Screen:
    """With `as_json` nothing but one JSON object reaches standard output; a silent one says
    nothing (the other processes of a group)."""

    def __init__(self, as_json: bool = False, silent: bool = False):
        self.as_json, self.silent = as_json, silent
        self.log = _console(sys.stderr)
        self.out = self.log if as_json else _console(sys.stdout)

    def say(self, text: str) -> None:
        """A line about the work, on standard error."""
        if not self.silent:
            self.log.print(text, markup=False)

    def result(self, value: dict, *shown: RenderableType) -> None:
        """The command's result: `value` as JSON, or what was made to be read."""
        if self.silent:
            return
        if self.as_json:
            sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
            sys.stdout.flush()
            return
        for item in shown:
            self.out.print(item, markup=False)

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Update]:
        """A bar on a terminal; a line every few seconds anywhere else."""
        if self.silent or not self.log.is_terminal:
            yield self._lines(title, total)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.log) as bars:
            task = bars.add_task(title, total=total, note="")

            def update(done: int, note: str | None = None) -> None:
                if note is not None:
                    bars.update(task, note=note)
                bars.update(task, completed=done)

            yield update

    def _lines(self, title: str, total: int) -> Update:
        last_time, last_note = -QUIET_SECONDS, ""

        def update(done: int, note: str | None = None) -> None:
            nonlocal last_time, last_note
            last_note = last_note if note is None else note
            now = time.monotonic()
            if now - last_time >= QUIET_SECONDS or done == total:
                last_time = now
                self.say(f"{title}: {done}/{total}  {last_note}".rstrip())

        return update


@contextmanager
def ending(stop: Callable[[], None]) -> Iterator[None]:
    """The first SIGTERM or Ctrl-C calls `stop`. One more than 2 s later has its usual effect; an
    earlier one is ignored, because launchers forward a signal that the process has received."""
    before: dict[int, Any] = {}
    asked: list[float] = []

    def handle(number: int, _frame: object) -> None:
        if not asked:
            stop()
            asked.append(time.monotonic())
            os.write(2, b"stopping after this step; once more: at once\n")
        elif time.monotonic() - asked[0] > AGAIN:
            signal.signal(number, before[number])
            os.kill(os.getpid(), number)

    numbers = (signal.SIGTERM, signal.SIGINT)
    if threading.current_thread() is not threading.main_thread():  # others get no signals
        yield
        return
    for number in numbers:
        before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, before[number])


NAME = 30  # characters of a table's first column that stay, however narrow the terminal is


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence], wrap: bool = False) -> Table:
    """First column left, the others right. wrap: long cells go on in the next line."""
    made = Table(title=escape(title) or None, title_justify="left")
    names = max((len(str(row[0])) for row in rows), default=0)  # these are not shortened to nothing
    for i, name in enumerate(columns):
        least = None if i else min(names, NAME)
        made.add_column(name, justify="right" if i else "left", no_wrap=wrap != bool(i), min_width=least)
    for row in rows:
        made.add_row(*(escape(cell if isinstance(cell, str) else _figure(cell)) for cell in row))
    return made


def facts(title: str, values: dict) -> Table:
    """Two columns: name, value."""
    return table(title, ["", ""], [[k, _figure(v)] for k, v in values.items()], wrap=True)


def _figure(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return "–" if value is None else ("yes" if value else "no")
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)
