"""What adapters do, as one picture: checkpoints x strengths x prompts, all from the same noise.

A prompt that names the class but not the trigger shows what has leaked into the class. The model is read once
and each prompt is encoded once (once more for an adapter that changes the text encoders): the adapters are
put beside the weights and taken away again.

With pictures of the subject to compare with, a table below says how like it each cell is (CLIP-I).
"""

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image
from tqdm import tqdm

from flux import generation, sheets
from flux.adapters import Adapter, Adapters, fitting_parts, load, read_facts
from flux.adapters.folders import FOLDER_FILES
from flux.encoding import Encoded
from flux.errors import FluxError
from flux.pipeline import FluxPipeline
from flux.requests import Request, ResolvedRequest

STRENGTHS = (0.0, 0.4, 0.8, 1.0, 1.2)
TEXT_ENCODERS = ("clip", "t5")
BASE = (None, 0.0)
ANY_PROMPT = Request("")  # with the model's settings

# An adapter's number and its strength; BASE is the model alone.
Cell = tuple[int | None, float]


@dataclass(frozen=True)
class Named:
    """An adapter and the name that it has in the grid."""

    name: str
    adapter: Adapter


def read(paths: Sequence[Path]) -> list[Named]:
    """The adapters of files; of a training's folder all its checkpoints, in order.

    FluxError for a file that is not an adapter and a folder without one; what else is in a folder is left out
    with a warning.
    """
    found = []
    for path in paths:
        if not path.is_dir() or any((path / name).is_file() for name in FOLDER_FILES):
            found.append(Named(path.stem, load(path)))
            continue
        checkpoints = []
        for file in sorted(path.glob("*.safetensors"), key=_order):
            try:
                checkpoints.append(Named(file.stem, load(file)))
            except FluxError as error:
                warnings.warn(f"left out: {error}", stacklevel=2)
        if not checkpoints:
            raise FluxError(f"{path}: no adapter in this folder (*.safetensors)")
        found += checkpoints
    return found


def _order(file: Path) -> tuple[float, str]:
    """Checkpoints by the epoch or step in their name, and the last adapter, which has none, after them."""
    numbers = re.findall(r"\d{4,}", file.stem)  # padded with zeros, unlike the 1 of flux1
    return (int(numbers[-1]) if numbers else float("inf"), file.stem)


def grid(
    pipeline: FluxPipeline,
    adapters: Sequence[Named],
    prompts: Sequence[str],
    class_prompt: str | None = None,
    strengths: Sequence[float] = STRENGTHS,
    sampling: Request = ANY_PROMPT,
    likeness: Callable[[Sequence[np.ndarray]], float] | None = None,
) -> np.ndarray:
    """The labelled grid (H, W, 3), uint8: for each prompt rows of adapters and seeds, columns of strengths.

    The class prompt comes last. At strength 0 stands the picture of the model alone, the same in each row.
    sampling: seeds and settings; its prompt is not used.
    likeness: of pictures to the subject; its figures then stand in a table below.
    Takes the pipeline's text encoders and its transformer out of memory. FluxError, before the work begins,
    for an adapter of which nothing fits the model and for values that make no picture.
    """
    if not prompts and class_prompt is None:
        raise FluxError("no prompt; say what the pictures should show")
    networks = {"flux": pipeline.flow, "clip": pipeline.clip, "t5": pipeline.t5}
    parts = [fitting_parts(networks, each.name, each.adapter) for each in adapters]
    _warn_of_triggers(adapters, class_prompt)
    every = [*prompts, *([] if class_prompt is None else [class_prompt])]
    pictures = draw(pipeline, adapters, parts, every, strengths, sampling)
    titles = [f"prompt: {prompt}" for prompt in prompts]
    titles += [] if class_prompt is None else [f"class prompt, for leaks: {class_prompt}"]
    rows = list(_rows(pictures, adapters, titles, strengths, sampling.seeds))
    if likeness is not None:
        asked = len(prompts) * len(sampling.seeds)  # pictures of a cell before those of the class prompt
        groups = {"the prompts": slice(0, asked), "the class prompt": slice(asked, None)}
        rows += _likenesses(pictures, adapters, strengths, groups, likeness)
    return sheets.table(rows)


def _warn_of_triggers(adapters: Sequence[Named], class_prompt: str | None) -> None:
    for each in adapters:
        trigger = read_facts(each.adapter.metadata).get("trigger", "")
        if trigger and trigger.lower() in (class_prompt or "").lower():
            text = f"the class prompt {class_prompt!r} names the trigger {trigger!r}: it cannot show a leak"
            warnings.warn(text, stacklevel=3)
            return


