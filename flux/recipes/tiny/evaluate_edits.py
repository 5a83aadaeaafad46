"""Does the built-in model change pictures as it is told? Renderings of held-out prompts, changed and judged.

    python -m flux.recipes.tiny.evaluate_edits [--model tiny] [--count 100] [--feather 0]

inpainting: a rendering shows another subject than the prompt names; the mask is the box that it stands in.
Right where all outside the box is the rendering to the bit, and the judge of `evaluate` finds the prompt's
subject, place and background.
outpainting: all that is given of a rendering is the subject's box, and the rest is added. Right where the box
is kept to the bit, and at least 95 % of what is added is nearest to the background's colour.
image to image: with strength 0 the autoencoder's picture, within a level of 255, with strength 1 that of the
prompt alone, to the bit.
seams: the mean step between the two pixels at a border of the mask, in levels of 255, beside the greatest
among the next six outside and the next one inside, in inpainted pictures. Intervals are Wilson's, 95 %.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flux import images
from flux.arguments import count, described, pixels, run_program
from flux.conditioning import Edit, Picture
from flux.conditioning.masks import Box, cut
from flux.distributed.ranks import Ranks
from flux.evaluation.likeness import psnr
from flux.evaluation.proportion import Proportion
from flux.generation import generate
from flux.pipeline import FluxPipeline
from flux.recipes.emoji import COLOURS, SIDE, SIZES, Composition, Renderer, corners, subjects
from flux.recipes.tiny import recipe
from flux.recipes.tiny.evaluate import Judge, held_out_prompts
from flux.recipes.tiny.judge import reconstruct
from flux.requests import Request

SHARE = 0.95  # of the added pixels, that must have the background's colour
NEAR = 7  # pixels outside a mask, in which a seam is looked for


def box_of(composition: Composition) -> Box:
    """The box that a composition's subject stands in."""
    (left, top), side = corners(composition)[0], SIZES[composition.size]
    return top, left, side, side


def another_subject(composition: Composition, rng: np.random.Generator) -> Composition:
    """The composition with another of the subjects that the model knows."""
    names = [name for name in list(subjects())[: recipe.SUBJECTS] if name != composition.subjects[0]]
    return replace(composition, subjects=(str(rng.choice(names)),))


def mask_of(composition: Composition) -> np.ndarray:
    """White where the composition's subject stands: (64, 64, 3)."""
    mask = np.zeros((SIDE, SIDE, 3), np.uint8)
    cut(mask, box_of(composition))[:] = 255
    return mask


def change(pipeline: FluxPipeline, prompts: Sequence[str], edits: Sequence[Edit | None]) -> np.ndarray:
    """A picture of each prompt, (B, 64, 64, 3) uint8; seed i for the i-th."""
    size = (SIDE, SIDE)
    requests = [
        Request(prompt, seeds=(i,), edit=edit, image_size=size if edit is None else None)
        for i, (prompt, edit) in enumerate(zip(prompts, edits, strict=True))
    ]
    return np.stack(list(generate(pipeline, requests, stream=True, keep_models=True, progress=True)))


