"""Does the built-in model draw what the prompt says? Pictures of held-out prompts, judged by renderings.

    python -m flux.recipes.tiny.evaluate [--model tiny] [--count 400]

A picture's background is the colour nearest to the median of its outermost pixels. Its subject and place are
those of the rendering, among all subjects and places at the prompt's size on that background, with the least
squared distance in RGB over all pixels. Intervals are Wilson's, 95 %.

The caption of a picture determines its rendering: SSIM and PSNR to that, in the box of the subject, say how
good a drawing it is, beside what the autoencoder alone makes of the rendering. Natural prompts are wordings
that no training caption has. --page draws the prompts of prompts.tsv, the same ones with the same seeds.
"""

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from flux.arguments import described, run_program
from flux.arguments import size as height_and_width
from flux.distributed.ranks import Ranks
from flux.errors import FluxError
from flux.evaluation.likeness import psnr
from flux.evaluation.proportion import Proportion, Z
from flux.generation import generate
from flux.pipeline import FluxPipeline
from flux.recipes.emoji import (
    COLOURS,
    PLACES,
    SIDE,
    Composition,
    Renderer,
    captions,
    compositions,
    subjects,
)
from flux.recipes.tiny import recipe
from flux.recipes.tiny.judge import (
    SubjectJudge,
    likeness,
    natural_prompts,
    page_prompts,
    reconstruct,
    scene_of,
)
from flux.requests import Request


class Judge:
    """Says what a picture shows."""

    def __init__(self) -> None:
        self._render = Renderer()

    def background(self, picture: np.ndarray) -> str:
        """The colour of the picture's (64, 64, 3) outermost pixels."""
        frame = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        distances = np.square(np.array(list(COLOURS.values())) - np.median(frame, axis=0)).sum(axis=1)
        return list(COLOURS)[int(distances.argmin())]

    def subjects_and_places(self, pictures: np.ndarray, size: str, colour: str) -> list[tuple[str, str]]:
        """Of the nearest rendering at this size, on this background; pictures (B, 64, 64, 3)."""
        composed = [Composition((name,), colour, size, place) for name in subjects() for place in PLACES]
        known = np.stack([self._render(c) for c in composed]).reshape(len(composed), -1).astype(np.float32)
        flat = pictures.reshape(len(pictures), -1).astype(np.float32)
        distances = np.square(known).sum(axis=1) - 2 * flat @ known.T  # and |picture|^2, the same for all
        return [(composed[i].subjects[0], composed[i].place) for i in distances.argmin(axis=1)]


def held_out_prompts(count: int, seed: int = 0) -> list[tuple[Composition, str]]:
    """The first `count` of a fixed order of the held-out compositions, each with one of its captions.

    They are of the subjects that the model was trained on.
    """
    every = compositions(True, list(subjects())[: recipe.SUBJECTS])
    if not 1 <= count <= len(every):
        raise FluxError(f"--count {count}: there are {len(every)} held-out compositions")
    rng = np.random.default_rng(seed)
    chosen = [every[i] for i in rng.permutation(len(every))[:count]]
    return [(c, str(rng.choice(captions(c)))) for c in chosen]


def judge(pictures: np.ndarray, shown: Sequence[Composition]) -> dict[str, Proportion]:
    """How many pictures (B, 64, 64, 3) uint8 show what their compositions say."""
    judge, right = Judge(), {"subject": 0, "background": 0, "place": 0, "all three": 0}
    groups: dict[tuple[str, str], list[int]] = {}  # of one size and background, to compare at once
    for i, composition in enumerate(shown):
        groups.setdefault((composition.size, judge.background(pictures[i])), []).append(i)
    for (size, colour), rows in groups.items():
        found = judge.subjects_and_places(pictures[rows], size, colour)
        for i, (subject, place) in zip(rows, found, strict=True):
            asked = shown[i]
            verdicts = [subject == asked.subjects[0], colour == asked.colour, place == asked.place]
            for name, verdict in zip(right, (*verdicts, all(verdicts)), strict=True):
                right[name] += verdict
    return {name: Proportion(count, len(shown)) for name, count in right.items()}


