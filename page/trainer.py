"""`train_residual.py` as the page runs it: it stops, with a checkpoint, when the server that started it is gone.

A server that is ended by SIGKILL tells nobody.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence

from multisubject import train_residual

_SECONDS_BETWEEN_LOOKS = 1.0


def main(argv: Sequence[str]) -> int:
    """Run the trainer.

    Args:
        argv: the server's process number, and the trainer's command line.

    Returns:
        The trainer's exit status.
    """
    server, *options = argv
    threading.Thread(target=_stop_after, args=(int(server),), daemon=True).start()
    return train_residual.main(options)


def _stop_after(server: int) -> None:
    while os.getppid() == server:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
