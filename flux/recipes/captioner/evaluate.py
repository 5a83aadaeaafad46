"""Does the captioner say what a picture shows, and does a generated picture show what its prompt says?

    python -m flux.recipes.captioner.evaluate [--captioner tiny] [--count 400] [--read-back tiny]

Renderings of held-out compositions are captioned; with --read-back, also what a generator draws from held-out
prompts: prompt -> picture -> caption. A caption is right in what it has in common with the composition; one
that is not one of `emoji.captions` is wrong in everything. Intervals are Wilson's, 95 %.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from flux.arguments import described, run_program
from flux.captioning.captioner import Captioner
from flux.captioning.tasks import TASKS
from flux.distributed.ranks import Ranks
from flux.evaluation.proportion import Proportion
from flux.pipeline import FluxPipeline
from flux.recipes.captioner import recipe
from flux.recipes.captioner.pictures import augment
from flux.recipes.emoji import COLOURS, PAIR, Composition, Renderer, compositions, parse, subjects
from flux.recipes.tiny.evaluate import draw, held_out_prompts
from flux.weights import checkpoints

ASPECTS = ("subject", "background", "place", "size")
BATCH = 50

Say = Callable[[list[Image.Image]], list[str]]  # pictures -> captions


def agreement(captions: Sequence[str], shown: Sequence[Composition]) -> dict[str, Proportion]:
    """How many captions say what their compositions do: in each aspect, in subject and background, in all.

    The size is that of the caption's words: a subject is large unless it is said to be small.
    """
    right = dict.fromkeys((*ASPECTS, "subject and background", "all"), 0)
    for caption, asked in zip(captions, shown, strict=True):
        said = parse(caption)
        if said is None:
            continue
        verdicts = {
            "subject": said.subjects == asked.subjects,
            "background": said.colour == asked.colour,
            "place": said.place == asked.place,
            "size": said.size == asked.size,
        }
        verdicts["subject and background"] = verdicts["subject"] and verdicts["background"]
        verdicts["all"] = said == asked
        for name, verdict in verdicts.items():
            right[name] += verdict
    return {name: Proportion(count, len(shown)) for name, count in right.items()}


def speaker(captioner: Captioner, task: str = "caption") -> Say:
    """A function that captions pictures with a captioner."""

    def say(images: list[Image.Image]) -> list[str]:
        starts = tqdm(range(0, len(images), BATCH), disable=None, desc=task)
        return [str(text) for i in starts for text in captioner.answers(images[i : i + BATCH], TASKS[task])]

    return say


def held_out_pairs(count: int, seed: int = 0) -> list[Composition]:
    """`count` held-out compositions of two subjects."""
    rng, names = np.random.default_rng(seed), list(subjects())[: recipe.SUBJECTS]
    found: list[Composition] = []
    while len(found) < count:
        pair = tuple(names[i] for i in rng.choice(len(names), 2, replace=False))
        composition = Composition(pair, str(rng.choice(list(COLOURS))), "small", PAIR)
        if composition.held_out:
            found.append(composition)
    return found


def held_out_singles(count: int, seed: int = 0) -> list[Composition]:
    """`count` held-out compositions of one subject, a fixed choice."""
    every = compositions(True, list(subjects())[: recipe.SUBJECTS])
    return [every[i] for i in np.random.default_rng(seed).permutation(len(every))[:count]]


def renderings(shown: Sequence[Composition], damaged: bool = False) -> list[Image.Image]:
    """The true pictures of compositions; damaged: as those of training are."""
    render, rng = Renderer(), np.random.default_rng(0)
    pictures = [render(composition) for composition in shown]
    if damaged:
        pictures = [augment(p, COLOURS[c.colour], rng) for p, c in zip(pictures, shown, strict=True)]
    return [Image.fromarray(picture) for picture in pictures]


def evaluate(say: Say, count: int) -> dict[str, dict[str, Proportion]]:
    """The agreement of captions with `count` true renderings of one subject, as they are and damaged, and
    with half as many of two."""
    singles, pairs = held_out_singles(count), held_out_pairs(max(1, count // 2))
    return {
        "true renderings": agreement(say(renderings(singles)), singles),
        "damaged renderings": agreement(say(renderings(singles, damaged=True)), singles),
        "pairs": agreement(say(renderings(pairs)), pairs),
    }


def read_back(
    say: Say, generator: FluxPipeline, count: int
) -> tuple[dict[str, Proportion], list[dict[str, str]]]:
    """The agreement of captions of generated pictures with the first `count` held-out prompts, and both."""
    shown, prompts = zip(*held_out_prompts(count), strict=True)
    pictures, _ = draw(generator, prompts)
    said = say([Image.fromarray(picture) for picture in pictures])
    rows = [{"prompt": p, "caption": c} for p, c in zip(prompts, said, strict=True)]
    return agreement(said, shown), rows


def main() -> int:
    """Run the program; its exit status: 0, 2 for bad input, 130 when interrupted."""
    return run_program(run)


def run(ranks: Ranks) -> int:
    """Do what the command line asks for."""
    parser = described(__doc__)
    parser.add_argument("--captioner", default="tiny", help="name or folder (default: %(default)s)")
    parser.add_argument("--count", type=int, default=400, help="pictures (default: %(default)s)")
    parser.add_argument("--read-back", metavar="MODEL", help="also caption what this generator draws")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures, and what was read back")
    arguments = parser.parse_args()
    folder = checkpoints.find_captioner(arguments.captioner)
    captioner = Captioner.from_folder(folder, checkpoints.default_dtype())
    figures = evaluate(speaker(captioner), arguments.count)
    rows: list[dict[str, str]] = []
    if arguments.read_back:
        generator = FluxPipeline(arguments.read_back)
        figures["read back"], rows = read_back(speaker(captioner), generator, arguments.count)
    for title, shares in figures.items():
        print(title)
        for name, share in shares.items():
            print(f"  {name:24} {share}")
    if arguments.output:
        text = {title: {n: str(s) for n, s in shares.items()} for title, shares in figures.items()}
        arguments.output.write_text(json.dumps({**text, "rows": rows}, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
