"""Pictures: requests in OpenAI's form, and the process that answers them with a model that stays loaded."""

import asyncio
import json
import sys
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from flux import sampler
from flux.server import commands
from flux.server.problems import Problem, too_many, wrong
from flux.server.settings import Settings
from flux.server.worker import environment
from flux.weights import registry

LOOK = 0.2  # seconds from one look at whether somebody waits for a picture to the next
LINE = 2**28  # bytes that an answer of the generator may have
OTHERS = ("dall-e", "gpt-image", "chatgpt-image")  # models of OpenAI's: clients have one set by default
FOREVER = -1

Event = dict[str, Any]


class Order:
    """A request for pictures on its way. keep_alive: seconds that the model stays; None: the server's."""

    def __init__(self, job: Mapping[str, Any], keep_alive: float | None):
        self.job = dict(job)
        self.keep_alive = keep_alive
        self.is_left = False  # nobody waits for it any more
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def put(self, event: Event) -> None:
        """Hand over what has happened."""
        self._events.put_nowait(event)

    async def next(self, seconds: float | None = None) -> Event:
        """What happens next. TimeoutError after so many seconds, Problem where the generator refuses."""
        event = await asyncio.wait_for(self._events.get(), seconds)
        if event["event"] == "error":
            raise Problem(event["status"], event["message"])
        return event

    async def rest(self) -> AsyncIterator[Event]:
        """Partial and whole pictures until all are made. Left when nobody asks for more."""
        try:
            while (event := await self.next())["event"] != "done":
                yield event
        finally:
            self.leave()

    def leave(self) -> None:
        """Say that nobody waits for it any more."""
        self.is_left = True


class Painter:
    """Sends orders to the generator, one at a time, and lets it go after a while of idleness."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._process: Process | None = None
        self._orders: deque[Order] = deque()
        self._has_orders = asyncio.Event()
        self._numbers = count(1)
        self._timer: asyncio.TimerHandle | None = None
        self.is_at_work = False
        self.size = 0  # bytes of the model that is loaded

    @property
    def is_loaded(self) -> bool:
        """Whether there is a generator, with a model in memory."""
        return self._process is not None and self._process.returncode is None

    def order(self, job: Mapping[str, Any], keep_alive: float | None) -> Order:
        """Put a request into the row: see `flux.server.generator.Job`. Problem where too many wait."""
        if len(self._orders) >= self._settings.max_waiting:
            raise too_many(f"{self._settings.max_waiting} requests for pictures are waiting: try again later")
        order = Order(job, keep_alive)
        self._orders.append(order)
        self._has_orders.set()
        return order

    async def run(self) -> None:
        """Attend to orders, for ever."""
        while True:
            while not self._orders:
                self._has_orders.clear()
                await self._has_orders.wait()
            order = self._orders.popleft()
            self._stay()
            self.is_at_work = True
            try:
                if not order.is_left:
                    await self._attend(order)
            except (OSError, ValueError) as error:
                order.put(_error(f"the generator does not work: {error}"))
            finally:
                self.is_at_work = False
                self._leave_after(self._settings.keep_alive if order.keep_alive is None else order.keep_alive)

    async def _attend(self, order: Order) -> None:
        """Hand an order to the generator, and what happens to the order."""
        process = await self._started()
        assert process.stdout is not None
        id, is_cancelled = next(self._numbers), False
        self._send(process, {**order.job, "id": id})
        reading = asyncio.ensure_future(process.stdout.readline())
        while True:
            await asyncio.wait([reading], timeout=LOOK)
            if order.is_left and not is_cancelled:
                self._send(process, {"cancel": id})
                is_cancelled = True
            if not reading.done():
                continue
            if not (line := reading.result()):
                await self.close()
                order.put(_error("the generator was ended: is there enough memory? Try again"))
                return
            event = json.loads(line)
            self.size = event.get("bytes", self.size)
            order.put(event)
            if event["event"] in ("done", "error", "cancelled"):
                return
            reading = asyncio.ensure_future(process.stdout.readline())

    def _send(self, process: Process, table: Mapping[str, Any]) -> None:
        assert process.stdin is not None
        process.stdin.write(json.dumps(table).encode() + b"\n")

    async def _started(self) -> Process:
        if self._process is None or self._process.returncode is not None:
            words = [sys.executable, "-m", "flux.server.generator", str(self._settings.folders.root)]
            with (self._settings.folders.logs / ".generator.log").open("ab") as log:
                self._process = await asyncio.create_subprocess_exec(
                    *words, stdin=PIPE, stdout=PIPE, stderr=log, env=environment(), limit=LINE
                )
        return self._process

    # --- Memory ---

    def _stay(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _leave_after(self, seconds: float) -> None:
        if seconds == 0:
            self.leave()
        elif seconds != FOREVER:
            self._timer = asyncio.get_running_loop().call_later(seconds, self.leave)

    def leave(self) -> None:
        """End the generator: its memory is free at once."""
        self._stay()
        if self.is_loaded and self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()
        self._process = None

    async def close(self) -> None:
        """As `leave`, and wait until the generator has ended."""
        process = self._process
        self.leave()
        if process is not None:
            await process.wait()


def _error(message: str) -> Event:
    return {"event": "error", "status": 409, "message": message}


# --- Requests ---


def to_job(settings: Settings, request: Mapping[str, Any], room: int | None) -> dict[str, Any]:
    """A request of OpenAI's images API, with our further fields, as the generator takes it.

    room: bytes that the model may take. Problem for what cannot be made.
    """
    if not request["prompt"].strip():
        raise wrong("the prompt is empty: say what the picture should show")
    name = model_name(settings, request.get("model"))
    adapters = request.get("adapters") or []
    files = commands.adapters(settings.folders, adapters)
    seed = request.get("seed")
    first = sampler.random_seed() if seed is None else seed
    job = {key: request.get(key) for key in ("steps", "guidance", "negative_prompt", "cfg_scale")}
    return job | {
        "prompt": " ".join(request["prompt"].split()),
        "seeds": [first + i for i in range(request["n"])],
        "model": name,
        "model_file": commands.model(settings.folders, name),
        "adapters": [[each["name"], each.get("strength", 1.0)] for each in adapters],
        "adapter_files": [[file, strength] for file, strength in files],
        "format": request["output_format"],
        "compression": request.get("output_compression"),
        "size": size_of(request.get("size")),
        "partial_images": request.get("partial_images") or 0,
        "room": room,
    }


def model_name(settings: Settings, asked: str | None) -> str:
    """The model of a request: the server's where none, or one of OpenAI's, is named."""
    return settings.model if not asked or asked.startswith(OTHERS) else asked


def size_of(text: str | None) -> list[int] | None:
    """[height, width] of "WIDTHxHEIGHT"; None for the model's."""
    if text in (None, "auto"):
        return None
    width, height = str(text).split("x")
    return [int(height), int(width)]


def models(settings: Settings) -> list[str]:
    """The names of models: the server's first, those of the registry, and what is in models/."""
    folder = settings.folders.models
    found = [path.name for path in sorted(folder.iterdir()) if is_model(path)]
    known = [spec.name for spec in registry.MODELS]
    return list(dict.fromkeys([settings.model, *known, *found]))


def is_model(path: Path) -> bool:
    """Whether a file or folder in models/ may be a model, by its name or what is in it."""
    if path.is_dir():
        return (path / "model_index.json").is_file() or any(path.glob("flux*.s*t*"))
    return path.name.lower().startswith("flux") and path.suffix in (".safetensors", ".sft", ".gguf")
