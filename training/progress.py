"""How far something long is: a bar in a terminal, in a pipe a plain line for every tenth, a file for other programs."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from types import TracebackType

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from multisubject.subject_file import write_atomically
from multisubject.training.stopping import Interrupted

logger = logging.getLogger(__name__)

_LINES = 10
_SECONDS = 0.5  # between two writes
_POINTS = 200  # of a curve of losses


class ProgressBar:
    """While entered, log messages are written above the bar.

    Args:
        title: what goes on.
        total: how many there are.
        unit: of what, in the singular.
        done: how many of them were there before.
        silent: whether another process tells of it.
    """

    def __init__(self, title: str, total: int, unit: str, *, done: int = 0, silent: bool = False) -> None:
        self._title, self._unit, self._silent = title, unit, silent
        self._bar = tqdm(total=total, initial=done, desc=title, unit=unit, disable=True if silent else None)
        self._done, self._total = done, total
        self._above_the_bar = logging_redirect_tqdm()

    def __enter__(self) -> ProgressBar:
        self._above_the_bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._above_the_bar.__exit__(kind, error, trace)
        self._bar.close()

    def advance(self, **values: str) -> None:
        """One more is done; `values` say what came of it."""
        self._done += 1
        if not self._bar.disable:
            self._bar.update()
            self._bar.set_postfix(values)
        elif not self._silent and self._done * _LINES // self._total > (self._done - 1) * _LINES // self._total:
            rest = "".join(f", {name} {value}" for name, value in values.items())
            logger.info("%s: %s %d/%d%s", self._title, self._unit, self._done, self._total, rest)


class ProgressFile:
    """The JSON file of `--progress_file`. While entered it follows the run; at the end it says how that ended.

    Its object has `phase` (`loading`, `encoding`, `training`, `drawing`; at the end `done`, `stopped` or `failed`),
    `subject` (empty before the first training), `step`, `of`, `loss` (mean of the last 50 steps, or null), `losses` (at
    most 200 points `[step, mean loss since the point before]`) and `error` (a message, or null). A reader sees one
    state or the next, never half of one.

    Args:
        path: the file; None: there is none.
    """

    def __init__(self, path: str | None) -> None:
        is_main_process = os.environ.get("RANK", "0") == "0"  # asked before torch is imported
        self._path = Path(path) if path is not None and is_main_process else None
        self._phase, self._subject, self._steps = "loading", "", 0
        self._error: str | None = None
        self._losses: Sequence[float] = ()
        self._written_at = 0.0

    def __enter__(self) -> ProgressFile:
        """Raises `OSError` where the file cannot be written; later on that is a warning."""
        if self._path is not None:
            try:
                self._write(self._path)
            except OSError as error:
                raise OSError(
                    f"--progress_file: {str(self._path)!r} cannot be written ({error}); choose another."
                ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.tell("done")
        elif isinstance(error, (Interrupted, KeyboardInterrupt)):
            self.tell("stopped")
        else:
            self.tell("failed", error=str(error) or type(error).__name__)

    def tell(self, phase: str, error: str | None = None) -> None:
        """The run has come to a phase."""
        self._phase, self._error = phase, error
        self._try_to_write()

    def begin(self, subject: str, steps: int, losses: Sequence[float]) -> None:
        """A subject's training begins or goes on.

        Args:
            subject: its name.
            steps: when it ends.
            losses: of all steps so far; the run appends to it.
        """
        self._subject, self._steps, self._losses = subject, steps, losses
        self.tell("training")

    def advance(self) -> None:
        """One more step is done. Steps that follow each other closely are written together."""
        if time.monotonic() - self._written_at >= _SECONDS or len(self._losses) == self._steps:
            self._try_to_write()

    def _try_to_write(self) -> None:
        if self._path is None:
            return
        try:
            self._write(self._path)
        except OSError as error:
            logger.warning("--progress_file: %s could not be written (%s); the run goes on.", self._path, error)
            self._path = None

    def _write(self, path: Path) -> None:
        losses = self._losses
        state = {
            "phase": self._phase,
            "subject": self._subject,
            "step": len(losses),
            "of": self._steps,
            "loss": fmean(losses[-50:]) if losses else None,
            "losses": curve(losses),
            "error": self._error,
        }
        write_atomically(path, json.dumps(state).encode())
        self._written_at = time.monotonic()


def curve(losses: Sequence[float]) -> list[tuple[int, float]]:
    """At most 200 points `(step, mean loss since the point before)`, the last one of the last step."""
    count = min(len(losses), _POINTS)
    ends = [len(losses) * (index + 1) // count for index in range(count)]
    return [(end, fmean(losses[start:end])) for start, end in pairwise([0, *ends])]
