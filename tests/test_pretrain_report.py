"""What a training shows and writes: the console's line, the metrics file, plots."""

import json
import re

import numpy as np
import pytest

from flux.training.console import Console
from flux.training.plots import COLOURS, HEIGHT, LEFT, RIGHT, WIDTH, Curve, figure
from flux.training.pretrain import report


def test_the_console_line():
    console = Console("vae_gan", 2, 3, 10_000, 0, quiet=True)
    metrics = {"vae": 0.123456, "kl": 2.0, "generator": -0.5, "discriminator": 1.5, "lpips": 0.25, "loss": 9}
    line = console.line({"epoch": 5, "batch": 127}, {"epoch": 20, "batch": 500}, metrics, 3.21)
    pattern = (
        r"\[\d\d:\d\d:\d\d\] Step vae_gan \(2/3\) \| Epoch 5/20 \| Batch 127/500 \| VAE 0\.1235 \| KL 2 \| "
        r"LPIPS 0\.25 \| G -0\.5 \| D 1\.5 \| 3\.21s/batch"
    )
    assert re.fullmatch(pattern, line), line
    assert "Epoch 1 |" in console.line({"epoch": 1, "batch": 1}, {"epoch": None, "batch": 9}, {}, 1.0)


def test_without_a_terminal_there_is_a_line_when_metrics_are_logged(capsys):
    console = Console("vae", 1, 1, 4, 0, quiet=False)
    for batch in range(1, 5):
        means = {"vae": 1.0 / batch} if batch % 2 == 0 else None
        console.update({"epoch": 1, "batch": batch}, {"epoch": 1, "batch": 4}, means, 0.5)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" | ")[2:4] for line in lines] == [["Batch 2/4", "VAE 0.5"], ["Batch 4/4", "VAE 0.25"]]


def test_a_torn_line_and_what_comes_after_the_checkpoint_are_dropped(tmp_path):
    file = report.MetricsFile(tmp_path, "vae", 0)
    for step in range(1, 6):
        file.write(
            {"session": 1, "epoch": 1, "batch": step, "global_step": step}, {"loss": 1.0}, {"vae": 0.1}, 1
        )
    path = tmp_path / "training_metrics_vae.jsonl"
    path.write_text(path.read_text() + '{"global_step": 6, "met')
    assert len(list(report.read_lines(path))) == 5
    report.MetricsFile(tmp_path, "vae", 3)
    assert [json.loads(line)["global_step"] for line in path.read_text().splitlines()] == [1, 2, 3]


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


def test_drawing_without_any_lines_writes_nothing(tmp_path):
    report.draw(tmp_path, ["vae"])
    assert not list(tmp_path.iterdir())
