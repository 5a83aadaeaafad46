"""What the routes share: settings, the queue, and the worker that is kept going."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from subprocess import Popen
from typing import Annotated, Any

from fastapi import Depends, Request

from flux import machine
from flux.server import results, worker
from flux.server.jobs import DONE, QUEUED, RUNNING, Job, Jobs, New, same_request
from flux.server.pictures import Painter
from flux.server.settings import Settings

LOOK = 0.5  # seconds from one look at the worker to the next
USABLE = 0.9  # of the memory: the rest is for the system
MEMORY = re.compile(r"memory: about ([\d.]+) GB")  # what a training says that it will need


class Server:
    """One for each app."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.folders = settings.folders
        self.folders.make()
        self.jobs = Jobs(self.folders.logs)
        self.painter = Painter(settings)
        self.downloading = 0  # requests
        self._worker: Popen | None = None

    # --- Jobs ---

    def submit(self, id: str, like: New, make: Callable[[], New]) -> Job:
        """Put a job into the queue, unless its id is there already with the same request.

        like: what tells whether that is the same request. make: the job, which checks everything.
        """
        found = self.jobs.find(id)
        job = same_request(found, like) if found else self.jobs.add(make(), self.settings.max_queued)
        self.keep_worker()
        return job

    def keep_worker(self) -> None:
        """Start a worker where there is work and none is there that this process has started."""
        if self.jobs.active() and (self._worker is None or self._worker.poll() is not None):
            self._worker = worker.spawn(self.folders)

    def numbers(self, job: Job) -> dict[str, Any]:
        """The numbers of a training's last update; {} before it."""
        if not job.is_active or job.kind != "train" or job.started is None or job.state == QUEUED:
            return job.result
        update = results.last_update(self.folders.output(job.name), job.started)
        return update | {"iterations": results.iterations(results.tail(self.folders.log(job.id)))}

    def view(self, job: Job) -> dict[str, Any]:
        """A job as clients see it."""
        numbers = self.numbers(job)
        iteration, iterations = numbers.get("iteration"), numbers.get("iterations")
        shown = ("id", "kind", "name", "state", "message", "created", "started", "ended")
        done = 1.0 if job.state == DONE else iteration / iterations if iteration and iterations else 0.0
        values = {name: getattr(job, name) for name in shown}
        return values | {
            "progress": done,
            "iteration": iteration,
            "iterations": iterations,
            "loss": numbers.get("loss"),
        }

    def logs(self, job: Job, count: int) -> list[str]:
        """The last lines that a job's program printed."""
        return results.tail(self.folders.log(job.id))[-count:]

    # --- Memory ---

    def room_now(self) -> int | None:
        """Bytes that a running training leaves for pictures; None where none runs."""
        running = [job for job in self.jobs.active() if job.state == RUNNING and job.kind == "train"]
        if not running:
            return None
        taken = sum(self._taken(job) for job in running)
        return int(USABLE * machine.memory()) - taken

    def _taken(self, job: Job) -> int:
        """Bytes of a training: its peak so far, or what it said that it would need."""
        said = [found[1] for line in self.logs(job, 1000) if (found := MEMORY.match(line))]
        expected = int(float(said[-1]) * 1e9) if said else 0
        return max(expected, self.numbers(job).get("peak_memory", 0))

    async def room(self) -> int | None:
        """As `room_now`, beside other requests."""
        return await asyncio.to_thread(self.room_now)

    # --- Beside the requests ---

    async def watch(self) -> None:
        """Keep a worker going for as long as there is work, and make room for it."""
        while True:
            await asyncio.to_thread(self.keep_worker)
            await self._make_room()
            await asyncio.sleep(LOOK)

    async def _make_room(self) -> None:
        """Let an idle model go that does not fit beside a training."""
        room = await self.room() if self.painter.is_loaded else None
        if room is not None and room < self.painter.size and not self.painter.is_at_work:
            await self.painter.close()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The block in which requests are answered. Jobs go on after it."""
        tasks = [asyncio.create_task(work) for work in (self.watch(), self.painter.run())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.painter.close()


def of_request(request: Request) -> Server:
    """The server that a request came to."""
    return request.app.state.server


State = Annotated[Server, Depends(of_request)]
