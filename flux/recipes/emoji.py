"""Pictures of emoji with captions: the data of the built-in model, drawn on the fly from a seed.

    python -m flux.recipes.emoji --output DIR --count 1000 --seed 0

A picture is one subject (or two side by side) on a flat background, 64x64. Every glyph's box stands on a grid
of 8 pixels, the stride of the latent: a subject of one size then has one phase relative to that grid, and the
autoencoder has one thing to learn about it instead of 64.

The drawings are those of Noto Color Emoji (Google), licensed under the SIL Open Font License 1.1, which lets
pictures and models made with the font be used and passed on freely. The names are those of Unicode's CLDR.
"""

import hashlib
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from flux.arguments import Parser, run_program
from flux.distributed.ranks import Ranks
from flux.errors import FluxError

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
LICENCE = """The pictures in this folder were drawn with the font Noto Color Emoji,
Copyright Google Inc., licensed under the SIL Open Font License, Version 1.1 (https://openfontlicense.org).
The names in the captions are those of Unicode's Common Locale Data Repository (Unicode License v3).
"""
SIDE = 64  # pixels
COLOURS = {
    "red": (214, 40, 40),
    "orange": (247, 140, 30),
    "yellow": (250, 220, 70),
    "green": (50, 160, 80),
    "blue": (50, 110, 220),
    "purple": (130, 60, 170),
    "pink": (250, 165, 195),
    "white": (248, 248, 248),
    "gray": (135, 135, 140),
    "black": (20, 20, 24),
}
SIZES = {"small": 32, "large": 48}  # side of the glyph's box, pixels
PLACES = ("left", "right", "top", "bottom", "centre")
PAIR = "pair"  # the place of two subjects, each small: the first left, the second right
PAIR_SHARE = 0.2  # of the training pictures
_STEPS = {
    "left": (0, 1),
    "right": (2, 1),
    "top": (1, 0),
    "bottom": (1, 2),
    "centre": (1, 1),
}  # of half the rest


@cache
def subjects() -> dict[str, tuple[str, str]]:
    """Name -> (character, name with article), as "red apple" -> ("🍎", "a red apple"), in a fixed order."""
    table = {}
    for line in Path(__file__).with_name("subjects.tsv").read_text(encoding="utf-8").splitlines():
        character, phrase = line.split("\t")
        name = phrase.removeprefix("an ").removeprefix("a ")
        table[name] = (character, phrase)
    return table


@dataclass(frozen=True)
class Composition:
    """What a picture shows: one subject, or two with `place` "pair" and `size` "small"."""

    subjects: tuple[str, ...]
    colour: str
    size: str
    place: str

    @property
    def held_out(self) -> bool:
        """One in ten (subject, colour, place), by a fixed hash and for both sizes: never trained on."""
        key = "|".join([*self.subjects, self.colour, self.place])
        return hashlib.blake2b(key.encode(), digest_size=4).digest()[0] % 10 == 0


def compositions(held_out: bool, names: list[str] | None = None) -> list[Composition]:
    """All compositions of one subject that are, or are not, held out; of `names` (default: all subjects)."""
    every = (
        Composition((name,), colour, size, place)
        for name in (names or subjects())
        for colour in COLOURS
        for size in SIZES
        for place in PLACES
    )
    return [c for c in every if c.held_out == held_out]


def draw_composition(rng: np.random.Generator, names: list[str] | None = None) -> Composition:
    """A random composition to train on, i.e. one that is not held out."""
    names = names or list(subjects())
    while True:
        colour = str(rng.choice(list(COLOURS)))
        if rng.random() < PAIR_SHARE:
            first, second = rng.choice(len(names), 2, replace=False)
            composition = Composition((names[first], names[second]), colour, "small", PAIR)
        else:
            name = names[rng.integers(len(names))]
            size, place = str(rng.choice(list(SIZES))), PLACES[rng.integers(len(PLACES))]
            composition = Composition((name,), colour, size, place)
        if not composition.held_out:
            return composition


def _article(words: str) -> str:
    return ("an " if words[0] in "aeio" else "a ") + words


def _noun(name: str, size: str) -> str:
    """ "a red apple", "a small red apple", "small grapes"."""
    phrase = subjects()[name][1]
    if not size:
        return phrase
    return f"{size} {name}" if phrase == name else f"a {size} {name}"


def captions(composition: Composition) -> list[str]:
    """Every caption of a composition; the first is the plainest.

    A subject is large and in the centre unless the caption says otherwise.
    """
    ground = _article(composition.colour) + " background"
    if composition.place == PAIR:
        first, second = (_noun(name, "") for name in composition.subjects)
        return [f"{first} {link} {second} on {ground}" for link in ("and", "next to")]
    adjectives = ["", "large"] if composition.size == "large" else ["small"]
    at = {"top": "at the top", "bottom": "at the bottom", "centre": "in the centre"}.get(
        composition.place, f"on the {composition.place}"
    )
    texts = []
    for adjective in adjectives:
        noun = _noun(composition.subjects[0], adjective)
        if composition.place == "centre":
            texts.append(f"{noun} on {ground}")
        texts += [f"{noun} {at} of {ground}", f"{ground} with {noun} {at}"]
    return texts


