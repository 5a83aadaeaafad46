"""What a small model does not know is named, with what is near."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from flux import FluxPipeline, known_words
from flux.conditioning import Edit, Picture
from flux.errors import FluxError
from flux.generation import generate
from flux.known_words import KnownWords, split
from flux.requests import Request

ROOT = Path(__file__).parents[1]
CAPTIONS = ["a dog on a red background", "Three apples, t-shirt"]
KNOWN = KnownWords.of(CAPTIONS, {"dog face": ("dog", "puppy"), "red apple": ("apple",)}, (64, 128))


def test_words_are_split_in_small_letters():
    assert split("A T-shirt & the dog's 3 Bones, über!") == [
        "a",
        "t-shirt",
        "the",
        "dog's",
        "3",
        "bones",
        "über",
    ]


def test_known_prompts_have_no_line():
    assert KNOWN.of_prompt("A DOG, red dog on background") is None
    assert KNOWN.of_prompt("") is None


@pytest.mark.parametrize(
    ("prompt", "line"),
    [
        (
            "a puppi on Mars",
            "words that the model was not trained on: puppi, mars; nearest subjects: dog face",
        ),
        ("puppy puppy", "words that the model was not trained on: puppy; nearest subjects: dog face"),
        (
            "aple & dogs",
            "words that the model was not trained on: aple, dogs; nearest subjects: red apple, dog face",
        ),
        ("xylophone", "words that the model was not trained on: xylophone"),
    ],
)
def test_unknown_words_are_named_once_with_the_nearest_subjects(prompt, line):
    assert KNOWN.of_prompt(prompt) == line


def test_sizes_beyond_the_training_have_a_line():
    assert KNOWN.of_size((64, 128)) is None
    assert KNOWN.of_size((64, 144)) == (
        "the model was trained on sides of 64 to 128 pixels: 64x144 may show no whole subject"
    )
    assert KNOWN.of_size((48, 64)) is not None


def test_two_trainings_know_what_either_knows():
    both = KNOWN | KnownWords.of(["a cat"], {"cat": ()}, (32, 64))
    assert both.of_prompt("a cat and a dog") == "words that the model was not trained on: and"
    assert (both.sides, list(both.subjects)) == ((32, 128), ["dog face", "red apple", "cat"])


def test_what_is_written_is_read(tmp_path):
    assert known_words.read(tmp_path) is None
    KNOWN.write(tmp_path)
    assert known_words.read(tmp_path) == KNOWN


@pytest.mark.parametrize("table", [{}, {"words": 1}, {"words": "a", "subjects": [], "sides": [1, 2]}])
def test_another_file_is_refused(tmp_path, table):
    (tmp_path / known_words.FILE).write_text(json.dumps(table))
    with pytest.raises(FluxError, match=r"known_words\.json"):
        known_words.read(tmp_path)


def test_the_built_in_model_says_it_once():
    pipeline = FluxPipeline("tiny")

    def said(prompt: str, size: tuple[int, int] = (64, 64)) -> list[str]:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            generate(pipeline, [Request(prompt, image_size=size, steps=1)] * 2, keep_models=True)
        return [str(warning.message) for warning in found]

    assert said("a red apple on a blue background") == []
    assert said("a puppy") == ["words that the model was not trained on: puppy; nearest subjects: dog face"]
    (line,) = said("an owl", (64, 128))
    assert line.startswith("the model was trained on sides of 64 pixels: 64x128")


def test_a_model_with_an_adapter_or_of_parts_may_know_more():
    pipeline = FluxPipeline("tiny")
    names = ("spec", "flow", "ae", "clip", "t5", "clip_tokenizer", "t5_tokenizer")
    parts = [getattr(pipeline, name) for name in names]
    from flux.loading import Parts

    assert FluxPipeline.from_parts(Parts(*parts)).known_words is None
    assert (
        FluxPipeline("tiny", clip=str(Path(pipeline.checkpoint.parts["clip"].files[0]))).known_words is None
    )


def test_the_program_says_it_in_one_line_and_draws(tmp_path):
    program = [
        sys.executable,
        "txt2image.py",
        "--model",
        "tiny",
        "--steps",
        "1",
        "--output",
        str(tmp_path / "a.png"),
    ]
    done = subprocess.run([*program, "a cute puppy"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "the model was not trained on: cute, puppy; nearest subjects: dog face" in done.stderr
    assert (tmp_path / "a.png").is_file()


def test_the_size_is_that_of_what_the_model_works_on(recwarn):
    """An expanded picture, not the one that is given."""
    small = Picture.from_array(np.full((32, 32, 3), 99, np.uint8))
    edit = Edit(small, expand=(16, 16, 16, 16))
    FluxPipeline("tiny").generate_images("a red apple", seed=1, num_steps=1, edit=edit)
    assert not [str(found.message) for found in recwarn if "sides" in str(found.message)]
