"""Progress of loading and compiling: bars for a person at a terminal, plain lines for a log."""

from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)


def progress_display() -> Progress:
    """A display on stderr; use it as a context manager."""
    console = Console(stderr=True)
    if not console.is_terminal:
        return _PlainLines(console=console, disable=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


class _PlainLines(Progress):
    """One line when a task begins; a log needs no more."""

    def add_task(self, description: str, *arguments: Any, **more: Any) -> TaskID:
        self.console.print(f"lumen: {description}", markup=False, highlight=False, soft_wrap=True)
        return super().add_task(description, *arguments, **more)
