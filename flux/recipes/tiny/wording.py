"""How people may put what a scene shows: the language of the built-in model.

A subject is large and in the centre unless a description says otherwise; a description without a colour fits
every background. Synonyms are nouns among Unicode CLDR's keywords, and some more.
"""

from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np

from flux.recipes.emoji import subjects

SYNONYMS = Path(__file__).parent.parent / "synonyms.tsv"
INTRODUCTIONS = (
    *("photo of", "a photo of", "picture of", "a picture of", "image of", "an image of", "emoji of"),
    *("an emoji of", "icon of", "an icon of", "drawing of", "a drawing of", "illustration of", "draw"),
    *("a painting of", "show me", "cartoon of", "a photograph of"),
)
FILLERS = (
    *("cute", "beautiful", "nice", "lovely", "pretty", "funny", "simple", "colorful", "shiny", "happy"),
    *("cool", "very cute", "sweet", "adorable", "fresh", "single", "realistic", "cartoon"),
)
LARGE, SMALL = ("big", "large", "huge", "giant"), ("small", "little", "tiny", "mini")
NUMBERS = {2: ("two", "2", "a pair of", "a couple of"), 3: ("three", "3")}
LINKS = ("and", "next to", "with", "beside", "&")
GROUNDS = (
    *("on a {} background", "on {}", "with a {} background", "against a {} background", "on a {} backdrop"),
    *(", {} background", "in front of a {} background", "on {} background", "with {} background"),
)
PLACES = {
    "left": ("on the left", "at the left", "to the left", "on the left side"),
    "right": ("on the right", "at the right", "to the right", "on the right side"),
    "top": ("at the top", "in the top", "on top"),
    "bottom": ("at the bottom", "in the bottom", "on the bottom"),
    "centre": ("in the centre", "in the center", "in the middle"),
}
COLOUR_WORDS = {  # other words for a colour of the scenes
    "gray": ("gray", "grey"),
    "purple": ("purple", "violet"),
    "turquoise": ("turquoise", "cyan", "teal"),
    "navy": ("navy", "dark blue", "navy blue"),
    "light blue": ("light blue", "sky blue", "pale blue"),
    "lime": ("lime", "light green", "lime green"),
    "gold": ("gold", "golden"),
    "maroon": ("maroon", "dark red"),
    "beige": ("beige", "cream"),
    "lavender": ("lavender", "light purple"),
}
PLURAL_AS_IS = ("cherries", "grapes", "french fries", "scissors", "glasses", "peanuts", "jeans", "pancakes")
UNCOUNTED = (  # without an article
    *("bread", "broccoli", "fire", "popcorn", "tennis", "cattle", "corn", "maize", "money", "honey", "wine"),
    *("beer", "sunshine", "mail", "dice", "flames", "fries", "chips", "spectacles", "eyeglasses"),
    *("trousers", "pants", *PLURAL_AS_IS),
)
IRREGULAR = {
    **{"mouse": "mice", "wolf": "wolves", "loaf": "loaves", "leaf": "leaves", "die": "dice"},
    **{word: word for word in ("sheep", "dice", "cattle", "flames", "fries", "chips", "trousers", "pants")},
    **{word: word for word in ("spectacles", "eyeglasses", "scissors", "glasses", "jeans", "aircraft")},
}


class Described(Protocol):
    """A scene, as far as words go."""

    @property
    def subjects(self) -> tuple[str, ...]:
        """Their names."""

    @property
    def colour(self) -> str:
        """Of the background."""

    @property
    def size(self) -> str:
        """Small or large."""

    @property
    def place(self) -> str:
        """One of PLACES, or any other word for several subjects."""


@cache
def synonyms() -> dict[str, tuple[str, ...]]:
    """Name of a subject -> what else it is called."""
    lines = SYNONYMS.read_text(encoding="utf-8").splitlines()
    table = {name: tuple(words.split(", ")) for name, words in (line.split("\t") for line in lines)}
    return {name: table.get(name, ()) for name in subjects()}


def nouns(name: str) -> tuple[str, ...]:
    """All that a subject is called, its CLDR name first."""
    return (name, *synonyms()[name])


