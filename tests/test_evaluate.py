"""The judge of the built-in model, judged: true renderings, shuffled ones, damaged ones."""

import numpy as np
import pytest

from flux.errors import FluxError
from flux.evaluation.proportion import Proportion
from flux.recipes import emoji
from flux.recipes.tiny import evaluate

pytestmark = pytest.mark.skipif(not emoji.FONT.is_file(), reason="needs the font Noto Color Emoji")


@pytest.fixture(scope="module")
def shown() -> list[emoji.Composition]:
    return [composition for composition, _ in evaluate.held_out_prompts(200)]


@pytest.fixture(scope="module")
def pictures(shown) -> np.ndarray:
    render = emoji.Renderer()
    return np.stack([render(composition) for composition in shown])


def test_true_renderings_are_right(shown, pictures):
    shares = evaluate.judge(pictures, shown)
    assert all(share.right >= 0.99 * share.total for share in shares.values()), shares


def test_noisy_renderings_are_still_right(shown, pictures):
    noise = np.random.default_rng(0).normal(0, 20, pictures.shape)
    noisy = np.clip(pictures + noise, 0, 255).astype(np.uint8)
    shares = evaluate.judge(noisy, shown)
    assert all(share.right >= 0.97 * share.total for share in shares.values()), shares


def test_shuffled_prompts_are_near_chance(shown, pictures):
    shares = evaluate.judge(np.roll(pictures, 1, axis=0), shown)
    assert shares["subject"].right <= 4  # 1 in 215
    assert 2 <= shares["background"].right <= 45  # 1 in 10
    assert 15 <= shares["place"].right <= 70  # 1 in 5
    assert shares["all three"].right == 0


def test_one_wrong_thing_is_one_wrong_verdict():
    render = emoji.Renderer()
    asked = emoji.Composition(("red apple",), "blue", "large", "left")
    drawn = {
        "subject": emoji.Composition(("banana",), "blue", "large", "left"),
        "background": emoji.Composition(("red apple",), "green", "large", "left"),
        "place": emoji.Composition(("red apple",), "blue", "large", "top"),
    }
    for wrong, composition in drawn.items():
        shares = evaluate.judge(render(composition)[None], [asked])
        assert [name for name, share in shares.items() if not share.right] == [wrong, "all three"]


def test_prompts_are_held_out_fixed_and_distinct():
    prompts = evaluate.held_out_prompts(300)
    assert all(composition.held_out for composition, _ in prompts)
    assert len(set(prompts)) == 300
    assert prompts[:200] == evaluate.held_out_prompts(300)[:200]
    assert [c for c, _ in prompts[:50]] == [c for c, _ in evaluate.held_out_prompts(50)]
    with pytest.raises(FluxError, match="--count 0"):
        evaluate.held_out_prompts(0)


def test_wilson_interval():
    # By hand from Wilson (1927): 95 of 100 at z = 1.96.
    low, high = Proportion(95, 100).interval
    assert low == pytest.approx(0.8882, abs=1e-4)
    assert high == pytest.approx(0.9785, abs=1e-4)
    assert Proportion(0, 10).interval[0] == 0
    assert Proportion(10, 10).interval[1] == pytest.approx(1)
