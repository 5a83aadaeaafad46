"""Jobs: the queue, what each does, and what trainings have made."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query
from fastapi.responses import FileResponse, StreamingResponse

from flux.server import results
from flux.server.folders import existing, listed, subfolders
from flux.server.jobs import QUEUED, Job
from flux.server.problems import absent, conflict
from flux.server.routes.training import as_request, submit_captions, submit_training
from flux.server.schemas import (
    AdapterView,
    Deleted,
    FileView,
    JobDetail,
    JobRequest,
    JobView,
    PathName,
    TrainJob,
)
from flux.server.state import Server, State

router = APIRouter(tags=["jobs"])
LINES = 100  # of a log
LOOK, HEARTBEAT = 0.3, 15.0  # seconds
KINDS = {results.PLOT: "plot", results.EVENTS: "numbers", "options.json": "options"}


@router.get("/jobs")
def all_jobs(
    server: State,
    state: Literal["queued", "running", "done", "failed", "cancelled"] | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> list[JobView]:
    """The newest jobs, the newest first."""
    return [JobView(**server.view(job)) for job in server.jobs.all(state, limit)]


@router.post("/jobs", status_code=201)
def new_job(body: JobRequest, server: State) -> JobDetail:
    """Put a job into the queue without waiting for it."""
    if isinstance(body, TrainJob):
        job, _ = submit_training(server, as_request(body.request))
    else:
        job = submit_captions(server, body.request)
    return detail(server, job)


@router.get("/jobs/{id}")
def one_job(id: str, server: State) -> JobDetail:
    """A job, with the last lines that its program printed."""
    return detail(server, server.jobs.get(id))


@router.post("/jobs/{id}/cancel")
def cancel(id: str, server: State) -> JobView:
    """Cancel a job: its processes are killed at once. Its states stay, for a resume."""
    job = server.jobs.cancel(id)
    server.keep_worker()
    return JobView(**server.view(job))


@router.post("/jobs/{id}/resume")
def resume(id: str, server: State) -> JobView:
    """Put a failed or cancelled job into the queue again; a training goes on from its last state."""
    job = server.jobs.resume(id)
    server.keep_worker()
    return JobView(**server.view(job))


@router.get(
    "/jobs/{id}/events",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def events(
    id: str, server: State, last_event_id: Annotated[str | None, Header()] = None
) -> StreamingResponse:
    """What happens in a job, as server-sent events: `state`, `step` with its numbers, `preview` with a URL.

    A `step`'s id is where to go on from: send it as Last-Event-ID.
    """
    job = await asyncio.to_thread(server.jobs.get, id)
    start = (
        int(last_event_id) if last_event_id and last_event_id.isdecimal() and len(last_event_id) < 19 else 0
    )
    stream = follow(server, job, start)
    return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})


async def follow(server: Server, job: Job, start: int) -> AsyncIterator[str]:
    """The events of a job until it has ended. start: the byte of its numbers to begin with."""
    news, quiet = News(server, start), 0.0
    while True:
        job = await asyncio.to_thread(server.jobs.get, job.id)
        new = await asyncio.to_thread(news.of, job)
        quiet = 0.0 if new else quiet + LOOK
        if quiet >= HEARTBEAT:
            new, quiet = [": still here\n\n"], 0.0
        for text in new:
            yield text
        if not job.is_active:
            return
        await asyncio.sleep(LOOK)


class News:
    """What has happened in a job since one looked the last time."""

    def __init__(self, server: Server, start: int):
        self._server = server
        self._start = start
        self._state = ""
        self._samples: set[str] = set()

    def of(self, job: Job) -> list[str]:
        """The events that are new."""
        view, new = self._server.view(job), []
        states = [event("state", view)] if job.state != self._state else []
        self._state = job.state
        if job.kind == "train" and job.state != QUEUED:
            new = [*self._steps(job, view["iterations"]), *self._previews(job)]
        return [*states, *new] if job.is_active else [*new, *states]  # the end comes last

    def _steps(self, job: Job, iterations: int | None) -> list[str]:
        path = self._server.folders.output(job.name) / results.EVENTS
        lines, self._start = results.updates(path, self._start, job.started)
        lines = [line for line in lines if line.get("event") in ("update", "validation")]
        return [event("step", line | {"iterations": iterations}, self._start) for line in lines]

    def _previews(self, job: Job) -> list[str]:
        found = results.samples(self._server.folders.output(job.name), job.started)
        names = [path.name for path in found if path.name not in self._samples]
        self._samples.update(names)
        return [event("preview", {"url": f"/outputs/{job.name}/progress/{name}"}) for name in names]


def event(name: str, data: Any, id: int | None = None) -> str:
    """A server-sent event."""
    number = "" if id is None else f"id: {id}\n"
    return f"event: {name}\n{number}data: {json.dumps(data)}\n\n"


def detail(server: Server, job: Job) -> JobDetail:
    """A job with its request and log."""
    return JobDetail(**server.view(job), request=job.request, logs=server.logs(job, LINES))


# --- What trainings have made ---


@router.get("/adapters")
def adapters(server: State) -> list[AdapterView]:
    """All adapters, the newest first: their names are what a request for pictures takes."""
    folders = [server.folders.outputs / name for name in subfolders(server.folders.outputs)]
    found = results.with_status(file for folder in folders for file in results.adapters(folder))
    newest = sorted(found, key=lambda file: found[file].st_mtime, reverse=True)
    return [adapter_view(file.parent.name, file.name, found[file]) for file in newest]


def adapter_view(run: str, file: str, status: Any) -> AdapterView:
    """An adapter as clients see it."""
    stem = file.removesuffix(".safetensors")
    name = run if stem == run else f"{run}/{stem}"
    return AdapterView(name=name, bytes=status.st_size, changed=status.st_mtime, url=f"/outputs/{run}/{file}")


@router.get("/outputs/{name}")
def output(name: PathName, server: State) -> list[FileView]:
    """The files of a run: adapters, sample pictures, the plot of its loss, its numbers and options."""
    folder = existing(server.folders.output(name), f"run {name}")
    found = []
    for path, status in results.with_status(results.shown(folder)).items():
        inner = path.relative_to(folder).as_posix()
        kind: Any = KINDS.get(inner, "sample" if inner.startswith(results.SAMPLES) else "adapter")
        found.append(
            FileView(
                name=inner, kind=kind, bytes=status.st_size, changed=status.st_mtime,
                url=f"/outputs/{name}/{inner}",
            )
        )  # fmt: skip
    return found


@router.delete("/outputs/{name}")
def delete_output(name: PathName, server: State) -> Deleted:
    """Delete all files of a run, so that its name is free again. Its jobs stay in the list."""
    folder = existing(server.folders.output(name), f"run {name}")
    for job in server.jobs.active():
        if job.kind == "train" and job.name.lower() == name.lower():
            raise conflict(f"the job {job.id} works on {name}: wait for it, or cancel it")
    results.delete(folder)
    return Deleted(message=f"the files of {name} are deleted")


@router.get("/outputs/{name}/{file:path}", response_class=FileResponse)
def output_file(name: PathName, file: str, server: State) -> FileResponse:
    """Download a file of a run."""
    folder = existing(server.folders.output(name), f"run {name}")
    what = f"file {file[:100]!a} of the run {name}"
    path = listed(folder, file, what)
    if path not in results.shown(folder):
        raise absent(f"there is no {what}")
    return FileResponse(path, filename=path.name)
