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

from flux.distributed.ranks import Ranks
from flux.errors import FluxError
from flux.training.callbacks import Every, Finite, Log, Stop, Stopped, Window, interval
from flux.training.ema import EMA
from flux.training.optimizers import muon
from flux.training.schedules import warmup_decay
from flux.training.trainer import Callback, Trainer, sample_key


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
    trainer.run(40, (Log(lambda trainer, means, seconds: losses.append(means["loss"])),))
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


# --- accumulated gradients ---


def plain_loss(model: Net, batch: dict[str, mx.array], key: mx.array):
    return mx.square(model(batch["x"]) - batch["y"]).mean(), {"size": mx.abs(batch["x"]).mean()}


def whole(step: int) -> dict[str, mx.array]:
    """Four batches as one."""
    parts = [batches(4 * step + i) for i in range(4)]
    return {name: mx.concatenate([part[name] for part in parts]) for name in ("x", "y")}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_accumulated_batches_are_one_large_batch(clip_norm, compiled):
    """With SGD, whose steps are as long as the gradient: Adam would hide a factor, and so would a norm."""
    made = []
    for data, accumulate in ((batches, 4), (whole, 1)):
        mx.random.seed(1)
        model, seen = Net(), []
        settings = {"accumulate": accumulate, "clip_norm": clip_norm, "compiled": compiled}
        trainer = Trainer(model, plain_loss, data, optim.SGD(0.1), **settings)
        trainer.run(3, (Log(lambda trainer, means, seconds, seen=seen: seen.append(means)),))
        made.append((dict(tree_flatten(model.parameters())), seen))
    (parameters, metrics), (expected, expected_metrics) = made
    for name, array in expected.items():
        assert np.allclose(array, parameters[name], rtol=1e-5, atol=1e-6), name
    for one, other in zip(metrics, expected_metrics, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    assert set(metrics[0]) == {"loss", "size"} | ({"norm"} if clip_norm else set())
    mx.random.seed(1)
    start = dict(tree_flatten(Net().parameters()))
    assert not np.allclose(start["first.weight"], expected["first.weight"], atol=1e-4)


def test_clipping_bounds_the_norm_of_the_mean_gradient():
    moved = {}
    for accumulate in (1, 4):
        mx.random.seed(1)
        model = Net()
        before = {name: np.array(a) for name, a in tree_flatten(model.parameters())}
        trainer = Trainer(model, plain_loss, batches, optim.SGD(1.0), accumulate=accumulate, clip_norm=0.01)
        trainer.run(1)
        change = [np.array(a) - before[name] for name, a in tree_flatten(model.parameters())]
        moved[accumulate] = np.sqrt(sum((c**2).sum() for c in change))
    assert moved == {1: pytest.approx(0.01, rel=1e-3), 4: pytest.approx(0.01, rel=1e-3)}


# --- callbacks ---


def test_callbacks_are_called_in_order_and_may_end_the_run():
    calls = []

    class Noting(Callback):
        def before_step(self, trainer):
            calls.append(("before", trainer.step))

        def between_batches(self, trainer):
            calls.append(("between", trainer.step))

        def after_step(self, trainer, metrics):
            calls.append(("after", trainer.step, trainer.is_done))
            if trainer.step == 2:
                trainer.stop()

    mx.random.seed(1)
    trainer = Trainer(Net(), loss, batches, optim.SGD(0.1), accumulate=2, compiled=False)
    trainer.run(9, (Noting(), Every(lambda trainer: trainer.is_done, lambda trainer: calls.append("end"))))
    one = [("before", 0), ("between", 0), ("after", 1, False)]
    assert calls == [*one, ("before", 1), ("between", 1), ("after", 2, False), "end"]
    trainer.run(3)
    assert trainer.step == 3
    trainer.run(3)  # nothing is left
    assert trainer.step == 3


def test_a_run_that_is_stopped_between_batches_has_the_parameters_of_the_last_whole_step():
    def make() -> Trainer:
        mx.random.seed(1)
        model = Net()
        return Trainer(model, loss, batches, optim.AdamW(0.01), ema=EMA(model), accumulate=3, compiled=False)

    class Asked(Stop):
        def between_batches(self, trainer):
            if trainer.step == 2:
                self.ask()
            super().between_batches(trainer)

    stopped, straight, stop = make(), make(), Asked(Ranks(), quiet=True)
    with pytest.raises(KeyboardInterrupt):  # nothing to save yet
        stop.ask()
    with pytest.raises(Stopped), stop.training():
        stopped.run(5, (stop,))
    straight.run(2)
    assert_same(straight, stopped)
    stopped.run(5)
    straight.run(5)
    assert_same(straight, stopped)


def test_what_has_come_to_its_last_step_is_not_stopped_any_more():
    trainer, stop = make_trainer("adamw"), Stop(Ranks(), quiet=True)
    last = Every(lambda trainer: trainer.is_done, lambda _: stop.ask())
    with stop.training():
        trainer.run(3, (last, stop))
        assert trainer.step == 3
        with pytest.raises(Stopped):  # but what comes after it is
            trainer.run(5, (stop,))
    assert trainer.step == 4


def test_the_log_has_the_means_since_the_last_line_also_of_an_earlier_session():
    mx.random.seed(1)
    values, lines = [], []
    log = Log(lambda trainer, means, seconds: lines.append((trainer.step, means["loss"])), 3)
    trainer = Trainer(Net(), loss, batches, optim.SGD(0.1), compiled=False)
    trainer.run(7, (Log(lambda trainer, means, seconds: values.append(means["loss"])), log))
    means = [np.mean(values[:3]), np.mean(values[3:6]), values[6]]
    assert lines == [(3, pytest.approx(means[0])), (6, pytest.approx(means[1])), (7, pytest.approx(means[2]))]
    window = Window()
    window.add({"loss": 1.0, "r1": 4.0})
    window.add({"loss": 3.0})
    assert window.take() == {"loss": 2.0, "r1": 4.0}
    assert window.take() == {}


def test_intervals_of_steps_and_of_seconds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("flux.training.callbacks.time.monotonic", lambda: now[0])
    by_steps, by_seconds = interval(steps=3), interval(seconds=10)
    found = []
    for step in range(1, 8):
        now[0] += 4
        trainer = type("At", (), {"step": step})
        found.append((by_steps(trainer), by_seconds(trainer)))
    assert [a for a, _ in found] == [False, False, True, False, False, True, False]
    assert [b for _, b in found] == [False, False, True, False, False, True, False]


def test_what_is_not_finite_ends_the_run_by_name():
    def bad(model, batch, key):
        return mx.array(float("nan")), {"norm": mx.array(2.0), "kl": mx.array(float("inf"))}

    trainer = Trainer(Net(), bad, batches, optim.SGD(0.1), compiled=False)
    with pytest.raises(FluxError, match="the loss is nan, the kl is inf at step 1"):
        trainer.run(5, (Finite(lambda trainer: f"at step {trainer.step}"),))


def test_keys_are_seed_and_position():
    assert sample_key(7, 9).tolist() == [7, 9]
    with pytest.raises(FluxError, match="seed must lie between 0 and 4294967295"):
        sample_key(-1, 0)


def test_a_state_replaces_the_one_before_in_one_move(tmp_path, monkeypatch):
    """A reader beside sees the old file or the new one: it is never opened for writing."""
    trainer, file = make_trainer("adamw"), tmp_path / "state.safetensors"
    trainer.save(file)
    with file.open("rb") as beside:
        before = file.read_bytes()
        trainer.run(1)
        trainer.save(file)
        assert beside.read() == before
    assert file.read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


RUN = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import flux
from pathlib import Path
from flux.training.callbacks import Every, always
from test_trainer import make_trainer
trainer, file = make_trainer("muon"), Path({file!r})
if file.exists():
    trainer.load(file)
trainer.run(60, (Every(always, lambda t: (t.save(file), print(t.step, flush=True))),))
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
