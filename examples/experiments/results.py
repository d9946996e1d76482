"""The experiments' CSV: one row a run, appended whole or not at all, also when several drivers
write.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import os
from pathlib import Path

from questions import refuse

COLUMNS = (
    "question",
    "arm",
    "seed",
    "base_iterations",
    "iterations",
    "validation_loss",
    "raw_tokens",
    "flops",
    "seconds",
    "wall_seconds",
    "boundary",
    "experts",
    "settings",
    "device",
    "versions",
    "commit",
    "finished",
)
SHOWN = (
    "question",
    "arm",
    "seed",
    "iterations",
    "validation_loss",
    "raw_tokens",
    "flops",
    "seconds",
    "boundary",
)


class Table:
    """Rows of text by column.

    validation_loss: next-token, nats, after the last iteration. raw_tokens, flops (6 N D,
    planning/curves.py), seconds (of training, from Megatron's log; wall_seconds: with
    start-up and evaluation) of the whole run. base_iterations: of an arm of length 1.
    boundary: the last superposed iteration. experts: what the log says of their load around it.
    settings: every flag that the driver did not set by itself.
    """

    def __init__(self, path: Path):
        self.path = path

    def rows(self) -> list[dict]:
        """All rows; none where there is no file yet."""
        return list(csv.DictReader(io.StringIO(self._text())))

    def find(self, **wanted: str) -> dict | None:
        """The first row with these values."""
        return next(
            (
                row
                for row in self.rows()
                if all(row[name] == value for name, value in wanted.items())
            ),
            None,
        )

    def has(self, **wanted: str) -> bool:
        return self.find(**wanted) is not None

    def append(self, row: dict) -> dict:
        """Add a row: into a copy that takes the file's place, one writer at a time. -> the row"""
        assert row.keys() == set(COLUMNS), set(COLUMNS) ^ row.keys()
        with locked(self.path.with_name(f".{self.path.name}.lock"), wait=True):
            line = io.StringIO()
            writer = csv.DictWriter(line, COLUMNS, lineterminator="\n")
            text = self._text()
            if not text:
                writer.writeheader()
            writer.writerow(row)
            part = self.path.with_name(f".{self.path.name}.part")
            with open(part, "w", newline="") as out:
                out.write(text + line.getvalue())
                out.flush()
                os.fsync(out.fileno())
            part.replace(self.path)
        return row

    def _text(self):
        return self.path.read_text() if self.path.exists() else ""


@contextlib.contextmanager
def locked(path: Path, wait: bool = False):
    """Hold a lock file, which the system gives back when the process ends, however it does.

    Raises:
        ConfigError: another process holds it, and `wait` is False.
    """
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            refuse(
                path.parent,
                "a folder that no other driver works in",
                "one that does",
                "Wait for it, or choose another --out.",
            )
        yield
