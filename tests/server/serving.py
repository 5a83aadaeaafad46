"""A server as people start it, in a process of its own, and a server of pictures beside it."""

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
READY = re.compile(r"http://127\.0\.0\.1:(\d+)")
OPTIONS = ("--model", "tiny", "--captioner", "tiny", "--allow-private-urls")


def png(size: tuple[int, int] = (64, 64), seed: int = 0, mode: str = "RGB") -> bytes:
    """A picture of (width, height)."""
    rng = np.random.default_rng(seed)
    depth = {"RGB": 3, "RGBA": 4}[mode]
    pixels = np.broadcast_to(rng.integers(0, 256, depth, np.uint8), (size[1], size[0], depth))
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels), mode).save(out, "PNG")
    return out.getvalue()


class Process:
    """`python -m flux.server` in a folder."""

    def __init__(self, folder: Path, *options: str, environment: dict[str, str] | None = None):
        self.folder, self.root = folder, folder / "flux_train"
        self._words = [sys.executable, "-m", "flux.server", "--port", "0", *OPTIONS, *options]
        self._environment = {**os.environ, "PYTHONPATH": str(ROOT), "MOUNT_PATH": str(folder)}
        self._environment |= {"OPENBLAS_NUM_THREADS": "1", **(environment or {})}
        self.start()

    def start(self) -> None:
        """Starts it, again after an end."""
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(self._words, cwd=self.folder, env=self._environment, **pipes)
        self.lines: list[str] = []
        for line in self.process.stderr:
            self.lines.append(line)
            if found := READY.search(line):
                break
        else:
            raise AssertionError("".join(self.lines))
        threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True).start()
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{found[1]}", timeout=120, trust_env=False)

    def kill(self) -> None:
        """As kill -9."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """As Ctrl-C; and ends what it has left running."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(20)
        for line in processes_of(self.root):
            with suppress(ProcessLookupError):
                os.kill(line, signal.SIGKILL)

    def post(self, path: str, **body: object) -> httpx.Response:
        return self.http.post(path, json=body)

    def ok(self, path: str, **body: object) -> dict:
        answer = self.post(path, **body)
        assert answer.status_code in (200, 201), answer.text
        return answer.json()

    def job(self, id: str) -> dict:
        return self.http.get(f"/jobs/{id}").raise_for_status().json()

    def wait(self, id: str, *states: str, seconds: float = 90) -> dict:
        """The job when it is in one of the states."""
        end = time.monotonic() + seconds
        while (job := self.job(id))["state"] not in states:
            assert time.monotonic() < end, job
            assert job["state"] in ("queued", "running"), job
            time.sleep(0.05)
        return job


def processes_of(root: Path, word: str = "") -> list[int]:
    """The processes that have a server's folder in their command line: worker, programs, generator."""
    listed = subprocess.run(["ps", "-axww", "-o", "pid=,command="], capture_output=True, text=True).stdout
    lines = [line for line in listed.splitlines() if str(root) in line and word in line]
    return [pid for line in lines if (pid := int(line.split()[0])) != os.getpid()]


@contextmanager
def picture_server(answers: dict[str, bytes | Callable[[BaseHTTPRequestHandler], None]]) -> Iterator[str]:
    """The address of a server on loopback that answers paths with pictures, or as a function says."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            found = answers.get(self.path.split("?")[0])
            if callable(found):
                found(self)
                return
            self.send_response(404 if found is None else 200)
            self.send_header("Content-Length", str(len(found or b"")))
            self.end_headers()
            self.wfile.write(found or b"")

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def write_dataset(process: Process, name: str, count: int = 3) -> None:
    """A dataset with captions and a data.toml, as the API makes it."""
    folder = process.root / "datasets" / name
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"image{number}.png").write_bytes(png(seed=number))
        (folder / f"image{number}.txt").write_text(f"sks thing, number {number}\n")
    process.ok(
        "/create-dataset-config", output_name=name, trigger_word="sks thing", resolution=64, num_repeats=1
    )


TINY = {"pretrained_model": "tiny", "network_dim": 2}
