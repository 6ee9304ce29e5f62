"""Two processes of one distributed run on this machine, as a launcher would start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import NamedTuple


class Ended(NamedTuple):
    """How a process ended, and what it said."""

    code: int
    stdout: str
    stderr: str


def run_in_two_processes(*arguments: str) -> list[Ended]:
    """Run Python with these arguments twice at once, on the processor, as ranks 0 and 1; five minutes at most."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        **{"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        **{"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""},
        **{"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=environment | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        said = [rank.communicate(timeout=300) for rank in ranks]
        return [Ended(rank.returncode, *streams) for rank, streams in zip(ranks, said, strict=True)]
    finally:
        for rank in ranks:
            rank.kill()
