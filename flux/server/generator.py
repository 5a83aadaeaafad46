"""The process that makes pictures: it keeps a model loaded, and takes one request at a time.

`python -m flux.server.generator` reads requests from its input and writes what happens to its output, both as
lines of JSON; what else is said goes to the error stream. It ends with its input.
"""

import base64
import io
import json
import os
import queue
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import flux  # noqa: F401  before mlx.core, so that OpenBLAS is there first

# isort: split
import mlx.core as mx
import numpy as np
from PIL import Image

from flux import generation, images, metadata, sampler
from flux.conditioning.edit import ALPHA, Edit
from flux.conditioning.pictures import Picture
from flux.conditioning.variants import REFERENCE
from flux.errors import FluxError
from flux.metadata import Recipe
from flux.pipeline import FluxPipeline
from flux.requests import Request, ResolvedRequest
from flux.trees import named_arrays
from flux.weights import checkpoints

OPAQUE = 255
UNMASKED_STRENGTH = 0.75  # where a request says none: from noise alone nothing of the picture would be left
SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
Say = Callable[..., None]


class Cancelled(Exception):
    """Nobody waits for the picture any more."""


@dataclass(frozen=True)
class Job:
    """A request, as the server sends it. model, adapters: for people; the files are what is read.

    size: (height, width). room: bytes that the model may take, None for as many as it likes.
    compression: 0 to 100, of JPEG and WebP. images: [name, base64] of files that are changed. mask: of one
    that is transparent where the picture changes or, without transparency, white.
    """

    id: int
    prompt: str
    seeds: list[int]
    model: str
    model_file: str
    adapters: list[list[Any]]
    adapter_files: list[list[Any]]
    format: str = "png"
    size: list[int] | None = None
    steps: int | None = None
    guidance: float | None = None
    negative_prompt: str | None = None
    cfg_scale: float | None = None
    partial_images: int = 0
    compression: int | None = None
    room: int | None = None
    images: list[list[str]] = field(default_factory=list)
    mask: list[str] | None = None
    strength: float | None = None


class Generator:
    """Makes the pictures of requests; the model of the last one stays loaded."""

    def __init__(self, say: Say, is_cancelled: Callable[[int], bool]):
        """say(id, event, **values): tells the server what happens."""
        self._say = say
        self._is_cancelled = is_cancelled
        self._key: tuple | None = None
        self._pipeline: FluxPipeline | None = None

    def make(self, job: Job) -> None:
        """Make a request's pictures. FluxError for what makes none, Cancelled."""
        pipeline = self._load(job)
        given = [read_picture(file) for file in job.images]
        is_told = pipeline.spec.input == REFERENCE and not job.mask and job.strength is None
        request = Request(
            job.prompt,
            tuple(job.seeds),
            job.negative_prompt,
            tuple(job.size) if job.size else None,  # type: ignore[arg-type]
            job.steps,
            job.guidance,
            job.cfg_scale,
            edit=None if is_told else edit_of(job, given),
            references=tuple(given) if is_told else (),
        ).resolved(pipeline)
        self._say(job.id, "started", size=request.image_size, bytes=bytes_of(pipeline))
        preview = Preview(pipeline, request, job.partial_images)

        def on_step(single: ResolvedRequest, step: int, x: mx.array) -> None:
            if self._is_cancelled(job.id):
                raise Cancelled
            picture = preview(single, step, x)
            if picture is not None:
                content = encoded(picture, job.format, job.compression)
                self._say(job.id, "partial", index=job.seeds.index(single.seeds[0]), picture=content)

        pictures = generation.generate(pipeline, [request], on_step=on_step, stream=True, keep_models=True)
        recipe = recipe_of(job, request, pipeline)
        for index, picture in enumerate(pictures):
            content = encoded(picture, job.format, job.compression, recipe, index)
            self._say(job.id, "picture", index=index, seed=job.seeds[index], picture=content)

    def _load(self, job: Job) -> FluxPipeline:
        """The model of a request with its adapters, not yet read; another one leaves memory first."""
        files = tuple((file, strength, os.stat(file).st_mtime_ns) for file, strength in job.adapter_files)
        key = (job.model_file, files)
        if self._pipeline is None or key != self._key:
            self._pipeline, self._key = None, None
            mx.clear_cache()
            check_model(job.model_file)
            pipeline = FluxPipeline(
                job.model_file, adapters=[(file, strength) for file, strength, _ in files]
            )
            self._pipeline, self._key = pipeline, key
        check_room(self._pipeline, job)
        return self._pipeline


