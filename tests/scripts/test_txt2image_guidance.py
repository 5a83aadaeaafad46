"""txt2image.py with negative prompts: a range of true guidance, and NAG."""

import pytest

from flux import images

PROMPT, NEGATIVE = "a red apple", ("--negative-prompt", "two green birds")


@pytest.mark.parametrize(
    "options",
    [("--cfg-scale", 2, "--cfg-end", 0.5), ("--nag", 5), ("--nag", 3, "--cfg-scale", 2, "--no-t5-padding")],
)
def test_the_picture_remembers_it_and_is_made_again(call, model, tmp_path, options):
    common = (PROMPT, "--model", model, "--seed", 7, *NEGATIVE)
    assert call(*common, *options) == (0, ["out.png"], [])
    text = images.read_metadata(tmp_path / "out.png")
    for name, value in zip(options[::2], options[1::2], strict=False):
        assert float(text[name[2:].replace("-", "_")]) == value
    assert call("--remake", "out.png", "--output", "again.png")[0] == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "out.png").read_bytes()
    assert call(*common, "--cfg-scale", 2, "--output", "plain.png")[0] == 0
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "out.png").read_bytes()


BAD = [
    (("--nag", 5), "NAG needs a negative prompt: say what to lead away from"),
    (("--nag", 1, *NEGATIVE), "the NAG scale must be above 1 (no effect) and finite, not 1.0"),
    (NEGATIVE, "the negative prompt 'two green birds' needs a cfg scale above 1 or NAG to have an effect"),
    (("--cfg-end", 0.5), "the cfg end 0.5 needs a cfg scale above 1 to have an effect"),
    (("--cfg-scale", 2, "--cfg-end", 0), "the cfg end must be above 0 and at most 1, not 0.0"),
]


@pytest.mark.parametrize(("options", "said"), BAD)
def test_bad_values_are_one_line(call, model, tmp_path, options, said):
    assert call(PROMPT, "--model", model, *options) == (2, [], [f"error: {said}"])
    assert not list(tmp_path.iterdir())
