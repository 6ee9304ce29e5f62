"""Signals that end a run between two steps. Imported before torch, which takes seconds."""

from __future__ import annotations

import logging
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

# torchrun passes the terminal's Ctrl-C on, so its processes get it twice: within this time it is an echo.
ECHO_SECONDS = 2.0


class Interrupted(Exception):
    """A signal asked the run to stop, and it did, after a checkpoint. `signal` is the signal's number."""

    def __init__(self, number: int, checkpoint: Path) -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name}; go on from {checkpoint} with --resume_from_checkpoint latest"
        )
        self.signal = number


class StopRequest:
    """While entered, SIGINT and SIGTERM ask the loop to stop after its step; a later second one ends the process at
    once."""

    def __init__(self) -> None:
        self.received = 0
        self._received_at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python delivers signals nowhere else
            self._previous = {
                number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _request(self, number: int, _: object) -> None:
        if not self.received:
            self.received, self._received_at = number, time.monotonic()
            logger.warning("%s: stopping after this step.", signal.Signals(number).name)
        elif time.monotonic() - self._received_at > ECHO_SECONDS:
            self.__exit__()
            signal.raise_signal(number)

    def agreed(self, accelerator: Accelerator) -> int:
        """The signal that any process received, or 0. Every process gets the same answer."""
        if accelerator.num_processes == 1:
            return self.received
        import torch

        received = torch.tensor([self.received], device=accelerator.device)
        return int(accelerator.gather(received).max())