def bytes_of(pipeline: FluxPipeline) -> int:
    """Bytes of a pipeline's weights, which need not be read for it."""
    parts = (pipeline.flow, pipeline.ae, pipeline.clip, pipeline.t5)
    return sum(array.nbytes for part in parts for _, array in named_arrays(part.parameters()))


def check_room(pipeline: FluxPipeline, job: Job) -> None:
    """MemoryError where the model does not fit beside what else there is."""
    if job.room is not None and (needed := bytes_of(pipeline)) > job.room:
        raise MemoryError(
            f"the model {job.model} needs {needed / 1e9:.2f} GB, and a training leaves "
            f"{max(0, job.room) / 1e9:.2f} GB: wait for its end, or cancel it"
        )


class Preview:
    """What a picture will be, as far as one can tell after a step: some times while it is made."""

    def __init__(self, pipeline: FluxPipeline, request: ResolvedRequest, count: int):
        """count: how many previews there are of each picture."""
        height, width = request.latent_size
        self._pipeline = pipeline
        tokens = height // 2 * (width // 2)
        shift = pipeline.spec.shift
        times = sampler.timesteps(request.steps, tokens, shift, request.schedule)
        self._times = sampler.from_strength(times, request.strength)
        last = len(self._times) - 2  # after it comes the picture itself
        self._steps = {last * (i + 1) // (count + 1) for i in range(count)} if last else set[int]()
        self._before: mx.array | None = None

    def __call__(self, request: ResolvedRequest, step: int, x: mx.array) -> np.ndarray | None:
        """A picture (H, W, 3), uint8, after a step with the latent x (1, L, C); None where none is due.

        Along the straight way from noise to picture: x - t * (x' - x) / (t' - t).
        """
        before = self._before
        if step == 0:  # a picture that is changed may begin with another latent: it has no preview then
            is_noise = request.strength == 1
            before = self._pipeline.noise(request.seeds, request.latent_size) if is_noise else None
        self._before = x
        if step not in self._steps or before is None:
            return None
        start, end = self._times[step], self._times[step + 1]
        picture = x - end * (x - before) / (end - start)
        return generation.decode(self._pipeline, request, [picture])[0]


def edit_of(job: Job, pictures: list[Picture]) -> Edit | None:
    """What a request changes. Without a mask the picture's transparency is one. FluxError for several."""
    if not pictures:
        return None
    if len(pictures) > 1:
        raise FluxError(f"{len(pictures)} pictures are given: the model {job.model} changes one")
    (image,) = pictures
    mask: Picture | str | None = None
    if job.mask is not None:
        mask = read_mask(read_picture(job.mask))
    elif image.alpha is not None and image.alpha.min() < OPAQUE:
        mask = ALPHA
    strength = (UNMASKED_STRENGTH if mask is None else 1.0) if job.strength is None else job.strength
    return Edit(image, strength, mask)


def read_picture(file: list[str]) -> Picture:
    """The picture of [name, base64]."""
    name, content = file
    return Picture.from_bytes(name, base64.b64decode(content))


def read_mask(picture: Picture) -> Picture:
    """A mask of OpenAI's, which is transparent where the picture changes, as one of ours, white there."""
    if picture.alpha is None:
        return picture
    return Picture.from_array(np.repeat(OPAQUE - picture.alpha[..., None], 3, axis=2))


def recipe_of(job: Job, request: ResolvedRequest, pipeline: FluxPipeline) -> Recipe:
    """What the pictures remember of how they were made, without paths of this machine."""
    options = {name: getattr(request, name) for name in ("steps", "guidance", "cfg_scale", "negative_prompt")}
    options |= {"model": job.model, "dtype": str(pipeline.flow.dtype).removeprefix("mlx.core.")}
    adapters = [(name, strength) for name, strength in job.adapters]
    made_from = {picture.name: picture.sha256 for picture in request.references}
    options["reference"] = list(made_from)
    if request.edit is not None:
        image = request.edit.image
        options |= {"image": image.name, "strength": request.edit.strength}
        options |= {"mask": job.mask[0] if job.mask else request.edit.mask}
        made_from = {image.name: image.sha256}
    count, size = len(job.seeds), request.image_size
    return Recipe((job.prompt,), job.seeds[0], count, 1, options, adapters, size, pictures=made_from)


def encoded(
    picture: np.ndarray, format: str, compression: int | None, recipe: Recipe | None = None, index: int = 0
) -> str:
    """A picture (H, W, 3) as the base64 of a file."""
    if compression is not None and format != "png":
        out = io.BytesIO()
        Image.fromarray(picture).save(out, format.upper(), quality=compression)
        return base64.b64encode(out.getvalue()).decode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"picture{SUFFIXES[format]}"
        text = recipe.text(recipe.prompts, [recipe.seed + index], index) if recipe else {}
        images.save(path, picture, *(text, metadata.parameters(text)) if text else ())
        return base64.b64encode(path.read_bytes()).decode()


# --- Requests ---


class Requests:
    """The lines of the input, read beside the work: {"cancel": ID} concerns what is at work."""

    def __init__(self, lines: TextIO):
        self._queue: queue.Queue[Job | None] = queue.Queue()
        self._cancelled: set[int] = set()
        threading.Thread(target=self._read, args=[lines], daemon=True).start()

    def _read(self, lines: TextIO) -> None:
        for line in lines:
            table = json.loads(line)
            if "cancel" in table:
                self._cancelled.add(table["cancel"])
            else:
                self._queue.put(Job(**table))
        os._exit(0)  # the server has ended: nobody waits for what is at work

    def next(self) -> Job | None:
        """The next request, when it comes."""
        return self._queue.get()

    def is_cancelled(self, id: int) -> bool:
        """Whether nobody waits for a request any more."""
        return id in self._cancelled


class NoModel(FluxError):
    """A model that is not here and cannot be fetched."""


def check_model(model: str) -> None:
    """NoModel where a model of the Hub is not found; a file or a folder is looked into when it is loaded."""
    if Path(model).exists():
        return
    try:
        checkpoints.find(model)
    except FluxError as error:
        raise NoModel(str(error)) from None


def attend(generator: Generator, job: Job, say: Say) -> None:
    """Make a request's pictures, or say why there are none."""
    try:
        generator.make(job)
        say(job.id, "done")
    except Cancelled:
        say(job.id, "cancelled")
    except NoModel as error:
        say(job.id, "error", status=404, message=str(error))
    except FluxError as error:
        say(job.id, "error", status=422, message=str(error))
    except MemoryError as error:
        say(job.id, "error", status=409, message=str(error))
    except Exception as error:
        traceback.print_exc()
        say(job.id, "error", status=500, message=f"the generator has a defect: {type(error).__name__}")


def main() -> None:
    """Answer requests until the input ends."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer

    def say(id: int, event: str, **values: Any) -> None:
        print(json.dumps({"id": id, "event": event, **values}), file=out, flush=True)

    requests = Requests(sys.stdin)
    generator = Generator(say, requests.is_cancelled)
    while job := requests.next():
        attend(generator, job, say)


if __name__ == "__main__":
    main()
