"""Does guidance do what is asked on the built-in model? Losses, and negative prompts, by the evaluator.

    python -m flux.recipes.tiny.evaluate_guidance colour|likeness|negative [--count 50] [--output DIR]

colour: held-out prompts, and a loss that asks for a mean colour. likeness: held-out prompts without their
place, which is then the centre, and a loss that asks for the colours of a picture in blocks of 8x8 pixels,
where the subject is elsewhere. negative: prompts of a subject alone; the background that comes out by itself
is the negative prompt. Subjects and places are those of the nearest rendering, as in `evaluate`, on the
picture's background: that of its outermost pixels. Intervals are Wilson's, 95 %, and normal ones of means.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import flux  # noqa: F401  before mlx.core, so that OpenBLAS is there first

# isort: split
import mlx.core as mx
import numpy as np

from flux import images
from flux.arguments import described, run_program
from flux.conditioning import Guide
from flux.distributed.ranks import Ranks
from flux.evaluation.proportion import Proportion, Z
from flux.generation import Request, generate
from flux.models.nag import Nag
from flux.pipeline import FluxPipeline
from flux.recipes.emoji import PLACES, SIDE, SIZES, Composition, Renderer, captions, corners, subjects
from flux.recipes.tiny.evaluate import Judge, held_out_prompts

WARM = (0.85, 0.5, 0.25)
BLOCK = 8
NEGATIVES = (  # name, cfg scale, whether it is of the negative prompt, NAG
    ("cfg 3, empty negative", 3.0, False, None),
    ("cfg 3", 3.0, True, None),
    ("NAG 2", 1.0, True, Nag(2)),
    ("NAG 5", 1.0, True, Nag(5)),
    ("NAG 2, cfg 3", 3.0, True, Nag(2)),
)


def colour_loss(colour: Sequence[float]) -> Guide:
    """Leads the picture's mean colour (red, green, blue), in 0..1."""
    target = mx.array(list(colour))
    return Guide(lambda x, t: mx.square(x.mean((0, 1, 2)) - target).sum(), on="pixels", strength=4, end=0.7)


