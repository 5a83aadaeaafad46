"""The evaluation of changed pictures, on pictures that are known to be right or wrong."""

from dataclasses import replace

import numpy as np
import pytest

import flux  # noqa: F401  before mlx.core
from flux.recipes.emoji import FONT, SIDE, Composition, Renderer
from flux.recipes.tiny import evaluate_edits

pytestmark = pytest.mark.skipif(not FONT.is_file(), reason="needs the font Noto Color Emoji")
SHOWN = [
    Composition(("red apple",), "blue", "large", "centre"),
    Composition(("banana",), "pink", "small", "left"),
]


def rendered(**changes) -> np.ndarray:
    render = Renderer()
    return np.stack([render(replace(composition, **changes)) for composition in SHOWN])


def right(given: np.ndarray, made: np.ndarray, reach: int = 0) -> dict[str, int]:
    found = evaluate_edits.judge_inpainting(given, made, SHOWN, reach)
    return {name: proportion.right for name, proportion in found.items()}


def test_judge_inpainting():
    given, made = rendered(subjects=("pizza",)), rendered()
    assert right(given, made) == {"kept": 2, "subject": 2, "all": 2}
    assert right(given, given) == {"kept": 2, "subject": 0, "all": 0}
    made[0, 0, 0] += 1  # one pixel outside the box
    made[1, 16 - 3, 4] += 1  # three above the box
    assert right(given, made) == {"kept": 0, "subject": 2, "all": 0}
    assert right(given, made, reach=3)["kept"] == 1


def test_the_boxes_are_where_the_subjects_stand():
    mask = np.stack([evaluate_edits.mask_of(composition) for composition in SHOWN]) > 0
    given, made = rendered(subjects=("pizza",)), rendered()
    assert np.array_equal(given[~mask], made[~mask])
    assert [evaluate_edits.box_of(composition) for composition in SHOWN] == [(8, 8, 48, 48), (16, 0, 32, 32)]


def test_a_seam_is_seen_where_it_is():
    flat = np.full((2, SIDE, SIDE, 3), 100, np.uint8)
    assert evaluate_edits.seam(flat, SHOWN) == (0, 0, 0)
    mask = np.stack([evaluate_edits.mask_of(composition) for composition in SHOWN]) > 0
    assert evaluate_edits.seam(np.where(mask, 106, flat).astype(np.uint8), SHOWN) == (6, 0, 0)


def test_another_subject():
    rng = np.random.default_rng(0)
    for _ in range(20):
        other = evaluate_edits.another_subject(SHOWN[0], rng)
        assert other.subjects != SHOWN[0].subjects
        assert replace(other, subjects=SHOWN[0].subjects) == SHOWN[0]
