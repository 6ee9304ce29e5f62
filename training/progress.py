"""How far something long is: a bar in a terminal, and in a pipe or a file a plain line for every tenth of it."""

from __future__ import annotations

import logging
from types import TracebackType

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

logger = logging.getLogger(__name__)

_LINES = 10


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
