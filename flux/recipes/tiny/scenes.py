"""Scenes of emoji in the sizes and aspect ratios that the built-in model is trained at, as they are drawn.

A scene is one subject, two of a kind or of two kinds, or three of a kind, on a flat background. Boxes stand
on the grid of the latents, 8 pixels.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from flux.recipes import emoji
from flux.recipes.emoji import PLACES, Renderer, subjects
from flux.recipes.tiny import recipe, wording

Size = tuple[int, int]  # (height, width), pixels

# Sizes and their shares among the scenes.
CANVASES: dict[Size, float] = {
    **{(64, 64): 0.24, (128, 128): 0.2, (96, 96): 0.12},
    **dict.fromkeys([(64, 128), (128, 64)], 0.1),
    **dict.fromkeys([(64, 96), (96, 64), (96, 128), (128, 96)], 0.06),
}
COLOURS = emoji.COLOURS | {
    "brown": (120, 72, 40),
    "turquoise": (60, 200, 190),
    "navy": (22, 30, 92),
    "beige": (235, 216, 182),
    "lime": (165, 222, 50),
    "magenta": (212, 40, 150),
    "light blue": (160, 206, 250),
    "dark green": (15, 78, 45),
    "gold": (214, 166, 40),
    "maroon": (108, 18, 42),
    "lavender": (202, 182, 240),
}
SHARES = {"small": 0.5, "large": 0.75}  # the box's side by the shorter side of the picture
GROUP = "group"  # the place of several subjects, each small
GROUP_SHARE = 0.2  # of the scenes; six in ten of them are two kinds
PLAIN_SHARE = 0.5  # of the rest: large and in the centre, as most prompts want it


@dataclass(frozen=True)
class Scene:
    """What a picture shows. subjects: one name, two, or three times the same."""

    subjects: tuple[str, ...]
    colour: str
    size: str
    place: str
    canvas: Size

    @property
    def held_out(self) -> bool:
        """One in ten (subjects, colour, place), by a fixed hash, whatever the size: never trained on.

        Scenes of one subject are held out where `emoji.Composition` is.
        """
        key = "|".join([*self.subjects, self.colour, self.place])
        return hashlib.blake2b(key.encode(), digest_size=4).digest()[0] % 10 == 0

    @property
    def side(self) -> int:
        """Of a subject's box, pixels: a multiple of 16."""
        return 16 * int(SHARES[self.size] * min(self.canvas) / 16 + 0.5)

    def corners(self) -> list[Size]:
        """The upper left corner (x, y) of each subject's box."""
        height, width = self.canvas
        across, down, side = width - self.side, height - self.side, self.side
        if self.place != GROUP:
            x = {"left": 0, "right": across}.get(self.place, across // 2)
            y = {"top": 0, "bottom": down}.get(self.place, down // 2)
            return [(x, y)]
        count = len(self.subjects)
        if count * side <= width:  # in a row
            left = (width - count * side) // 2
            return [(left + i * side, down // 2) for i in range(count)]
        left, top = (width - 2 * side) // 2, (height - 2 * side) // 2  # two above one
        return [(left, top), (left + side, top), (across // 2, top + side)]


def draw_scene(rng: np.random.Generator, names: list[str], canvas: Size | None = None) -> Scene:
    """A random scene to train on, i.e. one that is not held out; of a random size where none is given."""
    sizes, shares = list(CANVASES), np.array(list(CANVASES.values()))
    while True:
        size = canvas or sizes[int(rng.choice(len(sizes), p=shares / shares.sum()))]
        colour = list(COLOURS)[int(rng.integers(len(COLOURS)))]
        name, other = (names[i] for i in rng.choice(len(names), 2, replace=False))
        if rng.random() < GROUP_SHARE:
            kinds = ((name, other), (name, name), (name, name, name))
            scene = Scene(kinds[rng.choice(3, p=[0.6, 0.2, 0.2])], colour, "small", GROUP, size)
        elif rng.random() < PLAIN_SHARE:
            scene = Scene((name,), colour, "large", "centre", size)
        else:
            box, place = list(SHARES)[rng.integers(2)], PLACES[rng.integers(len(PLACES))]
            scene = Scene((name,), colour, box, place, size)
        if not scene.held_out:
            return scene


def render(renderer: Renderer, scene: Scene) -> np.ndarray:
    """The picture of a scene: (H, W, 3) uint8."""
    picture = np.empty((*scene.canvas, 3), np.uint8)
    picture[:] = COLOURS[scene.colour]
    side = scene.side
    for name, (x, y) in zip(scene.subjects, scene.corners(), strict=True):
        picture[y : y + side, x : x + side] = renderer.on(name, side, COLOURS[scene.colour])
    return picture


@dataclass(frozen=True)
class Wordings(Sequence[str]):
    """Descriptions of a scene, each made when it is asked for."""

    scene: Scene
    seed: tuple[int, ...]

    def __len__(self) -> int:
        return 12

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(number)
        return wording.describe(self.scene, np.random.default_rng((*self.seed, number)))


class Scenes:
    """A fixed number of random scenes as a data set (`flux.data.sources.Pictures`), drawn when asked for."""

    SHOWN = 8000  # scenes of whose wordings the vocabularies are made

    def __init__(self, count: int, seed: int = 0):
        rng, names = np.random.default_rng(seed), list(subjects())[: recipe.SUBJECTS]
        self._scenes = [draw_scene(rng, names) for _ in range(count)]
        self._seed = seed
        self._renderer = Renderer()
        self.sizes = [scene.canvas for scene in self._scenes]
        self.subjects = {name: wording.synonyms()[name] for name in names}

    def __len__(self) -> int:
        return len(self._scenes)

    @cached_property
    def captions(self) -> list[str]:
        """Wordings of the first scenes; besides, every name of every subject, every number and colour."""
        words = [wording.article(noun) for name in subjects() for noun in wording.nouns(name)]
        words += [f"two {wording.plural(noun)}" for name in subjects() for noun in wording.nouns(name)]
        colours = [word for name in COLOURS for word in wording.COLOUR_WORDS.get(name, (name,))]
        return [
            *(text for index in range(min(self.SHOWN, len(self))) for text in self.texts(index)),
            *(f"{word} on a {colour} background" for word in words for colour in colours),
        ]

    def texts(self, index: int) -> "Wordings":
        """Wordings of the scene's description."""
        return Wordings(self._scenes[index], (self._seed, index))

    def picture(self, index: int) -> np.ndarray:
        """The picture (H, W, 3), uint8."""
        return render(self._renderer, self._scenes[index])


def training_scenes() -> Scenes:
    """The data set of the recipe."""
    return Scenes(recipe.SCENES)
