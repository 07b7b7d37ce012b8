"""Figures of a run as it goes, for a spreadsheet or TensorBoard."""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLUMNS = (
    "tokens",
    "loss",
    "learning_rate",
    "gradient_norm",
    "tokens_per_second",
    "held_out_loss",
)


class Log(ABC):
    """Takes the figures of a step; a `Trainer` has any number of them."""

    @abstractmethod
    def open(self, step: int) -> None:
        """Begin, or continue a run that has done so many steps: later entries are forgotten."""

    @abstractmethod
    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Take the figures of a step, under the names of `COLUMNS`; not all need be there."""

    @abstractmethod
    def close(self) -> None:
        """Write what is left."""


class CsvLog(Log):
    """A CSV file with a line per step, readable while the run goes on.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "log.csv")
        >>> log = CsvLog(path)
        >>> log.open(0); log.write(1, {"tokens": 64, "loss": 2.5}); log.close()
        >>> path.read_text().splitlines()[1]
        '1,64,2.5,,,,'
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: Any = None

    def open(self, step: int) -> None:
        kept = []
        if step and self.path.is_file():
            with self.path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.reader(file))[1:]
            # A line cut short by a crash is not a whole number of columns.
            whole = (row for row in rows if len(row) == len(COLUMNS) + 1)
            kept = [row for row in whole if int(row[0]) <= step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("w", newline="", encoding="utf-8")
        csv.writer(self._file).writerows([("step", *COLUMNS), *kept])

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        cells = [f"{figures[name]:.8g}" if name in figures else "" for name in COLUMNS]
        csv.writer(self._file).writerow([step, *cells])
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardLog(Log):
    """Event files that TensorBoard shows.

    Args:
        directory: of the event files.

    Raises:
        ImportError: the tensorboard package is not installed.
    """

    def __init__(self, directory: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "event files need the tensorboard package: pip install tensorboard, or log to CSV"
            ) from error
        self.directory = Path(directory)
        self._make = SummaryWriter
        self._writer: Any = None

    def open(self, step: int) -> None:
        self._writer = self._make(str(self.directory), purge_step=step + 1 if step else None)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()
