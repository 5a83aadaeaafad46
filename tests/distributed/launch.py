"""Ranks on this machine over the ring backend: by mlx.launch, or by hand, where nobody ends the others."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCH = Path(sys.executable).parent / "mlx.launch"
TIMEOUT = 900  # seconds, for a machine that has much other work


def environment() -> dict[str, str]:
    quick = {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "MLX_DISABLE_COMPILE": "1"}
    return {**os.environ, **quick}


def by_mlx_launch(size: int, command: Sequence[object]) -> None:
    """Runs a command of Python's as so many ranks to their end."""
    launch = [str(LAUNCH), "-n", str(size), "--backend", "ring", "--", sys.executable, *map(str, command)]
    stdin, never_written = os.pipe()  # of a file that is at its end it would read without end
    launcher = subprocess.Popen(launch, env=environment(), stdin=stdin)
    try:
        assert launcher.wait(TIMEOUT) == 0
    finally:
        launcher.terminate()  # it then ends its ranks
        launcher.wait()
        os.close(stdin)
        os.close(never_written)


@contextmanager
def by_hand(
    size: int, command: Sequence[object], folder: Path, own_folders: bool = False
) -> Iterator[list[subprocess.Popen]]:
    """Starts the ranks, by number; ends those that are left. own_folders: each works in folder/rank0, ..."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(size)]
    hosts = [[f"127.0.0.1:{own.getsockname()[1]}"] for own in sockets]
    for own in sockets:
        own.close()
    file = folder / "hosts.json"
    file.write_text(json.dumps(hosts))
    variables = {"MLX_HOSTFILE": str(file)} if size > 1 else {}  # a ring of one does not close
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=folder / f"rank{rank}" if own_folders else folder,
            env=environment() | variables | {"MLX_RANK": str(rank)},
            start_new_session=True,  # Ctrl-C is for the tests alone
            **pipes,
        )
        for rank in range(size)
    ]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def run_program(size: int, command: Sequence[object], folder: Path) -> None:
    """Two ranks by mlx.launch; other numbers by hand, because it spins on a core of its own."""
    if size == 2:
        by_mlx_launch(size, command)
        return
    with by_hand(size, command, folder) as ranks:
        for rank in ranks:
            out, err = rank.communicate(timeout=TIMEOUT)
            assert rank.returncode == 0, out + err
