"""What the commands of a shell share: how mistakes are told, and what `--set` means."""

from __future__ import annotations

import contextlib
import errno
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Final

import typer
from typer.core import TyperGroup

from collie_lab.cells import CellError, Problem

__all__ = ["MISTAKE", "Group", "parse_changes", "terminated_as_interrupted"]

#: What a mistake in the experiment or in the options ends with, as typer does for those that it finds itself.
MISTAKE: Final = 2


class Group(TyperGroup):
    """Mistakes are told in words: of every command, those of groups below too."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; a mistake in it becomes words and an exit code."""
        with _told():
            return super().invoke(ctx)


def parse_changes(changes: Sequence[str] | None) -> dict[str, Any]:
    """What `--set FIELD=VALUE` says, by field, those of the smallest parts last; values are YAML.

    Raises:
        CellError: no value, or no valid YAML.
    """
    from collie_lab.cells._yaml import parse

    made = {}
    for change in changes or ():
        path, equals, text = change.partition("=")
        if not equals:
            raise CellError([Problem("--set", "", f"{change!r} is no FIELD=VALUE", "--set optimizer.lr=3e-5")])
        made[path] = parse(text, "--set", path, of=text)
    return dict(sorted(made.items(), key=lambda change: change[0].count(".")))


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, where it reaches this process alone, is an interrupt: what runs stops with a checkpoint."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Mistakes become words and an exit code; warnings, lines."""
    from collie_lab.planning import PlanError

    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            yield
        except (CellError, PlanError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(MISTAKE if isinstance(error, CellError) else 1) from None
        except OSError as error:  # a folder that cannot be written, say
            if error.errno == errno.EPIPE:  # nobody reads any longer, which is no mistake
                raise
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(1) from None
