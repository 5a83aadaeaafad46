"""txt2image.py --cache: what is said of it, and what a picture remembers."""

import re

import pytest

from flux import images
from flux.step_cache import LEVELS

PROMPT, NEGATIVE = "a red apple", ("--negative-prompt", "two green birds", "--cfg-scale", 2)

SAID = r"step cache: (\d+) of (\d+) block evaluations saved"


@pytest.mark.parametrize(("given", "number"), [("high", LEVELS["high"]), ("1e3", 1000.0)])
def test_the_picture_remembers_it_and_is_made_again(call, model, tmp_path, given, number):
    common = (PROMPT, "--model", model, "--seed", 7, "--steps", 8, *NEGATIVE)
    status, out, err = call(*common, "--cache", given)
    assert (status, out) == (0, ["out.png"])
    saved, total = map(int, re.fullmatch(SAID, *err).groups())
    assert total == 2 * 8 * 5
    assert saved == (2 * 5 * 4 if given == "1e3" else 0)  # the steps of random weights are not alike
    assert float(images.read_metadata(tmp_path / "out.png")["cache"]) == number
    assert call("--remake", "out.png", "--output", "again.png")[2] == err
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "out.png").read_bytes()
    assert call(*common, "--output", "plain.png")[2] == []
    plain, picture = (images.load(tmp_path / name)[0] for name in ("plain.png", "out.png"))
    assert (plain != picture).any() == (saved > 0)
    assert "cache" not in images.read_metadata(tmp_path / "plain.png")


BAD = [
    ("much", "argument --cache: must be low, medium, high or a number, not much (see txt2image.py --help)"),
    (-1, "the cache's threshold must be from 0 (no effect) on and finite, not -1.0"),
]


@pytest.mark.parametrize(("value", "said"), BAD)
def test_bad_values_are_one_line(call, model, tmp_path, value, said):
    assert call(PROMPT, "--model", model, f"--cache={value}") == (2, [], [f"error: {said}"])
    assert not list(tmp_path.iterdir())
