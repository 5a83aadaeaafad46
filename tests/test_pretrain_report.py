"""What a training shows and writes: the console's line, the metrics file, plots."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from flux.training import report
from flux.training.callbacks import Estimate
from flux.training.console import Console, duration
from flux.training.plots import COLOURS, HEIGHT, LEFT, RIGHT, WIDTH, Curve, figure
from flux.training.pretrain import graphs
from flux.training.pretrain.watch import console_line


def test_the_console_line():
    metrics = {"vae": 0.123456, "kl": 2.0, "generator": -0.5, "discriminator": 1.5, "lpips": 0.25, "loss": 9}
    of = {"epoch": 20, "batch": 500}
    line = console_line("Step vae_gan (2/3)", 923, {"epoch": 5, "batch": 127}, of, metrics, 3.21)
    assert line == (
        "[00:15:23] Step vae_gan (2/3) | Epoch 5/20 | Batch 127/500 | VAE 0.1235 | KL 2 | G -0.5 | D 1.5 | "
        "LPIPS 0.25 | 3.21s/batch"
    )
    unknown = console_line("t", 0, {"epoch": 1, "batch": 1}, {"epoch": None, "batch": 9}, {}, 1.0)
    assert "Epoch 1 |" in unknown


def test_long_work_has_a_line_now_and_then_where_there_is_no_terminal(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("flux.training.console.time.monotonic", lambda: now[0])

    def work():
        for item in range(10):
            now[0] += 6
            yield item

    assert list(Console(quiet=False).track(work(), "encoding", 10)) == list(range(10))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"encoding: {n} of 10, {6 * n} s" for n in (3, 6, 9, 10)]
    assert list(Console(quiet=True).track(work(), "encoding", 10)) == list(range(10))
    assert list(Console(quiet=False).track(iter([1]), "short", 1)) == [1]
    assert capsys.readouterr().err == ""


def test_how_long_it_will_take_is_said_after_the_first_steps(monkeypatch):
    now, said = [0.0], []
    monkeypatch.setattr("flux.training.callbacks.time.monotonic", lambda: now[0])
    estimate = Estimate(said.append, 1003, "updates")
    for step in range(1, 6):
        now[0] += 60 if step == 1 else 10  # the first one compiles
        estimate.after_step(SimpleNamespace(step=step), {})
    assert said == ["about 2 h 47 min for the 1000 updates that are left"]
    assert [duration(seconds) for seconds in (5, 89, 120, 3599, 3660)] == [
        *("5 s", "89 s", "2 min", "1 h 00 min", "1 h 01 min")
    ]


def test_a_torn_line_and_what_comes_after_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "training_metrics_vae.jsonl"
    file = report.Events(path, "global_step", 0)
    for step in range(1, 6):
        file.write({"global_step": step, "metrics": {"loss": 1.0}, "learning_rates": {}, "batch_time": 1})
    path.write_text(path.read_text() + '{"global_step": 6, "met')
    assert len(report.read_lines(path)) == 5
    report.Events(path, "global_step", 3)
    assert [json.loads(line)["global_step"] for line in path.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize(
    "damage", [b"\xff\xfe\x00", b"{}", b"[1]", b'{"global_step": "x", "metrics": 3}', b""]
)
def test_damaged_lines_are_left_out_and_nothing_stumbles_over_them(tmp_path, damage):
    path = tmp_path / "training_metrics_vae.jsonl"
    good = b'{"global_step": 1, "metrics": {"loss": 2.0}, "learning_rates": {"vae": 0.1}, "batch_time": 1}'
    path.write_bytes(b"\n".join([good, damage, good, b""]))
    graphs.draw(tmp_path)
    assert "loss" in (tmp_path / "training_summary.txt").read_text()
    report.draw_loss(path, tmp_path / "loss.png")  # has no updates
    assert not (tmp_path / "loss.png").exists()
    report.Events(path, "global_step", 1)
    assert path.read_bytes() == (good + b"\n") * 2


def colour_rows(picture: np.ndarray, index: int) -> dict[int, float]:
    """x -> mean y of the pixels of curve `index`, inside the frame."""
    wanted = [int(COLOURS[index][i : i + 2], 16) for i in (1, 3, 5)]
    ys, xs = np.nonzero((picture == wanted).all(axis=2))
    return {x: float(ys[xs == x].mean()) for x in np.unique(xs) if LEFT < x < WIDTH - RIGHT}


def test_a_plot_shows_its_curves():
    x = np.arange(10.0)
    picture = figure("t", [Curve("up", x, x), Curve("down", x, 9 - x)], [3.0, 50.0])
    up, down = colour_rows(picture, 0), colour_rows(picture, 1)
    first, last = min(up), max(up)
    assert up[first] > up[last] + 200  # rows count downwards
    assert down[first] < down[last] - 200
    assert picture.shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize(
    "y", [[1.0], [2.0, 2.0], [0.0, 0.0], [1e-6, 1.0], [float("nan"), 1.0, 2.0], [float("nan")], [-5.0, 5e9]]
)
def test_plots_of_odd_values(y):
    assert figure("t", [Curve("a", np.arange(len(y)) + 1.0, np.array(y))]).shape == (HEIGHT, WIDTH, 3)


def test_curves_of_other_scale_have_a_chart_each():
    x = np.arange(3.0)
    sizes = {"r1": 90.0, "vae": 0.2, "generator": -0.5, "kl": 1.9, "beta": 1e-9, "none": float("nan")}
    groups = graphs.by_scale(Curve(name, x, x * 0 + size) for name, size in sizes.items())
    assert [[curve.name for curve in group] for group in groups] == [
        ["beta"],
        ["vae", "generator", "kl"],
        ["r1"],
    ]


def test_drawing_without_any_lines_writes_nothing(tmp_path):
    assert graphs.draw(tmp_path) == []
    assert not list(tmp_path.iterdir())