def blocks(x: mx.array) -> mx.array:
    """The mean colours of blocks of BLOCK x BLOCK pixels, of pictures (B, H, W, 3)."""
    b, height, width, c = x.shape
    return x.reshape(b, height // BLOCK, BLOCK, width // BLOCK, BLOCK, c).mean((2, 4))


def likeness_loss(picture: np.ndarray) -> Guide:
    """Leads to the colours of a picture (H, W, 3), uint8, without its details."""
    target = blocks(mx.array(picture[None] / 255.0).astype(mx.float32))
    return Guide(lambda x, t: mx.square(blocks(x) - target).mean(), on="pixels", strength=2, end=0.5)


class OnAnyBackground:
    """Finds subjects and places on backgrounds of any colour."""

    def __init__(self) -> None:
        self._render = Renderer()

    def __call__(self, picture: np.ndarray, size: str) -> tuple[str, str]:
        """(subject, place) of the rendering that is nearest to a picture (64, 64, 3), uint8."""
        frame = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        ground, side = np.median(frame, axis=0), SIZES[size]
        away = np.square(picture - ground).sum()
        best = (math.inf, "", "")
        for place in PLACES:
            x, y = corners(Composition(("",), "red", size, place))[0]
            part = picture[y : y + side, x : x + side].astype(np.float32)
            rest = away - np.square(part - ground).sum()
            for name in subjects():
                rgba = self._render.glyph(name, side).astype(np.float32)
                alpha = rgba[..., 3:] / 255
                error = np.square(part - alpha * rgba[..., :3] - (1 - alpha) * ground).sum() + rest
                best = min(best, (float(error), name, place))
        return best[1], best[2]


def draw(pipeline: FluxPipeline, requests: list[Request]) -> np.ndarray:
    """A picture of each request, (B, 64, 64, 3), uint8."""
    return np.stack(list(generate(pipeline, requests, stream=True, keep_models=True, progress=True)))


def mean(values: np.ndarray) -> str:
    """A mean with its 95 % interval."""
    return f"{values.mean():.3f} +-{Z * values.std(ddof=1) / math.sqrt(len(values)):.3f}"


def found(pictures: np.ndarray, shown: Sequence[Composition]) -> tuple[Proportion, Proportion]:
    """How many pictures show the subject, and how many the place."""
    judge = OnAnyBackground()
    seen = [judge(picture, c.size) for picture, c in zip(pictures, shown, strict=True)]
    return (
        Proportion(sum(s == c.subjects[0] for (s, _), c in zip(seen, shown, strict=True)), len(shown)),
        Proportion(sum(p == c.place for (_, p), c in zip(seen, shown, strict=True)), len(shown)),
    )


def request(prompt: str, seed: int, **settings) -> Request:
    """A request of the built-in model's size."""
    return Request(prompt, (seed,), image_size=(SIDE, SIDE), **settings)


def colour(pipeline: FluxPipeline, count: int) -> list[np.ndarray]:
    """Prints the figures of the loss of a mean colour; the pictures without and with it."""
    shown, prompts = zip(*held_out_prompts(count), strict=True)
    rows, distances = [], []
    for name, guide in (("plain", None), ("led", colour_loss(WARM))):
        pictures = draw(pipeline, [request(p, i, guide=guide) for i, p in enumerate(prompts)])
        distances.append(np.linalg.norm(pictures.mean((1, 2)) / 255 - np.array(WARM), axis=1))
        print(f"{name:6} distance {mean(distances[-1])}; subject {found(pictures, shown)[0]}", flush=True)
        rows.append(pictures)
    print(f"nearer {Proportion(int((distances[1] < distances[0]).sum()), count)}")
    print(f"share of the way {mean(1 - distances[1] / distances[0])}")
    return rows


def likeness(pipeline: FluxPipeline, count: int) -> list[np.ndarray]:
    """Prints the figures of the loss of likeness; the pictures that are asked for, without and with it."""
    every = held_out_prompts(4 * count)
    shown = [c for c, _ in every if c.place != "centre"][:count]
    centred = [Composition(c.subjects, c.colour, c.size, "centre") for c in shown]
    render = Renderer()
    wanted = np.stack([render(c) for c in shown])
    rows = [wanted]
    for name in ("plain", "led"):
        guides = [likeness_loss(picture) if name == "led" else None for picture in wanted]
        prompts = [captions(c)[0] for c in centred]
        pictures = draw(
            pipeline, [request(p, i, guide=g) for i, (p, g) in enumerate(zip(prompts, guides, strict=True))]
        )
        of = [blocks(mx.array(x / 255.0)) for x in (pictures, wanted)]
        distance = np.array(mx.sqrt(mx.square(of[0] - of[1]).mean((1, 2, 3))))
        subject, place = found(pictures, shown)
        print(f"{name:6} distance {mean(distance)}; subject {subject}; its place {place}", flush=True)
        rows.append(pictures)
    return rows


def negative(pipeline: FluxPipeline, count: int) -> list[np.ndarray]:
    """Prints how often a background is avoided; the pictures of each way."""
    judge = Judge()
    shown = [Composition(c.subjects, c.colour, "large", "centre") for c, _ in held_out_prompts(count)]
    prompts = [subjects()[c.subjects[0]][1] for c in shown]
    rows: list[np.ndarray] = []
    grounds: list[str] = []
    for name, scale, used, nag in NEGATIVES:
        texts = [f"a {ground} background" if used else "" for ground in grounds or [""] * count]
        pictures = draw(
            pipeline,
            [
                request(p, i, negative_prompt=text, cfg_scale=scale, nag=nag)
                for i, (p, text) in enumerate(zip(prompts, texts, strict=True))
            ],
        )
        seen = [judge.background(picture) for picture in pictures]
        grounds = grounds or seen
        avoided = Proportion(sum(a != b for a, b in zip(seen, grounds, strict=True)), count)
        print(f"{name:22} avoided {avoided}; subject {found(pictures, shown)[0]}", flush=True)
        rows.append(pictures)
    return rows


WAYS = {"colour": colour, "likeness": likeness, "negative": negative}


def run(ranks: Ranks) -> int:
    """Do what the command line asks for."""
    parser = described(__doc__)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--model", default="tiny", help="name or folder (default: %(default)s)")
    parser.add_argument("--count", type=int, default=50, help="prompts (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="a file for a grid of the first ten pictures of each row")
    arguments = parser.parse_args()
    rows = WAYS[arguments.way](FluxPipeline(arguments.model), arguments.count)
    if arguments.output:
        images.save(arguments.output, images.grid([p for row in rows for p in row[:10]], len(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(run_program(run))
