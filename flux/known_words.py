"""The words and sizes that a small model was trained on: what lies beyond them is said, not passed over."""

import difflib
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flux import jsonfiles
from flux.errors import FluxError

FILE = "known_words.json"  # in a model's folder
NEAREST, LIKENESS = 3, 0.66  # how many subjects are offered at most, and how like a word they are


@dataclass(frozen=True)
class KnownWords:
    """words: of all captions, small letters. subjects: what can be drawn -> what else people call it.

    sides: the least and the greatest side of the pictures trained on, pixels.
    """

    words: frozenset[str]
    subjects: Mapping[str, Iterable[str]]
    sides: tuple[int, int]

    @classmethod
    def of(
        cls, captions: Iterable[str], subjects: Mapping[str, Iterable[str]], sides: tuple[int, int]
    ) -> "KnownWords":
        """What a training's captions hold."""
        return cls(frozenset(word for text in captions for word in split(text)), subjects, sides)

    def __or__(self, other: "KnownWords") -> "KnownWords":
        """What is known after two trainings."""
        least, greatest = zip(self.sides, other.sides, strict=True)
        subjects = {**self.subjects, **other.subjects}
        return KnownWords(self.words | other.words, subjects, (min(least), max(greatest)))

    def of_prompt(self, prompt: str) -> str | None:
        """A line that names the prompt's unknown words and the subjects nearest to them; None without any."""
        unknown = [word for word in dict.fromkeys(split(prompt)) if word not in self.words]
        if not unknown:
            return None
        text = f"words that the model was not trained on: {', '.join(unknown)}"
        like = {name: _likeness(unknown, (name, *others)) for name, others in self.subjects.items()}
        near = sorted((name for name in like if like[name] >= LIKENESS), key=lambda name: -like[name])[
            :NEAREST
        ]
        return f"{text}; nearest subjects: {', '.join(near)}" if near else text

    def of_size(self, size: tuple[int, int]) -> str | None:
        """A line about a size (height, width) that is beyond those trained on; None for others."""
        least, greatest = self.sides
        if all(least <= side <= greatest for side in size):
            return None
        sides = f"{least} to {greatest}" if least < greatest else f"{least}"
        return (
            f"the model was trained on sides of {sides} pixels: {size[0]}x{size[1]} may show no whole subject"
        )

    def warn(self, wanted: Iterable[tuple[str, tuple[int, int]]]) -> None:
        """Warns, once of each, of the prompts and sizes (height, width) that lie beyond the training."""
        notes = (note for prompt, size in wanted for note in (self.of_prompt(prompt), self.of_size(size)))
        for note in dict.fromkeys(notes):
            if note is not None:
                warnings.warn(note, stacklevel=1)

    def write(self, folder: Path) -> None:
        """Writes the file into a model's folder."""
        subjects = {name: ", ".join(others) for name, others in self.subjects.items()}
        words = " ".join(sorted(self.words))
        jsonfiles.write(folder / FILE, {"sides": self.sides, "subjects": subjects, "words": words})


def split(text: str) -> list[str]:
    """The words of a text, in small letters; hyphens and apostrophes belong to them."""
    return re.findall(r"\w+(?:['’-]\w+)*", text.lower())


def read(folder: Path) -> KnownWords | None:
    """What a model's folder says; None where it says nothing. FluxError for a file of another kind."""
    path = folder / FILE
    if not path.is_file():
        return None
    table = jsonfiles.read(path)
    try:
        least, greatest = (jsonfiles.count(side, f"{path}: sides") for side in table["sides"])
        words = frozenset(table["words"].split())
        subjects = {
            name: tuple(filter(None, others.split(", "))) for name, others in table["subjects"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        raise FluxError(
            f"{path}: must hold words (a text), subjects (a text each) and sides (two numbers)"
        ) from None
    return KnownWords(words, subjects, (least, greatest))


def _likeness(words: list[str], names: Iterable[str]) -> float:
    """Of the likest two of the words and the words of the names, 0 to 1."""
    parts = {part for name in names for part in split(name)}
    ratios = (difflib.SequenceMatcher(None, word, part).ratio() for word in words for part in parts)
    return max(ratios, default=0.0)
