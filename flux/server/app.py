"""The application: its routes, its guard, and how errors are answered."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from flux.errors import FluxError
from flux.outputs import InUse
from flux.server.problems import Problem, sentence_of
from flux.server.routes import about, datasets, jobs, pictures, training
from flux.server.schemas import Error
from flux.server.security import Guard, answer
from flux.server.settings import Settings
from flux.server.state import Server
from flux.version import __version__

PAGE = Path(__file__).with_name("page")
STATUSES = (400, 401, 404, 409, 413, 422, 429)
NO_DOCS: dict[str, Any] = {"docs_url": None, "redoc_url": None}  # their pages load scripts from elsewhere
RESPONSES: dict[int | str, dict[str, Any]] = {status: {"model": Error} for status in STATUSES}


def create_app(settings: Settings) -> FastAPI:
    """The application for a server with these settings. Makes its folders."""
    server = Server(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with server.running():
            yield

    app = FastAPI(
        title="FLUX.1 in MLX", version=__version__, lifespan=lifespan, responses=RESPONSES, **NO_DOCS
    )
    app.state.server = server
    for module in (training, pictures, jobs, datasets, about):
        app.include_router(module.router)
    app.mount("/page", StaticFiles(directory=PAGE))
    app.add_exception_handler(FluxError, refused)
    app.add_exception_handler(RequestValidationError, not_valid)
    app.add_exception_handler(HTTPException, not_routed)
    app.add_exception_handler(Exception, failed)
    app.add_middleware(Guard, settings=settings)
    return app


def respond(status: int, sentence: str, headers: Any = None) -> JSONResponse:
    """A refusal."""
    return JSONResponse(answer(status, sentence), status, headers)


async def refused(request: Request, error: Exception) -> JSONResponse:
    """A FluxError: bad input."""
    status = error.status if isinstance(error, Problem) else 409 if isinstance(error, InUse) else 422
    text = " ".join(str(error).split()).encode("ascii", "backslashreplace").decode()
    return respond(status, text, {"Retry-After": "10"} if status == 429 else None)


async def not_valid(request: Request, error: Exception) -> JSONResponse:
    """A request whose form is wrong: 400 where it is not even JSON, else 422."""
    assert isinstance(error, RequestValidationError)
    errors = error.errors()
    is_json = not any(each["type"] == "json_invalid" for each in errors)
    return respond(422 if is_json else 400, sentence_of(list(errors)))


async def not_routed(request: Request, error: Exception) -> JSONResponse:
    """What Starlette refuses: an unknown path, a method that a path does not have."""
    assert isinstance(error, HTTPException)
    return respond(error.status_code, str(error.detail), error.headers)


async def failed(request: Request, error: Exception) -> JSONResponse:
    """A defect: the log has its traceback, the client a sentence."""
    logging.getLogger("uvicorn.error").error("a defect in %s", request.url.path, exc_info=error)
    return respond(500, "the server has a defect; its log says more")
