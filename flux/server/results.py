"""What a training leaves in its folder: adapters, pictures, plots, and how far it has come."""

import json
import math
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

TAIL = 65536  # bytes of a file's end that are read
EVENTS, PLOT, SAMPLES, STATES = "events.jsonl", "loss.png", "progress", "states"
ITERATIONS = re.compile(r"iteration \d+/(\d+) \||; (\d+) iterations")  # as the trainer says it
EPOCH = re.compile(r"-(\d{6})\.safetensors")  # as the trainer numbers epochs


def publish(folder: Path, name: str) -> None:
    """Give the adapters of epochs their documented names: NAME-0001.safetensors."""
    for path in folder.glob(f"{name}-*.safetensors") if folder.is_dir() else ():
        if epoch := EPOCH.fullmatch(path.name[len(name) :]):
            with suppress(OSError):
                os.replace(path, folder / f"{name}-{int(epoch[1]):04d}.safetensors")


def newest_state(folder: Path) -> Path | None:
    """The folder of the state that a run would go on from."""
    found = [path for path in (folder / STATES).glob("*") if re.fullmatch(r"\d+", path.name)]
    return max(found, key=lambda path: path.name, default=None)


def adapters(folder: Path) -> list[Path]:
    """The adapters of a run, the oldest first."""
    found = with_status(folder.glob("*.safetensors"))
    return sorted(found, key=lambda path: found[path].st_mtime)


def with_status(paths: Iterable[Path]) -> dict[Path, os.stat_result]:
    """Files with their sizes and times; without those that are gone by now, as a run renames some."""
    found = {}
    for path in paths:
        with suppress(OSError):
            found[path] = path.stat()
    return found


def samples(folder: Path, since: float | None = None) -> list[Path]:
    """The pictures that show the progress of a run, in their order; those since a time."""
    found = sorted((folder / SAMPLES).glob("step*.png"))
    return [path for path, status in with_status(found).items() if status.st_mtime >= (since or 0.0)]


def shown(folder: Path) -> list[Path]:
    """All files of a run that are for people: adapters, pictures, the plot, the numbers, the options."""
    others = (folder / name for name in (PLOT, EVENTS, "options.json"))
    return [*adapters(folder), *samples(folder), *(path for path in others if path.is_file())]


def tail(path: Path) -> list[str]:
    """The last whole lines of a file, of any length; none where there is no file."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL))
        text = file.read(TAIL).decode("utf-8", "replace")
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    return [line for line in lines[size > TAIL :] if line]


def updates(path: Path, start: int, since: float | None) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of a file of events from a byte on, and the byte to go on from.

    None of a file that was not written since a time; all of one that is shorter now, and has begun anew.
    """
    if not path.is_file() or path.stat().st_mtime < (since or 0.0):
        return [], start
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(start if start <= size else 0)
        data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        end = file.tell() - len(data) + len(whole)
    return [line for text in whole.split(b"\n") if (line := _object(text))], end


def last_update(folder: Path, since: float) -> dict[str, Any]:
    """The newest line of a run's numbers; {} before the first, and where nothing was written since a time."""
    events = folder / EVENTS
    if not events.is_file() or events.stat().st_mtime < since:  # those of a run that was here before
        return {}
    for text in reversed(tail(events)):
        line = _object(text)
        if line.get("event") == "update":
            return line
    return {}


def iterations(lines: list[str]) -> int | None:
    """How many iterations a training has in all, by the lines that it printed; None before it says so."""
    said = [found[1] or found[2] for line in lines if (found := ITERATIONS.search(line))]
    return int(said[-1]) if said else None


def _object(text: str | bytes) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except ValueError:
        return {}
    if not isinstance(line, dict):
        return {}
    return {key: value for key, value in line.items() if not isinstance(value, float) or math.isfinite(value)}
