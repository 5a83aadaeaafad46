"""The worker: one process that takes jobs from the queue and runs their programs, one at a time.

`python -m flux.server.worker ROOT` ends by itself when there is nothing to do. It may be killed at any
moment: a program goes on without it, and whoever comes next finds it by the lock that the program holds.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from flux.errors import FluxError
from flux.outputs import replacing
from flux.server import cloud, results
from flux.server.folders import Folders
from flux.server.jobs import CANCELLED, DONE, FAILED, Job, Jobs
from flux.server.settings import Storage, storage_of

LOOK = 0.1  # seconds from one look at a running job to the next
IDLE = 5.0  # seconds without a job until the worker ends
MOST_KILLS = 10  # in a row, with nothing gained between them
KILLED = 128 + signal.SIGKILL
# $0: the files that the shell leaves: its process group, and how the program ended.
SHELL = 'echo $$ > "$0.pid"; "$@"; echo $? > "$0.part"; mv "$0.part" "$0.exit"'


def program(name: str) -> list[str]:
    """How to start one of the three scripts, from a checkout or as installed."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise FluxError(f"{name}.py is not there: the package is not installed as a whole")
    return [sys.executable, spec.origin]


def environment() -> dict[str, str]:
    """For the server's processes: this package is found, and what they print comes at once."""
    package = str(Path(__file__).parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def spawn(folders: Folders) -> subprocess.Popen:
    """Start a worker, which goes on when the server ends."""
    words = [sys.executable, "-m", "flux.server.worker", str(folders.root)]
    with (folders.logs / ".worker.log").open("ab") as log:
        return subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment(), start_new_session=True
        )


