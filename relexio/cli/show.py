"""What the user sees: progress and notes on stderr, results on stdout."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import click

from relexio.progress import silent
from relexio.words import show, without_secrets

_PATIENCE = 1.0  # seconds before anything is said
_EVERY = 10.0  # seconds between lines where stderr is not a terminal


def note(text: str) -> None:
    """One line on stderr."""
    click.echo(f"note: {printable(text)}", err=True)


def printable(text: str) -> str:
    """Text that is safe on a terminal: control characters spelled out (names come from files), no secrets."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in without_secrets(text))


def seconds(count: float) -> str:
    """A duration for people."""
    minutes, rest = divmod(int(count), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def stages(name: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Progress of one stage: a bar on a terminal, else a line now and then; silent if it takes under a second, or --quiet."""
    return (silent if quiet() else _bar if sys.stderr.isatty() else _lines)(name, total)


def quiet() -> bool:
    """Whether the command was asked to show no progress."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.params.get("quiet"))


@contextmanager
def _bar(name: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    begun = time.monotonic()
    task = progress.add_task(name, total=total)

    def advance(count: int) -> None:
        progress.advance(task, count)
        if not progress.live.is_started and time.monotonic() - begun > _PATIENCE:
            progress.start()

    try:
        yield advance
    finally:
        progress.stop()


@contextmanager
def _lines(name: str, total: int) -> Iterator[Callable[[int], None]]:
    begun = time.monotonic()
    done, due = 0, begun + _PATIENCE

    def advance(count: int) -> None:
        nonlocal done, due
        done += count
        now, taken = time.monotonic(), time.monotonic() - begun
        telling = 100 * done >= total or taken > _EVERY  # before, the rate is that of the first few blocks
        if now >= due and telling and done < total:
            due, rate = now + _EVERY, done / taken
            left = seconds((total - done) / rate)
            click.echo(f"{name}: {show(done)} of {show(total)}, {show(rate)}/s, {left} left", err=True)

    yield advance
    if due > begun + _PATIENCE:  # something was said
        click.echo(f"{name}: 100 %, done in {seconds(time.monotonic() - begun)}", err=True)


def not_stored(left: Iterable[object]) -> list[tuple[str, str]]:
    """Rows that say what is not in the store."""
    return [("not stored", str(one)) for one in left]


def table(rows: list[tuple[str, str]]) -> None:
    """Name and value, one line each, on stdout."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(printable(f"{name:<{width}}  {value}"))


def number(value: float | None, form: str) -> str:
    """A formatted number; a dash for None."""
    return "-" if value is None else format(value, form)
