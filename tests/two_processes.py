"""Two processes of one distributed run, forked rather than launched: what takes longest, the imports, is done once."""

from __future__ import annotations

import os
import subprocess
import sys

_FORK = """
import os, socket, sys
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
os.environ.update(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
other = os.fork()
rank = "0" if other else "1"
os.environ.update(RANK=rank, LOCAL_RANK=rank)
try:
    exec(code)
except SystemExit as end:
    if end.code:
        raise
if other:
    assert os.waitpid(other, 0)[1] == 0
"""


def run_in_two_processes(imports: str, code: str, *arguments: str) -> None:
    """Run `code` in both, on the processor, with `arguments` in `sys.argv`, after what `imports` imports."""
    environment = {
        **os.environ,
        **{"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        **{"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""},
    }
    command = [sys.executable, "-c", f"{imports}\ncode = {code!r}\n{_FORK}", *arguments]
    subprocess.run(command, env=environment, check=True, timeout=1800)
