"""The documented API: pictures, captions, a data.toml, a training, its status."""

import asyncio
import time
from typing import Any

from fastapi import APIRouter, Response
from pydantic import BaseModel

from flux.server import commands, datasets, downloads
from flux.server.jobs import DONE, Job, New, new_id
from flux.server.problems import Problem, too_many
from flux.server.schemas import (
    CaptionAnswer,
    CaptionRequest,
    ConfigAnswer,
    DatasetConfig,
    DownloadAnswer,
    DownloadRequest,
    Status,
    TrainAnswer,
    TrainRequest,
    Waiting,
)
from flux.server.state import Server, State

router = APIRouter(tags=["datasets and training"])
PATIENCE = 900.0  # seconds that a request waits for captions
LINES = 10  # of a log
MOST_DOWNLOADS = 4  # requests at once


@router.post("/download-images")
async def download_images(body: DownloadRequest, server: State) -> DownloadAnswer:
    """Download pictures into a dataset, as JPEG."""
    folder = server.folders.dataset(body.output_name)
    if server.downloading >= MOST_DOWNLOADS:
        raise too_many(f"{MOST_DOWNLOADS} downloads are running, which is the most: try again later")
    server.downloading += 1
    try:
        done = await downloads.download(body.urls, folder, server.settings.private_urls)
    finally:
        server.downloading -= 1
    return DownloadAnswer(message="Download complete", files=done)


@router.post("/caption-images", responses={202: {"model": Waiting}})
async def caption_images(body: CaptionRequest, server: State, response: Response) -> CaptionAnswer | Waiting:
    """Caption a dataset, one text file a picture. Answers 202 where that takes longer than 15 minutes."""
    job = await asyncio.to_thread(submit_captions, server, body)
    end = time.monotonic() + PATIENCE
    while job.is_active and time.monotonic() < end:
        await asyncio.sleep(0.1)
        job = await asyncio.to_thread(server.jobs.get, job.id)
    if job.is_active:
        response.status_code = 202
        return Waiting(message="Captions are being generated", job_id=job.id)
    if job.state != DONE:
        raise Problem(409, f"the job {job.id} was {job.state}: {job.message or 'no captions were made'}")
    found = await asyncio.to_thread(datasets.pictures, server.folders, body.output_name)
    captions = await asyncio.to_thread(datasets.captions, found)
    return CaptionAnswer(message="Captions generated and saved", captions=captions)


@router.post("/create-dataset-config")
def create_dataset_config(body: DatasetConfig, server: State) -> ConfigAnswer:  # type: ignore[valid-type]
    """Write the data.toml of a dataset, with any key of its schema."""
    options = as_request(body)
    name, trigger = options.pop("output_name"), options.pop("trigger_word", "")
    options |= {"class_tokens": trigger} if trigger.strip() else {}
    path = datasets.write_config(server.folders, name, options)
    return ConfigAnswer(message="Dataset config created", path=str(path))


@router.post("/train")
def train(body: TrainRequest, server: State) -> TrainAnswer:  # type: ignore[valid-type]
    """Put a training into the queue."""
    job, notes = submit_training(server, as_request(body))
    return TrainAnswer(message="Training started", run_id=job.id, notes=notes)


@router.get("/status/{run_id}")
def status(run_id: str, server: State) -> Status:
    """How far a training has come."""
    job = server.jobs.get(run_id)
    view = server.view(job)
    values = {name: view[name] for name in ("state", "progress", "loss", "message")}
    return Status(run_id=run_id, logs=server.logs(job, LINES), **values)


# --- Into the queue ---


def as_request(body: BaseModel) -> dict[str, Any]:
    """What a client has said, and the defaults that are not null."""
    return body.model_dump(exclude_none=True)


def submit_training(server: Server, request: dict[str, Any]) -> tuple[Job, list[str]]:
    """The job of a training, and what is not used of the request."""
    id = request.get("id") or new_id(request["output_name"])
    notes: list[str] = []

    def make() -> New:
        new, said = commands.train(server.folders, request, id)
        notes.extend(said)
        return new

    like = New("train", request["output_name"], id, request, (), {})
    return server.submit(id, like, make), notes


def submit_captions(server: Server, body: CaptionRequest) -> Job:
    """The job of captioning a dataset."""
    request = as_request(body)
    id = body.id or new_id(body.output_name)
    like = New("caption", body.output_name, id, request, (), {})
    return server.submit(id, like, lambda: commands.caption(server.settings, request, id))