def _rows(
    pictures: dict[Cell, list[np.ndarray]],
    adapters: Sequence[Named],
    titles: Sequence[str],
    strengths: Sequence[float],
    seeds: Sequence[int],
) -> Iterator[sheets.Row]:
    columns = [f"strength {strength:g}{'' if strength else ': the model alone'}" for strength in strengths]
    for number, title in enumerate(titles):
        yield title
        yield ["", *columns]
        for k, seed in enumerate(seeds):
            for i, each in enumerate(adapters):
                index = number * len(seeds) + k
                row = [pictures[_cell(i, strength)][index] for strength in strengths]
                yield [f"{each.name}\nseed {seed}", *(Image.fromarray(picture) for picture in row)]


def _likenesses(
    pictures: dict[Cell, list[np.ndarray]],
    adapters: Sequence[Named],
    strengths: Sequence[float],
    groups: dict[str, slice],
    likeness: Callable[[Sequence[np.ndarray]], float],
) -> Iterator[sheets.Row]:
    found = {
        (cell, group): likeness(drawn[which])
        for cell, drawn in pictures.items()
        for group, which in groups.items()
        if drawn[which]
    }
    yield "CLIP-I, likeness to the subject's pictures (mean of all pairs)"
    for i, each in enumerate(adapters):
        for group in groups:
            row = [found.get((_cell(i, strength), group)) for strength in strengths]
            if None not in row:
                yield [f"{each.name}\n{group}", *(f"{value:.3f}" for value in row)]


def _cell(adapter: int, strength: float) -> Cell:
    return (adapter, strength) if strength else BASE


def draw(
    pipeline: FluxPipeline,
    adapters: Sequence[Named],
    parts: Sequence[Sequence[str]],
    prompts: Sequence[str],
    strengths: Sequence[float],
    sampling: Request,
) -> dict[Cell, list[np.ndarray]]:
    """The pictures (H, W, 3), uint8, of each cell: of all seeds of the first prompt, then of the next.

    parts: the networks that each adapter fits. One stage is in memory at a time.
    """
    settings = sampling.resolved(pipeline)
    requests = [replace(settings, prompt=prompt) for prompt in prompts]
    encoded = encode(pipeline, adapters, parts, requests, strengths)
    del pipeline.clip, pipeline.t5
    mx.clear_cache()

    latents: dict[Cell, list[mx.array]] = {}
    total = len(encoded) * len(prompts) * len(settings.seeds) * settings.steps
    with tqdm(total=total, unit="step", disable=None) as bar:
        for cell in _put_on({"flux": pipeline.flow}, adapters, parts, list(encoded)):
            latents[cell] = generation.denoise(pipeline, requests, encoded[cell], lambda *_: bar.update())
    del pipeline.flow
    mx.clear_cache()
    return {c: [generation.decode(pipeline, settings, [x])[0] for x in xs] for c, xs in latents.items()}


def encode(
    pipeline: FluxPipeline,
    adapters: Sequence[Named],
    parts: Sequence[Sequence[str]],
    requests: Sequence[ResolvedRequest],
    strengths: Sequence[float],
) -> dict[Cell, Encoded]:
    """The requests' texts in every cell, evaluated; only adapters of the text encoders change them."""
    encoders = {"clip": pipeline.clip, "t5": pipeline.t5}
    cells = list(dict.fromkeys(_cell(i, s) for i in range(len(adapters)) for s in strengths))
    changing = [(i, s) for i, s in cells if i is not None and set(parts[i]) & set(TEXT_ENCODERS)]
    changed = {
        cell: generation.encode(pipeline, requests)
        for cell in _put_on(encoders, adapters, parts, [BASE, *changing])
    }
    return {cell: changed.get(cell, changed[BASE]) for cell in cells}


def _put_on(
    networks: dict, adapters: Sequence[Named], parts: Sequence[Sequence[str]], cells: Sequence[Cell]
) -> Iterator[Cell]:
    """Each cell, while the networks have its adapter at its strength, and in the end none."""
    attached: list[Adapters] = []
    current: int | None = None
    for number, strength in sorted(cells, key=lambda cell: -1 if cell[0] is None else cell[0]):
        if number is not None and number != current:
            _take_off(attached)
            attached, current = [], number
            for part in set(parts[number]) & networks.keys():
                attached.append(Adapters(networks[part]))
                attached[-1].add(adapters[number].adapter.part(part), strength, "shown")
        for each in attached:
            each.set_strength("shown", strength)
        yield number, strength
    _take_off(attached)


def _take_off(attached: list[Adapters]) -> None:
    for each in attached:
        each.remove("shown")
