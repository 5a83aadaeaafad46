"""Does guidance do what is asked on the built-in model? Losses, and negative prompts, by the evaluator.

    python -m flux.recipes.tiny.evaluate_guidance colour|likeness|negative [--count 50] [--output FILE]

colour: held-out prompts, and a loss that asks for a mean colour a quarter of the way to orange from that
which comes out by itself.
likeness: prompts of a subject alone, and a loss that asks for the colours of another picture, in blocks of
16x16 pixels. negative: prompts of a subject alone; the background that comes out by itself is the negative
prompt.
A subject is that of the nearest rendering on the picture's background, whatever tint is added to the whole.
Intervals are Wilson's, and normal ones of means, 95 %.
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
from flux.generation import generate
from flux.models.nag import Nag
from flux.pipeline import FluxPipeline
from flux.recipes.emoji import PLACES, SIDE, SIZES, Composition, Renderer, corners, subjects
from flux.recipes.tiny.evaluate import Judge, held_out_prompts
from flux.requests import Request

WARM, SHARE = np.array((0.85, 0.5, 0.25)), 0.25  # the mean colour that is asked for, and how far towards it
BLOCK = 16
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
    return Guide(lambda x, t: mx.square(x.mean((0, 1, 2)) - target).sum(), on="pixels", strength=2)


def blocks(x: mx.array) -> mx.array:
    """The mean colours of blocks of BLOCK x BLOCK pixels, of pictures (B, H, W, 3)."""
    b, height, width, c = x.shape
    return x.reshape(b, height // BLOCK, BLOCK, width // BLOCK, BLOCK, c).mean((2, 4))


def likeness_loss(picture: np.ndarray) -> Guide:
    """Leads to the colours of a picture (H, W, 3), uint8, without its details."""
    target = blocks(mx.array(picture[None] / 255.0).astype(mx.float32))
    return Guide(lambda x, t: mx.square(blocks(x) - target).mean(), on="pixels", strength=2, end=0.4)


class OfAnyColour:
    """Finds subjects and places on backgrounds of any colour, in pictures that are tinted as a whole."""

    def __init__(self) -> None:
        self._render = Renderer()

    def __call__(self, picture: np.ndarray, size: str) -> tuple[str, str]:
        """(subject, place) of the rendering whose difference from a picture (64, 64, 3) varies the least."""
        frame = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        ground, side = np.median(frame, axis=0), SIZES[size]
        away = picture - ground  # of the background alone
        best = (math.inf, "", "")
        for place in PLACES:
            x, y = corners(Composition(("",), "red", size, place))[0]
            box = away[y : y + side, x : x + side]
            squares, total = (
                np.square(away).sum() - np.square(box).sum(),
                (away.sum((0, 1)) - box.sum((0, 1))),
            )
            for name in subjects():
                rgba = self._render.glyph(name, side).astype(np.float32)
                rest = box - rgba[..., 3:] / 255 * (rgba[..., :3] - ground)
                mean = (total + rest.sum((0, 1))) / SIDE**2
                error = squares + np.square(rest).sum() - SIDE**2 * np.square(mean).sum()
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
    judge = OfAnyColour()
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
    plain = draw(pipeline, [request(p, i) for i, p in enumerate(prompts)])
    way = SHARE * (WARM - plain.mean((1, 2)) / 255)
    guides = [colour_loss(target.tolist()) for target in plain.mean((1, 2)) / 255 + way]
    led = draw(
        pipeline, [request(p, i, guide=g) for i, (p, g) in enumerate(zip(prompts, guides, strict=True))]
    )
    moved = ((led.mean((1, 2)) - plain.mean((1, 2))) / 255 * way).sum(1) / np.square(way).sum(1)
    most = Proportion(int((moved > 0.5).sum()), count)
    print(f"moved by {mean(moved)} of what is asked; by more than half {most}")
    for name, pictures in (("plain", plain), ("led", led)):
        print(f"{name:6} subject {found(pictures, shown)[0]}", flush=True)
    return [plain, led]


def likeness(pipeline: FluxPipeline, count: int) -> list[np.ndarray]:
    """Prints the figures of the loss of likeness; the pictures that are asked for, without and with it."""
    judge, render = Judge(), Renderer()
    others = [c for c, _ in held_out_prompts(2 * count)]
    shown, like = alone(others[:count]), alone(others[count:])
    wanted = np.stack([render(c) for c in like])
    rows = [wanted]
    for name in ("plain", "led"):
        guides = [likeness_loss(picture) if name == "led" else None for picture in wanted]
        prompts = [subjects()[c.subjects[0]][1] for c in shown]
        asked = [request(p, i, guide=g) for i, (p, g) in enumerate(zip(prompts, guides, strict=True))]
        pictures = draw(pipeline, asked)
        of = [blocks(mx.array(x / 255.0)) for x in (pictures, wanted)]
        distance = np.array(mx.sqrt(mx.square(of[0] - of[1]).mean((1, 2, 3))))
        ground = sum(judge.background(p) == c.colour for p, c in zip(pictures, like, strict=True))
        print(f"{name:6} distance {mean(distance)}; its background {Proportion(ground, count)}")
        print(f"{name:6} subject of the prompt {found(pictures, shown)[0]}", flush=True)
        rows.append(pictures)
    return rows


def alone(compositions: Sequence[Composition]) -> list[Composition]:
    """The compositions with their subject large and in the centre, as where the prompt does not say it."""
    return [Composition(c.subjects, c.colour, "large", "centre") for c in compositions]


def negative(pipeline: FluxPipeline, count: int) -> list[np.ndarray]:
    """Prints how often a background is avoided; the pictures of each way."""
    judge = Judge()
    shown = alone([c for c, _ in held_out_prompts(count)])
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
