"""Holds a picture against the rendering that its caption asks for, a natural prompt against its subject."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flux import images
from flux.evaluation.likeness import psnr, ssim
from flux.models.autoencoder import AutoEncoder
from flux.recipes.emoji import Composition, Renderer, subjects
from flux.recipes.tiny import recipe
from flux.recipes.tiny.scenes import Scene, Size, render
from flux.recipes.tiny.wording import article, nouns

PROMPTS = Path(__file__).with_name("prompts.tsv")  # for a page of pictures, chosen before there were any
# Wordings that no training caption has: `describe` makes none of them.
NATURAL = (
    *("{a} please", "please draw {a}", "i want {a}", "one {noun}", "here is {a}", "my {noun}"),
    *("{a} emoji", "{noun} icon", "portrait of {a}", "{a}, cute", "a sticker of {a}", "just {a}"),
    *("{noun}!", "A {noun} In The Picture", "clipart {noun}", "{a} on its own"),
)


@dataclass(frozen=True)
class Likeness:
    """Of pictures to their renderings, in the boxes of the subjects: SSIM and PSNR in dB, (B,) each."""

    ssim: np.ndarray
    psnr: np.ndarray

    def __str__(self) -> str:
        median, tenth = np.quantile(self.ssim, (0.5, 0.1))
        decibels = np.median(self.psnr)
        return f"SSIM median {median:.3f}, worst tenth below {tenth:.3f}; PSNR median {decibels:.1f} dB"


def scene_of(composition: Composition) -> Scene:
    """The scene of 64x64 that shows the same."""
    place = composition.place if len(composition.subjects) == 1 else "group"
    return Scene(composition.subjects, composition.colour, composition.size, place, (64, 64))


def box(scene: Scene) -> tuple[slice, slice]:
    """Rows and columns of the smallest box around all subjects."""
    (lefts, tops), side = zip(*scene.corners(), strict=True), scene.side
    return slice(min(tops), max(tops) + side), slice(min(lefts), max(lefts) + side)


def likeness(pictures: Sequence[np.ndarray], scenes: Sequence[Scene]) -> Likeness:
    """Of pictures (H, W, 3) uint8 to the renderings of their scenes."""
    renderer, found = Renderer(), []
    for picture, scene in zip(pictures, scenes, strict=True):
        part, true = picture[box(scene)], render(renderer, scene)[box(scene)]
        found.append((ssim(part, true), float(psnr(part[None], true[None])[0])))
    values = np.array(found)
    return Likeness(values[:, 0], values[:, 1])


def natural_prompts(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(prompt, name of its subject): a fixed choice of held-out wordings of the subjects trained on."""
    rng, names = np.random.default_rng(seed), list(subjects())[: recipe.SUBJECTS]
    chosen = []
    for _ in range(count):
        name = names[rng.integers(len(names))]
        noun = str(rng.choice(nouns(name)))
        template = NATURAL[rng.integers(len(NATURAL))]
        chosen.append((template.format(noun=noun, a=article(noun)), name))
    return chosen


def reconstruct(model: AutoEncoder, pictures: np.ndarray, batch: int = 32) -> np.ndarray:
    """(B, H, W, 3) uint8 through encoder and decoder, rounded to uint8 again."""
    decoded = []
    for start in range(0, len(pictures), batch):
        x = images.normalize(pictures[start : start + batch])
        decoded.append(images.to_uint8(images.denormalize(model.decoder(model.moments(x)[0]))))
    return np.concatenate(decoded)


class SubjectJudge:
    """Says which subject a picture of one large subject in the centre shows, on whatever background."""

    def __init__(self, canvas: Size):
        self._scene = Scene((next(iter(subjects())),), "white", "large", "centre", canvas)
        self._renderer = Renderer()

    def __call__(self, picture: np.ndarray) -> str:
        """The subject whose rendering on the picture's background is nearest, by squared distance in RGB."""
        frame = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        red, green, blue = (int(value) for value in np.median(frame, axis=0))
        part = picture[box(self._scene)].astype(np.float32)

        def distance(name: str) -> float:
            known = self._renderer.on(name, self._scene.side, (red, green, blue))
            return float(np.square(part - known).sum())

        return min(subjects(), key=distance)


def page_prompts() -> list[str]:
    """The prompts of the page, in their order."""
    return PROMPTS.read_text(encoding="utf-8").splitlines()