def draw(
    pipeline: FluxPipeline, prompts: Sequence[str], size: tuple[int, int] = (SIDE, SIDE)
) -> tuple[np.ndarray, float]:
    """A picture of each prompt, (B, H, W, 3) uint8 of (height, width), and the seconds that one took."""
    pipeline.known_words = None  # nobody asks what it does not know, as the figures will say it
    requests = [Request(prompt, seeds=(i,), image_size=size) for i, prompt in enumerate(prompts)]
    start = time.perf_counter()
    pictures = list(generate(pipeline, requests, stream=True, keep_models=True, progress=True))
    return np.stack(pictures), (time.perf_counter() - start) / len(prompts)


def evaluate(pipeline: FluxPipeline, count: int) -> tuple[dict[str, Any], np.ndarray]:
    """All figures of a model, by name, and its pictures of the first `count` held-out prompts."""
    shown, prompts = zip(*held_out_prompts(count), strict=True)
    pictures, seconds = draw(pipeline, prompts)
    render = Renderer()
    true = np.stack([render(composition) for composition in shown])
    decoded = reconstruct(pipeline.ae, true)
    values = psnr(true, decoded)
    reach = Z * values.std() / math.sqrt(count)
    scenes = [scene_of(composition) for composition in shown]
    figures = {f"{name} right": str(share) for name, share in judge(pictures, shown).items()}
    low = 10 * math.log10(255**2 / np.square(true.astype(np.float32) - decoded).mean())
    figures["autoencoder PSNR"] = (
        f"{values.mean():.2f} dB (95 % interval +-{reach:.2f}; of the mean error {low:.2f} dB)"
    )
    figures["likeness"] = str(likeness(list(pictures), scenes))
    figures["autoencoder likeness"] = str(likeness(list(decoded), scenes))
    figures["seconds a picture"] = f"{seconds:.2f}"
    return figures, pictures


def natural(pipeline: FluxPipeline, count: int, size: tuple[int, int] = (SIDE, SIDE)) -> Proportion:
    """How many of the first natural prompts' pictures of (height, width) show their subject."""
    prompts, names = zip(*natural_prompts(count), strict=True)
    pictures, judged = draw(pipeline, prompts, size)[0], SubjectJudge(size)
    right = sum(judged(picture) == name for picture, name in zip(pictures, names, strict=True))
    return Proportion(right, count)


def page(pipeline: FluxPipeline, size: tuple[int, int], columns: int = 8) -> Image.Image:
    """A page of the fixed prompts' pictures of (height, width), each above its prompt."""
    prompts = page_prompts()
    pictures, _ = draw(pipeline, prompts, size)
    height, width = size[0] + 14, max(size[1], 128) + 4
    rows = math.ceil(len(prompts) / columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        x, y = width * (i % columns), height * (i // columns)
        sheet.paste(Image.fromarray(picture), (x, y))
        pen.text((x + 1, y + size[0]), prompt[: width // 6], "black")
    return sheet


def main() -> int:
    """Run the program; its exit status: 0, 2 for bad input, 130 when interrupted."""
    return run_program(run)


def run(ranks: Ranks) -> int:
    """Do what the command line asks for."""
    parser = described(__doc__)
    parser.add_argument("--model", default="tiny", help="name or folder (default: %(default)s)")
    parser.add_argument("--count", type=int, default=400, help="held-out prompts (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, help="folder for figures.json and a grid of the first pictures"
    )
    parser.add_argument("--page", type=Path, help="draw the fixed prompts into this picture, and end")
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=height_and_width,
        default=[(SIDE, SIDE)],
        metavar="HxW",
        help="of the natural prompts' pictures; the page has the first (default: 64x64)",
    )
    arguments = parser.parse_args()
    if arguments.page:
        page(FluxPipeline(arguments.model), arguments.sizes[0]).save(arguments.page)
        print(arguments.page)
        return 0
    pipeline = FluxPipeline(arguments.model)
    figures, pictures = evaluate(pipeline, arguments.count)
    for height, width in arguments.sizes:
        right = natural(pipeline, arguments.count, (height, width))
        figures[f"natural {height}x{width}, right"] = str(right)
    print(f"{arguments.model}: {arguments.count} held-out prompts, {recipe.SUBJECTS} subjects")
    for name, value in figures.items():
        print(f"  {name:20} {value}")
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "figures.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
        whole = pictures[: len(pictures) // 20 * 20][:200].reshape(-1, 20, SIDE, SIDE, 3)  # rows of 20
        grid = whole.transpose(0, 2, 1, 3, 4).reshape(-1, 20 * SIDE, 3)
        Image.fromarray(grid).save(arguments.output / "pictures.png")
        print(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
