"""Two processes on this machine, connected as a launcher connects them, without a launcher around them."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def start(*arguments: object, **more: str) -> list[subprocess.Popen[str]]:
    """Two Python processes with these arguments; `more` goes into their environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
        **more,
    }
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def ended(processes: list[subprocess.Popen[str]], seconds: float = 400) -> list[tuple[int, str, str]]:
    """The exit code, output and errors of each; none outlives this call."""
    try:
        outcomes = [p.communicate(timeout=seconds) for p in processes]
        return [(p.returncode, *texts) for p, texts in zip(processes, outcomes, strict=True)]
    finally:
        for p in processes:
            p.kill()
            p.wait()