@cache
def _grammar() -> tuple[dict[str, tuple[str, str]], list[re.Pattern[str]]]:
    """What the subjects may be called, -> (name, size or ""); and all forms of `captions`."""
    nouns = {_noun(name, size): (name, size) for name in subjects() for size in ("", *SIZES)}
    noun = "|".join(map(re.escape, nouns))
    ground = rf"an? (?P<colour>{'|'.join(COLOURS)}) background"
    place = rf"(?:in|at|on) the (?P<place>{'|'.join(PLACES)})"
    forms = (
        rf"(?P<first>{noun}) on {ground}",
        rf"(?P<first>{noun}) {place} of {ground}",
        rf"{ground} with (?P<first>{noun}) {place}",
        rf"(?P<first>{noun}) (?:and|next to) (?P<second>{noun}) on {ground}",
    )
    return nouns, [re.compile(form) for form in forms]


def parse(caption: str) -> Composition | None:
    """The composition that a caption is one of; None where it is not a caption of ours."""
    nouns, forms = _grammar()
    found = next(filter(None, (form.fullmatch(caption) for form in forms)), None)
    if found is None:
        return None
    parts = found.groupdict()
    name, size = nouns[parts["first"]]
    if "second" in parts:
        return Composition((name, nouns[parts["second"]][0]), parts["colour"], "small", PAIR)
    return Composition((name,), parts["colour"], size or "large", parts.get("place", "centre"))


class Renderer:
    """Draws compositions, thousands a second: each (subject, size, colour) is resized and blended once."""

    def __init__(self, font: Path = FONT):
        if not font.is_file():
            raise FluxError(f"the font {font} is missing: install the Debian package fonts-noto-color-emoji")
        self._font = ImageFont.truetype(str(font), 109)  # the one bitmap size that the font has
        self._glyphs: dict[tuple[str, int], np.ndarray] = {}
        self._boxes: dict[tuple[str, int, str], np.ndarray] = {}

    def glyph(self, name: str, side: int) -> np.ndarray:
        """One subject alone: (side, side, 4) uint8, RGBA."""
        if (name, side) not in self._glyphs:
            character = subjects()[name][0]
            left, top, right, bottom = self._font.getbbox(character)
            canvas = Image.new("RGBA", (136, 136))  # the font's cells are 136 x 128
            offset = ((136 - (right - left)) // 2 - left, (136 - (bottom - top)) // 2 - top)
            ImageDraw.Draw(canvas).text(offset, character, font=self._font, embedded_color=True)
            self._glyphs[name, side] = np.asarray(canvas.resize((side, side), Image.Resampling.LANCZOS))
        return self._glyphs[name, side]

    def on(self, name: str, side: int, colour: tuple[int, int, int]) -> np.ndarray:
        """One subject on a flat colour: (side, side, 3) uint8."""
        rgba = self.glyph(name, side).astype(np.float32)
        alpha = rgba[..., 3:] / 255
        blend = alpha * rgba[..., :3] + (1 - alpha) * np.array(colour, np.float32)
        return np.rint(blend).astype(np.uint8)

    def _box(self, name: str, side: int, colour: str) -> np.ndarray:
        key = (name, side, colour)
        if key not in self._boxes:
            self._boxes[key] = self.on(name, side, COLOURS[colour])
        return self._boxes[key]

    def __call__(self, composition: Composition) -> np.ndarray:
        """The picture of a composition: (64, 64, 3) uint8."""
        picture = np.empty((SIDE, SIDE, 3), np.uint8)
        picture[:] = COLOURS[composition.colour]
        side = SIZES[composition.size]
        for name, (x, y) in zip(composition.subjects, corners(composition), strict=True):
            picture[y : y + side, x : x + side] = self._box(name, side, composition.colour)
        return picture


def corners(composition: Composition) -> list[tuple[int, int]]:
    """The upper left corner (x, y) of each subject's box, pixels."""
    rest = (SIDE - SIZES[composition.size]) // 2
    if composition.place == PAIR:
        return [(0, rest), (SIDE // 2, rest)]
    across, down = _STEPS[composition.place]
    return [(across * rest, down * rest)]


def main() -> int:
    """Run the program; its exit status: 0, 2 for bad input, 130 when interrupted."""
    return run_program(run)


def run(ranks: Ranks) -> int:
    """Draw the folder."""
    parser = Parser(description="Draw a folder of emoji pictures with captions (font: OFL 1.1).")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder; gets pictures, captions.tsv, LICENCE"
    )
    parser.add_argument("--count", type=int, default=1000, help="how many pictures (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_folder(arguments.output, arguments.count, arguments.seed)
    print(arguments.output)
    return 0


def write_folder(output: Path, count: int, seed: int) -> None:
    """`count` PNGs, captions.tsv (name<TAB>caption) and the font's licence; same seed, same bytes."""
    if count < 1:
        raise FluxError(f"--count {count}: at least 1 picture")
    render, rng, lines = Renderer(), np.random.default_rng(seed), []
    output.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        composition = draw_composition(rng)
        caption = rng.choice(captions(composition))
        Image.fromarray(render(composition)).save(output / f"{i:06d}.png")
        lines.append(f"{i:06d}.png\t{caption}\n")
    (output / "captions.tsv").write_text("".join(lines), encoding="utf-8")
    (output / "LICENCE").write_text(LICENCE, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
