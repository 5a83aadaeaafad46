"""The server itself: whether it is well, and what it can do."""

from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import FileResponse

from flux.server.capabilities import capabilities
from flux.server.jobs import RUNNING
from flux.server.state import State
from flux.version import __version__

router = APIRouter(tags=["about"])


@router.get("/", response_class=FileResponse, include_in_schema=False)
def page() -> FileResponse:
    """The page for people."""
    return FileResponse(Path(__file__).parents[1] / "page" / "index.html")


@router.get("/health")
def health(server: State) -> dict[str, Any]:
    """Whether the server answers, and how many jobs wait and run. Needs no token."""
    active = server.jobs.active()
    running = sum(job.state == RUNNING for job in active)
    return {"status": "ok", "version": __version__, "running": running, "queued": len(active) - running}


@router.get("/capabilities")
def all_capabilities() -> dict[str, Any]:
    """The programs' options, the keys of a data.toml, models and formats."""
    return capabilities()
