"""The trainer: it learns, and a stopped run that was resumed is the straight run, to the bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from flux.errors import FluxError
from flux.training.ema import EMA
from flux.training.optimizers import muon
from flux.training.schedules import warmup_decay
from flux.training.trainer import Trainer


class Net(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.first = nn.Linear(3, width)
        self.second = nn.Linear(width, 2)

    def __call__(self, x: mx.array) -> mx.array:
        return self.second(mx.tanh(self.first(x)))


def loss(model: Net, batch: dict[str, mx.array], key: mx.array):
    noise = 0.01 * mx.random.normal(batch["y"].shape, key=key)
    error = mx.square(model(batch["x"]) - batch["y"] + noise).mean()
    return error, {"noise": noise.mean()}


def batches(step: int) -> dict[str, mx.array]:
    x = np.random.default_rng((0, step)).standard_normal((16, 3)).astype(np.float32)
    return {"x": mx.array(x), "y": mx.array(np.stack([x[:, 0] * x[:, 1], x[:, 2]], axis=1))}


def make_trainer(optimizer: str, width: int = 8, with_ema: bool = True) -> Trainer:
    mx.random.seed(1)
    model = Net(width)
    rate = warmup_decay(0.02, 40, 5)
    chosen = muon(rate, rate) if optimizer == "muon" else optim.AdamW(rate)
    return Trainer(model, loss, batches, chosen, seed=3, ema=EMA(model, 0.9) if with_ema else None)


def everything(trainer: Trainer) -> dict[str, np.ndarray]:
    trees = [trainer.model.parameters(), trainer.optimizer.state, trainer.ema.state]
    return {f"{i}.{name}": np.array(a) for i, tree in enumerate(trees) for name, a in tree_flatten(tree)}


def assert_same(one: Trainer, other: Trainer) -> None:
    a, b = everything(one), everything(other)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].tobytes() == b[name].tobytes(), name


def test_it_learns():
    trainer, losses = make_trainer("adamw"), []
    trainer.run(40, (lambda trainer, metrics: losses.append(metrics["loss"].item()),))
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert trainer.step == 40


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("stop", [1, 7, 19])
def test_stop_and_resume_is_the_straight_run_to_the_bit(tmp_path, optimizer, stop):
    straight = make_trainer(optimizer)
    straight.run(20)
    first = make_trainer(optimizer)
    first.run(stop)
    first.save(tmp_path / "state.safetensors")
    second = make_trainer(optimizer)
    second.load(tmp_path / "state.safetensors")
    assert second.step == stop
    second.run(20)
    assert_same(straight, second)


def test_loading_into_a_trainer_that_has_run_forgets_its_past(tmp_path):
    first = make_trainer("muon")
    first.run(4)
    first.save(tmp_path / "state.safetensors")
    first.run(9)
    first.load(tmp_path / "state.safetensors")
    first.run(12)
    straight = make_trainer("muon")
    straight.run(12)
    assert_same(straight, first)


def test_frozen_parameters_stay_and_are_saved(tmp_path):
    trainer = make_trainer("adamw", with_ema=False)
    trainer.model.first.freeze()
    model = trainer.model
    before = np.array(model.first.weight), np.array(model.second.weight)
    trainer = Trainer(model, loss, batches, optim.AdamW(0.01), seed=3)
    trainer.run(3)
    assert np.array_equal(before[0], np.array(model.first.weight))
    assert not np.array_equal(before[1], np.array(model.second.weight))
    trainer.save(tmp_path / "state.safetensors")
    assert "model.first.weight" in mx.load(str(tmp_path / "state.safetensors"))


def test_a_state_of_another_network_is_refused_by_name(tmp_path):
    make_trainer("adamw", width=9).save(tmp_path / "state.safetensors")
    with pytest.raises(FluxError, match=r"state\.safetensors.*model\.first\.weight"):
        make_trainer("adamw").load(tmp_path / "state.safetensors")


def test_ema_is_the_average_by_hand():
    trainer = make_trainer("adamw")
    expected = np.array(trainer.model.first.weight)
    for step in range(6):
        trainer.run(step + 1)
        share = 1 - min(0.9, (1 + step) / (10 + step))
        expected = expected + share * (np.array(trainer.model.first.weight) - expected)
    assert np.allclose(np.array(trainer.ema.state["average"]["first"]["weight"]), expected, atol=1e-6)
    trainer.ema.copy_to(trainer.model)
    assert np.allclose(np.array(trainer.model.first.weight), expected, atol=1e-6)


def test_schedule():
    rate = warmup_decay(2.0, 110, 10, hold=0.5)
    values = [rate(mx.array(step)).item() for step in (0, 9, 30, 60, 85, 110, 200)]
    assert values == pytest.approx([0.2, 2.0, 2.0, 2.0, 1.0, 0.0, 0.0])


RUN = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import flux
from pathlib import Path
from test_trainer import make_trainer
trainer, file = make_trainer("muon"), Path({file!r})
if file.exists():
    trainer.load(file)
trainer.run(60, (lambda trainer, metrics: (trainer.save(file), print(trainer.step, flush=True)),))
"""


def test_killed_while_saving_it_goes_on_to_the_same_result(tmp_path):
    """Saves after every step, is killed at some moment, mostly in the middle of a save; then again."""
    tests = Path(__file__).parent
    code = RUN.format(root=str(tests.parent), tests=str(tests), file=str(tmp_path / "state.safetensors"))
    for lines in (3, 5):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
            for _ in range(lines):
                process.stdout.readline()
            os.kill(process.pid, signal.SIGKILL)
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    straight, resumed = make_trainer("muon"), make_trainer("muon")
    straight.run(60)
    resumed.load(tmp_path / "state.safetensors")
    assert resumed.step == 60
    assert_same(straight, resumed)
