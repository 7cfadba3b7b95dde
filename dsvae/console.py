"""The streams of the `dsvae` command: results go to stdout, everything else to
stderr."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from dsvae.errors import UserError


def say(text: str) -> None:
    """Prints a line on stderr."""
    print(f"dsvae: {text}", file=sys.stderr, flush=True)


def show(
    rows: Iterable[dict[str, Any]], as_json: bool, line: Callable[[dict[str, Any]], str]
) -> None:
    """Prints rows as they come, as JSON or as `line` writes them."""
    for row in rows:
        print(json.dumps(row, ensure_ascii=False) if as_json else line(row), flush=True)


def table(row: dict[str, Any]) -> str:
    """Writes name and value of every field, one field per line; returns the text."""
    width = max(map(len, row))
    return "\n".join(f"{name:<{width}}  {one_line(value)}" for name, value in row.items())


def one_line(text: str) -> str:
    """Puts generated text on one line: byte vocabularies can produce line ends."""
    return " ".join(text.splitlines())


def progress(
    rows: Iterable[Any],
    total: int | None = None,
    *,
    name: str | None = None,
    unit: str = "sentence",
    delay: float = 0.0,
    shown: bool | None = None,
    prints_rows: bool = True,
) -> Iterable[Any]:
    """Returns the same rows under a progress bar. A log file gets one line per minute.

    Args:
        delay: seconds before the bar appears.
        shown: None: if stderr is a terminal; and while the rows are printed
            (`prints_rows`), only if stdout is not one.
    """
    terminal = sys.stderr.isatty()
    if shown is None:
        shown = terminal and not (prints_rows and sys.stdout.isatty())
    if not shown:
        return rows
    from tqdm import tqdm

    interval = 0.5 if terminal else 60.0
    return tqdm(
        rows,
        name,
        total,
        leave=False,
        mininterval=interval,
        maxinterval=interval,
        delay=delay,
        unit=unit,
        unit_scale=unit == "sentence",
        dynamic_ncols=True,
    )


def prepare_streams() -> None:
    """Makes stdout UTF-8 like every file that is read and written, whatever the locale.

    A terminal keeps its encoding.

    Raises:
        UserError: stdout is closed.
    """
    if sys.stderr is None:  # closed by the caller; `print` would take None for stdout
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (to the end of the process)
    if sys.stdout is None:
        raise UserError("stdout is closed: send the results to a file, or to /dev/null")
    if isinstance(sys.stdout, io.TextIOWrapper):
        encoding = sys.stdout.encoding if sys.stdout.isatty() else "utf-8"
        sys.stdout.reconfigure(encoding=encoding, errors="backslashreplace")


def abandon_stdout() -> None:
    """Discards what is not written yet. Otherwise Python would flush it at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Makes SIGTERM an exception inside, so that temporary files are removed."""

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
