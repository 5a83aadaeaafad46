"""Optimizers and schedules by name, and Prodigy's state."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from flux.errors import FluxError
from flux.training.optimizers import OPTIMIZERS, Prodigy, make
from flux.training.schedules import SCHEDULES, schedule
from flux.training.trainer import Trainer

from .test_trainer import Net, batches, loss


def trainer(name: str) -> Trainer:
    mx.random.seed(1)
    return Trainer(Net(), loss, batches, make(name, schedule("cosine", 0.01, 20, 2)), seed=3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_is_straight(name, tmp_path):
    mx.disable_compile()
    try:
        straight, first, second = trainer(name), trainer(name), trainer(name)
        straight.run(8)
        first.run(5)
        first.save(tmp_path / "state.safetensors")
        second.load(tmp_path / "state.safetensors")
        second.run(8)
    finally:
        mx.enable_compile()
    ours, theirs = (
        dict(tree_flatten({"model": t.model.parameters(), "optimizer": t.optimizer.state}))
        for t in (straight, second)
    )
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[path], theirs[path]) for path in ours)
    fresh = dict(tree_flatten(trainer(name).model.parameters()))
    moved = dict(tree_flatten(second.model.parameters()))
    assert not any(mx.array_equal(moved[path], fresh[path]) for path in fresh)


def test_prodigy_keeps_no_zeros():
    optimizer = Prodigy()
    optimizer.init({"down": mx.ones((2, 3)), "up": mx.zeros((3, 2))})
    assert optimizer.state["down"]["first"].shape == (2, 3)
    assert optimizer.state["up"]["first"].shape == ()


def test_prodigy_without_init_begins_at_the_parameters():
    """Not at the gradients, with which MLX's own optimizers initialize themselves."""
    optimizer = Prodigy()
    optimizer.apply_gradients({"w": mx.array([3.0])}, {"w": mx.array([7.0])})
    assert optimizer.state["w"]["first"].item() == 7


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make("sgd", lambda step: step), "no optimizer 'sgd': choose adam, adamw"),
        (lambda: make("adam", lambda step: step, 0.1), "weight decay 0.1: give 0, adam has none"),
        (lambda: make("lion", lambda step: step, -0.1), "weight decay -0.1: give 0 or more"),
        (lambda: schedule("step", 1.0, 10), "no schedule 'step': choose constant"),
        (lambda: schedule("cosine", 1.0, 10, 10), "a warm-up of 10 in 10 updates: give 0 to 9"),
        (lambda: schedule("cosine", 1.0, 10, 0, 0), "0 restarts"),
    ],
)
def test_refused(call, message):
    with pytest.raises(FluxError, match=message):
        call()


def test_a_restart_falls_on_its_update():
    """For every length: with cycles in floating point some would begin an update late."""
    for updates in range(12, 61, 6):
        rate = schedule("cosine_with_restarts", 1.0, updates, 0, 6)
        steps = mx.arange(updates).astype(mx.uint64)
        peaks = np.flatnonzero(np.array(rate(steps)) == 1.0)
        assert peaks.tolist() == list(range(0, updates, updates // 6)), updates


def test_after_the_end_the_rate_is_zero():
    for name in SCHEDULES[1:]:
        assert schedule(name, 1.0, 10, 2)(mx.array(10)).item() == pytest.approx(0, abs=1e-7)


def test_settings_of_the_optimizers():
    """Those of their papers, or what is given."""
    rate = schedule("constant", 1e-3, 10)
    expected = {"adam": [0.9, 0.999], "adamw": [0.9, 0.999], "lion": [0.9, 0.99], "prodigy": [0.9, 0.999]}
    for name, betas in expected.items():
        assert list(make(name, rate).betas) == betas
        assert list(make(name, rate, betas=(0.5, None)).betas) == [0.5, betas[1]]
        assert list(make(name, rate, betas=(None, 0.5)).betas) == [betas[0], 0.5]
        if name != "lion":
            assert make(name, rate).eps == 1e-8
            assert make(name, rate, epsilon=1e-3).eps == 1e-3