@contextmanager
def lock(path: Path, wait: bool) -> Iterator[int | None]:
    """The descriptor of a file that this process has locked; None where another has and is not waited for.

    A program that is given the descriptor holds the lock for as long as it lives.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
        else:
            yield file.fileno()


class Worker:
    """Takes jobs until there are none."""

    def __init__(self, folders: Folders, storage: Storage | None):
        self._folders = folders
        self._storage = storage
        self._jobs = Jobs(folders.logs)

    def run(self) -> None:
        """Attend to jobs, one by one, until none came for a while."""
        last = time.monotonic()
        while time.monotonic() - last < IDLE:
            job = self._jobs.next()
            if job is None:
                time.sleep(LOOK)
                continue
            self.attend(job)
            last = time.monotonic()

    def attend(self, job: Job) -> None:
        """Run a job's program, or wait for the one that runs already, and note how it ended."""
        with lock(self._file(job, "lock"), wait=False) as descriptor:
            if descriptor is not None and self._exit_status(job) is None:
                try:
                    self._start(job, descriptor)
                except (FluxError, OSError) as error:
                    self._jobs.end(job.id, FAILED, f"the program cannot be started: {error}")
                    return
        self._wait(job)
        self._finish(self._jobs.get(job.id))

    def _file(self, job: Job, kind: str) -> Path:
        """Of this attempt: what an earlier one has left says nothing about it."""
        return self._folders.logs / f".{job.id}.{job.attempt}.{kind}"

    def _exit_status(self, job: Job) -> int | None:
        """Of the program; None where it was killed together with its shell, or has not ended."""
        path = self._file(job, "exit")
        text = path.read_text().strip() if path.is_file() else ""
        return int(text) if text.isdecimal() else None

    # --- start, wait, finish ---

    def _start(self, job: Job, descriptor: int) -> None:
        base = str(self._folders.logs / f".{job.id}.{job.attempt}")
        self._file(job, "pid").unlink(missing_ok=True)  # of a process that was killed
        with self._folders.log(job.id).open("ab") as log:
            subprocess.Popen(
                ["sh", "-c", SHELL, base, *self._words(job)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(),
                pass_fds=[descriptor],
                start_new_session=True,
            )

    def _words(self, job: Job) -> list[str]:
        """The program's command line: a run that has a state goes on from it."""
        name, *words = job.command
        if job.kind == "train" and self._state(job):
            return [*program(name), "--resume", str(self._folders.output(job.name))]
        if job.options:
            path = self._folders.logs / f"{job.id}.options.json"
            with replacing(path) as partial:
                partial.write_text(json.dumps(job.options, indent=1), encoding="utf-8")
            words += ["--options", str(path)]
        return [*program(name), *words]

    def _state(self, job: Job) -> Path | None:
        """The newest state of this job's run; a finished run that it replaces has older ones."""
        state = results.newest_state(self._folders.output(job.name))
        is_its = state is not None and job.started is not None and state.stat().st_mtime >= job.started
        return state if is_its else None

    def _wait(self, job: Job) -> None:
        """Until no process holds the job's lock; kills them all when the job is cancelled."""
        while True:
            with suppress(ChildProcessError):
                os.waitpid(-1, os.WNOHANG)
            with lock(self._file(job, "lock"), wait=False) as descriptor:
                if descriptor is not None:
                    return
            if self._jobs.get(job.id).cancel:
                self._kill(job)
            if job.kind == "train":
                results.publish(self._folders.output(job.name), job.name)
            time.sleep(LOOK)

    def _kill(self, job: Job) -> None:
        path = self._file(job, "pid")
        text = path.read_text().strip() if path.is_file() else ""
        if text:  # the lock is held, so the group is still this one
            with suppress(ProcessLookupError):
                os.killpg(int(text), signal.SIGKILL)

    def _finish(self, job: Job) -> None:
        """Note how a job ended. The files of its process go last: without them nobody could tell."""
        status = self._exit_status(job)
        if status == 0:
            self._end(job, DONE, self._keep(job))
        elif job.cancel:
            self._end(job, CANCELLED, "")
        elif status in (None, KILLED):
            self._killed(job)
        elif status == 130:
            self._end(job, FAILED, "the program was stopped from outside; resume goes on with it")
        else:
            self._end(job, FAILED, self._reason(job, status))
        is_over = not self._jobs.get(job.id).is_active
        for kind in ("exit", "pid", "lock") if is_over else ("exit",):
            self._file(job, kind).unlink(missing_ok=True)

    def _end(self, job: Job, state: str, message: str) -> None:
        folder = self._folders.output(job.name)
        numbers = {}
        if job.kind == "train":
            lines = results.tail(self._folders.log(job.id))
            numbers = results.last_update(folder, job.started or 0.0)
            numbers["iterations"] = results.iterations(lines)
        self._jobs.end(job.id, state, message, numbers)

    def _killed(self, job: Job) -> None:
        """Let it run again, unless it is killed again and again without getting any farther."""
        state = self._state(job) if job.kind == "train" else None
        mark = state.name if state else ""
        kills = job.kills + 1 if mark == job.mark else 1
        if kills >= MOST_KILLS:
            self._end(job, FAILED, f"the program was killed {kills} times: is there enough memory?")
        else:
            self._jobs.killed(job.id, kills, mark)

    def _reason(self, job: Job, status: int | None) -> str:
        lines = results.tail(self._folders.log(job.id))
        said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return said[-1] if said else f"the program ended with status {status}: {lines[-1] if lines else ''}"

    def _keep(self, job: Job) -> str:
        """Name and copy what a finished job has made; what there is to say of it."""
        folder = self._folders.output(job.name)
        if job.kind == "train":
            results.publish(folder, job.name)
            files = results.shown(folder)
        else:
            files = [path for path in self._folders.dataset(job.name).glob("*") if path.is_file()]
            files += [path for path in [self._folders.config(job.name)] if path.is_file()]
        if self._storage is None:
            return ""
        try:
            count = cloud.copy(files, self._folders.root, self._storage)
        except FluxError as error:
            return str(error)
        return f"{count} files copied to {self._storage.protocol}://{self._storage.path}"


def main(root: str) -> None:
    """Work on the queue of a server's folder; where another worker does, when that has ended."""
    folders = Folders(Path(root))
    with lock(folders.logs / ".worker.lock", wait=True):
        Worker(folders, storage_of(os.environ)).run()


if __name__ == "__main__":
    main(sys.argv[1])
