"""Optimizers and learning rates against prodigyopt, torch and transformers, on the same gradients."""

import mlx.core as mx
import numpy as np
import pytest

from flux.training import optimizers, schedules

torch = pytest.importorskip("torch")
prodigyopt = pytest.importorskip("prodigyopt")
optimization = pytest.importorskip("transformers.optimization")

SHAPES = {"a": (5, 7), "b": (3,), "up": (6, 4)}
STEPS = 30


def first_values() -> dict[str, np.ndarray]:
    """As of a LoRA: small, and zeros. (Prodigy's first steps are 1e-6: beside 1 they would be rounding.)"""
    rng = np.random.default_rng(0)
    values = {name: 0.02 * rng.standard_normal(shape) for name, shape in SHAPES.items()}
    return {name: (name != "up") * value.astype(np.float32) for name, value in values.items()}


def gradients(step: int) -> dict[str, np.ndarray]:
    """With a drift that fades, so that d grows and then stays, and noise."""
    drift, noise = np.random.default_rng(1), np.random.default_rng((1, step))
    return {
        name: (0.8**step * drift.standard_normal(shape) + 0.3 * noise.standard_normal(shape)).astype(
            np.float32
        )
        for name, shape in SHAPES.items()
    }


def run_ours(optimizer, rates: list[float] | None = None) -> list[dict[str, np.ndarray]]:
    values = {name: mx.array(value) for name, value in first_values().items()}
    optimizer.init(values)
    path = []
    for step in range(STEPS):
        if rates:
            optimizer.learning_rate = rates[step]
        own = {name: mx.array(g) for name, g in gradients(step).items()}
        values = optimizer.apply_gradients(own, values)
        path.append({name: np.array(value) for name, value in values.items()})
    return path


def run_theirs(make, rates: list[float] | None = None) -> list[dict[str, np.ndarray]]:
    values = {name: torch.nn.Parameter(torch.from_numpy(v.copy())) for name, v in first_values().items()}
    optimizer = make(values.values())
    path = []
    for step in range(STEPS):
        if rates:
            optimizer.param_groups[0]["lr"] = rates[step]
        for name, own in gradients(step).items():
            values[name].grad = torch.from_numpy(own)
        optimizer.step()
        path.append({name: value.detach().numpy().copy() for name, value in values.items()})
    return path


def check(ours: list, theirs: list, tolerance: float) -> None:
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        for name in SHAPES:
            away = np.linalg.norm(b[name] - first_values()[name])
            rounding = 2e-7 * np.linalg.norm(b[name])  # the first steps are not much more, with d0 = 1e-6
            assert np.linalg.norm(a[name] - b[name]) <= tolerance * away + rounding, (step, name)


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({}, {}),
        ({"weight_decay": 0.1}, {"weight_decay": 0.1}),
        (
            {"bias_correction": True, "betas": (0.8, 0.95)},
            {"use_bias_correction": True, "betas": (0.8, 0.95)},
        ),
        ({"d0": 1e-3, "weight_decay": 0.01}, {"d0": 1e-3, "weight_decay": 0.01}),
    ],
)
def test_prodigy(options, theirs):
    ours = run_ours(optimizers.Prodigy(1.0, **options))
    expected = run_theirs(lambda values: prodigyopt.Prodigy(values, **theirs))
    check(ours, expected, 1e-4)  # of the way gone so far, which begins at d0 = 1e-6
    assert np.abs(expected[-1]["a"] - first_values()["a"]).max() > 5e-5  # d has grown from 1e-6


def test_prodigy_with_a_changing_rate():
    """Also 0: the first update of a warm-up, and in between."""
    rates = [0.0, 0.25, 0.5, 0.0, 1.0] + [1.0 - i / STEPS for i in range(STEPS - 5)]
    ours = run_ours(optimizers.Prodigy(1.0, weight_decay=0.1, bias_correction=True), rates)
    options = {"weight_decay": 0.1, "use_bias_correction": True}
    check(ours, run_theirs(lambda values: prodigyopt.Prodigy(values, **options), rates), 1e-4)


def test_prodigy_waits_for_a_gradient():
    """Gradients of zero move nothing, decay included, as in the package."""
    value, zero = first_values()["a"], np.zeros(SHAPES["a"], np.float32)
    optimizer = optimizers.Prodigy(1.0, weight_decay=0.1)
    optimizer.init({"a": mx.array(value)})
    assert np.array_equal(
        optimizer.apply_gradients({"a": mx.array(zero)}, {"a": mx.array(value)})["a"], value
    )
    assert optimizer.state["prodigy"]["updates"].item() == 0


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam(name):
    decay = 0.1 if name == "adamw" else 0.0
    theirs = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    ours = run_ours(optimizers.make(name, lambda step: mx.array(0.01), decay))
    check(ours, run_theirs(lambda values: theirs(values, lr=0.01, weight_decay=decay)), 1e-5)


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_schedules(name, warmup):
    updates, restarts = 40, 3
    kind = {"constant": "constant_with_warmup", "cosine_with_restarts": "cosine_with_restarts"}.get(
        name, name
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    specific = {"num_cycles": restarts} if name == "cosine_with_restarts" else {}
    theirs = optimization.get_scheduler(kind, optimizer, warmup, updates, specific)
    rate = schedules.schedule(name, 0.3, updates, warmup, restarts)
    for update in range(updates):
        ours = rate(mx.array(update, mx.uint64)).item()
        assert ours == pytest.approx(theirs.get_last_lr()[0], abs=1e-6), update
        optimizer.step()
        theirs.step()
    if name != "constant":
        assert ours < 0.3 / (updates - warmup) + 1e-6  # the last update's