def inpaint(
    pipeline: FluxPipeline, cases: Sequence[tuple[Composition, str]], options: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Renderings of other subjects, and what the model makes of them; each (B, 64, 64, 3) uint8."""
    rng, render = np.random.default_rng(0), Renderer()
    given = np.stack([render(another_subject(composition, rng)) for composition, _ in cases])
    edits = [
        Edit(Picture.from_array(picture), mask=Picture.from_array(mask_of(composition)), **options)
        for picture, (composition, _) in zip(given, cases, strict=True)
    ]
    return given, change(pipeline, [prompt for _, prompt in cases], edits)


def judge_inpainting(
    given: np.ndarray, made: np.ndarray, shown: Sequence[Composition], reach: int
) -> dict[str, Proportion]:
    """How many pictures are kept outside the mask and `reach` pixels around it, and show what they should."""
    judge, right = Judge(), {"kept": 0, "subject": 0, "all": 0}
    for before, after, composition in zip(given, made, shown, strict=True):
        top, left, side, _ = box_of(composition)
        outside = np.ones((SIDE, SIDE), bool)
        outside[max(0, top - reach) : top + side + reach, max(0, left - reach) : left + side + reach] = False
        kept = np.array_equal(before[outside], after[outside])
        colour = judge.background(after)
        subject, place = judge.subjects_and_places(after[None], composition.size, colour)[0]
        found = (subject, place, colour) == (composition.subjects[0], composition.place, composition.colour)
        right["kept"] += kept
        right["subject"] += subject == composition.subjects[0]
        right["all"] += kept and found
    return {name: Proportion(number, len(shown)) for name, number in right.items()}


def seam(made: np.ndarray, shown: Sequence[Composition]) -> tuple[float, float, float]:
    """Mean steps between neighbours across the mask's borders: at the border, outside of it, inside."""
    steps = []
    for picture, composition in zip(made, shown, strict=True):
        top, left, side, _ = box_of(composition)
        for rows, first, across in (
            (picture, top, left),
            (picture[::-1], SIDE - top - side, left),
            (picture.swapaxes(0, 1), left, top),
            (picture.swapaxes(0, 1)[::-1], SIDE - left - side, top),
        ):
            if first >= NEAR:  # else the mask touches the picture's edge there
                lines = rows[first - NEAR : first + 2, across : across + side].astype(np.float32)
                steps.append(np.abs(np.diff(lines, axis=0)).mean(axis=(1, 2)))
    *outside, border, inside = np.mean(steps, axis=0)
    return float(border), float(max(outside)), float(inside)


def outpaint(
    pipeline: FluxPipeline, cases: Sequence[tuple[Composition, str]]
) -> tuple[Proportion, np.ndarray]:
    """How many boxes are kept and get the right background, and the pictures."""
    render, colours = Renderer(), np.array(list(COLOURS.values()), np.float32)
    edits, boxes = [], [box_of(composition) for composition, _ in cases]
    for (composition, _), box in zip(cases, boxes, strict=True):
        top, left, side, _ = box
        sides = (top, SIDE - left - side, SIDE - top - side, left)
        edits.append(Edit(Picture.from_array(cut(render(composition), box).copy()), expand=sides))
    made = change(pipeline, [prompt for _, prompt in cases], edits)
    right = 0
    for picture, edit, box, (composition, _) in zip(made, edits, boxes, cases, strict=True):
        new = np.ones((SIDE, SIDE), bool)
        cut(new, box)[:] = False
        nearest = np.square(picture[new][:, None].astype(np.float32) - colours).sum(axis=-1).argmin(axis=1)
        share = np.mean(nearest == list(COLOURS).index(composition.colour))
        right += np.array_equal(cut(picture, box), edit.image.pixels) and share >= SHARE
    return Proportion(right, len(cases)), made


def image_to_image(pipeline: FluxPipeline, cases: Sequence[tuple[Composition, str]]) -> dict[str, str]:
    """What strengths 0 and 1 give."""
    render, prompts = Renderer(), [prompt for _, prompt in cases]
    given = np.stack([render(composition) for composition, _ in cases])

    def made(strength: float) -> np.ndarray:
        return change(pipeline, prompts, [Edit(Picture.from_array(picture), strength) for picture in given])

    unchanged = made(0.0)
    same = np.abs(unchanged - reconstruct(pipeline.ae, given, batch=1).astype(np.float32)) <= 1
    alone = change(pipeline, prompts, [None] * len(cases))
    equal = [np.array_equal(*pair) for pair in zip(made(1.0), alone, strict=True)]
    return {
        "strength 0, PSNR to the picture": f"{psnr(given, unchanged).mean():.2f} dB",
        "strength 0, as the autoencoder": str(Proportion(int(same.all(axis=(1, 2, 3)).sum()), len(cases))),
        "strength 1, as the prompt alone": str(Proportion(sum(equal), len(cases))),
    }


def evaluate(
    pipeline: FluxPipeline, number: int, options: dict[str, Any]
) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """All figures by name, and the pictures: before and after."""
    cases = held_out_prompts(number)
    shown = [composition for composition, _ in cases]
    given, made = inpaint(pipeline, cases, options)
    reach = max(0, options["grow"]) + options["feather"]
    figures = {
        f"inpainting, {name} right": str(proportion)
        for name, proportion in judge_inpainting(given, made, shown, reach).items()
    }
    border, outer, inner = seam(made, shown)
    figures["seam, step at the border"] = f"{border:.2f} of 255 (outside {outer:.2f}, inside {inner:.2f})"
    outpainted, wide = outpaint(pipeline, cases)
    figures["outpainting right"] = str(outpainted)
    return figures | image_to_image(pipeline, cases), {"given": given, "inpainted": made, "outpainted": wide}


def main() -> int:
    """Run the program; its exit status: 0, 2 for bad input, 130 when interrupted."""
    return run_program(run)


def run(ranks: Ranks) -> int:
    """Do what the command line asks for."""
    parser = described(__doc__)
    parser.add_argument("--model", default="tiny", help="name or folder (default: %(default)s)")
    parser.add_argument("--count", type=count, default=100, help="held-out prompts (default: %(default)s)")
    for name in ("grow", "feather"):
        parser.add_argument(f"--{name}", type=pixels, default=0, metavar="N", help="of the mask")
    parser.add_argument("--output", type=Path, help="folder for figures.json and grids of the pictures")
    arguments = parser.parse_args()
    options = {"grow": arguments.grow, "feather": arguments.feather}
    figures, pictures = evaluate(FluxPipeline(arguments.model), arguments.count, options)
    for name, value in figures.items():
        print(f"  {name:32} {value}")
    if arguments.output:
        write(arguments.output, figures, pictures)
        print(arguments.output)
    return 0


def write(folder: Path, figures: dict[str, str], pictures: dict[str, np.ndarray]) -> None:
    """figures.json, and a grid of each kind's first pictures, ten in a row."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "figures.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    for name, made in pictures.items():
        rows = max(1, len(made) // 10)
        images.save(folder / f"{name}.png", images.grid(list(made[: 10 * rows]), rows))


if __name__ == "__main__":
    sys.exit(main())
