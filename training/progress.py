"""How far something long is: a bar in a terminal, in a pipe or a file a plain line for every tenth of it, and for
programs that watch a JSON file."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from multisubject.subject_file import write_atomically
from multisubject.training.stopping import Interrupted

logger = logging.getLogger(__name__)

Phase = Literal["loading", "training", "saving", "done", "stopped", "failed"]

_LINES = 10
_CURVE_POINTS = 200
_SECONDS_BETWEEN = 0.5


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
    """A JSON object that says how far a run is, always whole: each one replaces the one before.

    Its keys are `phase`, `subject` (its name, or null), `step` and `of` (steps done and to do), `loss` (mean of the
    last 50 steps, or null), `curve` (the loss as `[step, loss]`, at most 200 points), `message` (why it ended, or
    null) and `time` (seconds since 1970). Within a phase it is renewed every half second at most. A disk that takes no
    more does not end the run. Of several processes the first one writes.

    Args:
        path: the file; None: nobody watches.
    """

    def __init__(self, path: str | None) -> None:
        is_first_process = os.environ.get("RANK", "0") == "0"  # asked before torch is imported
        self._path = Path(path) if path is not None and is_first_process else None
        self._told: dict[str, object] = {}
        self._next = 0.0

    def tell(
        self, phase: Phase, *, subject: str | None = None, step: int = 0, of: int = 0, losses: Sequence[float] = ()
    ) -> None:
        """Where the run is: `losses` has one number for each step so far."""
        is_new = phase != self._told.get("phase") or subject != self._told.get("subject")
        if self._path is None or not (is_new or step == of or time.monotonic() >= self._next):
            return
        recent = losses[-50:]
        loss = sum(recent) / len(recent) if recent else None
        told: dict[str, object] = {
            "phase": phase,
            "subject": subject,
            "step": step,
            "of": of,
            "loss": loss,
            "curve": thinned(losses),
        }
        self._write(told | {"message": None})

    @contextmanager
    def outcome(self) -> Iterator[None]:
        """The whole run: what it ends with is the last thing that the file says."""
        self.tell("loading")
        try:
            yield
        except (Interrupted, KeyboardInterrupt) as stop:
            self._end("stopped", str(stop) or "stopped outside of training")
            raise
        except BaseException as error:
            self._end("failed", str(error) or type(error).__name__)
            raise
        self._end("done", None)

    def _end(self, phase: Phase, message: str | None) -> None:
        if self._path is not None:
            self._write(self._told | {"phase": phase, "message": message})

    def _write(self, told: dict[str, object]) -> None:
        assert self._path is not None
        self._told = told
        try:
            write_atomically(self._path, json.dumps(told | {"time": time.time()}).encode())
        except OSError as error:
            logger.warning("--progress_file: %s cannot be written, the run goes on without: %s", self._path, error)
            self._path = None
        self._next = time.monotonic() + _SECONDS_BETWEEN


def thinned(losses: Sequence[float], points: int = _CURVE_POINTS) -> list[list[float]]:
    """A curve of at most that many points `[step, loss]`: means over stretches of one length, at their last step."""
    stretch = max(1, -(-len(losses) // points))
    starts = range(0, len(losses), stretch)
    parts = [losses[start : start + stretch] for start in starts]
    return [[start + len(part), sum(part) / len(part)] for start, part in zip(starts, parts, strict=True)]