def plural(noun: str) -> str:
    """Of the last word, or of the first before "of": "dogs", "slices of pizza"."""
    head, of, rest = noun.partition(" of ")
    before, space, last = head.rpartition(" ")
    return before + space + _plural_word(last) + of + rest


def _plural_word(word: str) -> str:
    if word in IRREGULAR:
        return IRREGULAR[word]
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return word[:-1] + "ies"
    if word.endswith("fish") or word in PLURAL_AS_IS:
        return word
    return word + ("es" if word.endswith(("s", "x", "ch", "sh", "to", "go")) and word != "flamingo" else "s")


def article(words: str) -> str:
    """ "a dog", "an apple"; with a capital, "An apple"."""
    is_vowel = words.startswith((*"aeio", "hour")) and not words.startswith(("ewe", "one"))
    return f"an {words}" if is_vowel else f"a {words}"


def describe(scene: Described, rng: np.random.Generator) -> str:
    """One of very many descriptions of a scene."""
    what = _things(scene, rng)
    if rng.random() < 0.2:
        what = f"{_pick(INTRODUCTIONS, rng)} {what}"
    place = _pick(PLACES[scene.place], rng) if scene.place in PLACES else ""
    if scene.place == "centre" and rng.random() < 0.85:
        place = ""
    return _case(_composed(scene, what, place, rng), rng)


def _things(scene: Described, rng: np.random.Generator) -> str:
    first, *others = scene.subjects
    if not others:
        return _thing(first, scene.size, rng)
    if scene.subjects == (first,) * len(scene.subjects):
        adjective = f"{_pick(FILLERS, rng)} " if rng.random() < 0.15 else ""
        return f"{_pick(NUMBERS[len(scene.subjects)], rng)} {adjective}{plural(_noun(first, rng))}"
    return f"{_thing(first, '', rng)} {_pick(LINKS, rng)} {_thing(others[0], '', rng)}"


def _thing(name: str, size: str, rng: np.random.Generator) -> str:
    noun, adjectives = _noun(name, rng), []
    if size == "small":
        adjectives.append(_pick(SMALL, rng))
    elif size == "large" and rng.random() < 0.15:
        adjectives.append(_pick(LARGE, rng))
    if rng.random() < 0.15:
        adjectives.append(_pick(FILLERS, rng))
    words = " ".join([*adjectives, noun])
    if noun in UNCOUNTED or rng.random() < 0.25:
        return words
    return f"the {words}" if rng.random() < 0.08 else article(words)


def _noun(name: str, rng: np.random.Generator) -> str:
    """The CLDR name in four of ten, else a synonym, if there is one."""
    others = synonyms()[name]
    return name if not others or rng.random() < 0.4 else _pick(others, rng)


def _composed(scene: Described, what: str, place: str, rng: np.random.Generator) -> str:
    if rng.random() < 0.3:  # any background
        return f"{what} {place}".strip()
    colour = _pick(COLOUR_WORDS.get(scene.colour, (scene.colour,)), rng)
    if rng.random() < 0.12:
        return f"{article(f'{colour} background')} with {what} {place}".strip()
    ground = article_mended(_pick(GROUNDS, rng).format(colour))
    if place and rng.random() < 0.4:
        return f"{what} {place} of {article(f'{colour} background')}"
    return f"{what} {place} {ground}".replace("  ", " ").replace(" ,", ",")


def article_mended(text: str) -> str:
    """ "on an orange background" of "on a orange background"."""
    before, found, after = text.partition(" a ")
    return f"{before} {article(after)}" if found else text


def _case(text: str, rng: np.random.Generator) -> str:
    """As people write: mostly small letters, sometimes a sentence, rarely capitals."""
    draw = rng.random()
    if draw < 0.12:
        return text[0].upper() + text[1:] + ("." if draw < 0.04 else "")
    if draw < 0.15:
        return text.title()
    return text.upper() if draw < 0.17 else text


def _pick(words: tuple[str, ...], rng: np.random.Generator) -> str:
    return words[int(rng.integers(len(words)))]
