"""OpenAI's images API, so that its clients work with another base URL."""

import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from flux.server import forms, pictures
from flux.server.pictures import Event, Order
from flux.server.problems import Problem, absent, conflict
from flux.server.schemas import Made, ModelList, ModelView, PictureRequest, PicturesAnswer
from flux.server.security import answer
from flux.server.state import State

LOOK = 1.0  # seconds from one look at whether the client is there to the next
router = APIRouter(prefix="/v1", tags=["pictures"])
USAGE = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}  # OpenAI's clients look for it


@router.get("/models")
def models(server: State) -> ModelList:
    """The models that a request may name."""
    return ModelList(data=[ModelView(id=name) for name in pictures.models(server.settings)])


@router.get("/models/{name:path}")
def model(name: str, server: State) -> ModelView:
    """A model that a request may name."""
    if name not in pictures.models(server.settings):
        raise absent(f"there is no model {name[:100]!a}")
    return ModelView(id=name)


@router.post(
    "/images/generations",
    response_model=PicturesAnswer,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def generate(body: PictureRequest, server: State, request: Request) -> Any:
    """Make pictures of a prompt. With `stream`, as server-sent events."""
    job = pictures.to_job(server.settings, body.model_dump(exclude_none=True))
    order = server.painter.order(job, body.keep_alive)
    return await respond(order, body.stream, "image_generation", request)


@router.post(
    "/images/edits",
    response_model=PicturesAnswer,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
    openapi_extra=forms.edit_form(),
)
async def edit(request: Request, server: State) -> Any:
    """Change a picture where a mask is transparent; without one everywhere. A form, as OpenAI has it."""
    body, files = await forms.read(request)
    job = pictures.to_job(server.settings, body.model_dump(exclude_none=True))
    order = server.painter.order(job | files | {"strength": body.strength}, body.keep_alive)
    return await respond(order, body.stream, "image_edit", request)


async def respond(order: Order, stream: bool, kind: str, request: Request) -> Any:
    """The answer to an order. A refusal comes before any of it."""
    job = order.job
    first = await patiently(order, request)  # "started"
    facts = {"output_format": job["format"], "size": "x".join(map(str, reversed(first["size"])))}
    if stream:
        return StreamingResponse(streamed(order, facts, kind), media_type="text/event-stream")
    data = []
    while (event := await patiently(order, request))["event"] != "done":
        if event["event"] == "picture":
            data.append(Made(b64_json=event["picture"], seed=event["seed"]))
    return PicturesAnswer(
        created=int(time.time()), data=data, seeds=job["seeds"], model=job["model"], **facts
    )


async def patiently(order: Order, request: Request) -> Event:
    """What happens next with an order, for as long as the client is there."""
    while True:
        try:
            return await order.next(LOOK)
        except TimeoutError:
            if await request.is_disconnected():
                order.leave()
                raise conflict("the client has gone") from None


async def streamed(order: Order, facts: dict[str, str], kind: str) -> AsyncIterator[str]:
    """Events as OpenAI's API has them: partial pictures, then each whole one."""
    numbers: dict[int, int] = {}  # of a picture's partial ones
    shared = {**facts, "created_at": int(time.time()), "quality": "auto", "background": "opaque"}
    try:
        async for event in order.rest():
            data = shared | {"b64_json": event["picture"], "image_index": event["index"]}
            if event["event"] == "partial":
                number = numbers[event["index"]] = numbers.get(event["index"], -1) + 1
                yield named(f"{kind}.partial_image", data | {"partial_image_index": number})
            else:
                yield named(f"{kind}.completed", data | {"seed": event["seed"], "usage": USAGE})
    except Problem as problem:
        yield f"event: error\ndata: {json.dumps(answer(problem.status, str(problem)))}\n\n"
    finally:
        order.leave()


def named(kind: str, data: dict[str, Any]) -> str:
    """A server-sent event of OpenAI's API."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n"
