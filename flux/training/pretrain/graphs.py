"""Draws the graphs of a training from scratch anew, from its metrics files.

    python -m flux.training.pretrain.graphs RUN

RUN is the config's output_path. The same are drawn with every checkpoint, into RUN/graph: of all steps, and
of each step with its name (training_losses_vae.png).
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from flux import images
from flux.arguments import Parser, run_program
from flux.distributed.ranks import Ranks
from flux.errors import FluxError
from flux.training.plots import Curve, figure
from flux.training.report import Line, curve, number, read_lines, table_of, write_whole

METRICS = "training_metrics_{}.jsonl"  # of a step
LOSSES = ("loss", "vae", "mse", "lpips", "generator", "discriminator", "r1", "flow")
KL = {"kl": "KL, mean of the latent's numbers", "beta": "beta, the weight of KL"}
APART = 10.0  # curves whose usual values differ by more have a chart each
X = "global_step"


def draw(folder: Path, step: str | None = None) -> list[Path]:
    """Draws the graphs of all steps together, and of this one or of each; what has been written.

    folder: that of the metrics files.
    """
    lines = read(folder)
    written = _draw_all(folder, lines, "") if lines else []
    for name in lines if step is None else [name for name in lines if name == step]:
        written += _draw_all(folder, {name: lines[name]}, f"_{name}")
    return written


def read(folder: Path) -> dict[str, list[Line]]:
    """The lines of each step that has some, in the order of the steps."""
    before, after = METRICS.split("{}")
    found = {}
    for path in folder.glob(METRICS.format("*")):
        if lines := read_lines(path):
            found[path.name.removeprefix(before).removesuffix(after)] = lines
    return dict(sorted(found.items(), key=lambda item: number(item[1][0].get(X), 0)))


def _draw_all(folder: Path, lines: dict[str, list[Line]], suffix: str) -> list[Path]:
    every = [line for found in lines.values() for line in found]
    marks = [number(found[0].get(X), 0) for found in lines.values()][1:]
    rates = dict.fromkeys(name for line in every for name in table_of(line, "learning_rates"))
    graphs = {  # of each its charts: what stands along y, and the curves
        "training_losses": [("loss", metric_curves(every, LOSSES))],
        "kl_loss": [(unit, metric_curves(every, [name])) for name, unit in KL.items()],
        "learning_rates": [("learning rate", [curve(n, every, X, "learning_rates", n) for n in rates])],
        "batch_times": [("seconds a batch", [curve("seconds", every, X, "batch_time")])],
    }
    written, overview = [], []
    for name, parts in graphs.items():
        charts = [
            figure(name.replace("_", " "), group, marks, axes=("update of the whole run", unit))
            for unit, curves in parts
            for group in by_scale(curves)
        ]
        if charts:
            written.append(folder / f"{name}{suffix}.png")
            images.save(written[-1], images.grid(charts, len(charts)))
            overview += charts
    if overview:
        written.append(folder / f"training_overview{suffix}.png")
        rows = 2 if len(overview) > 2 else 1
        overview += [np.full_like(overview[0], 255)] * (-len(overview) % rows)
        images.save(written[-1], images.grid(overview, rows))
    written.append(folder / f"training_summary{suffix}.txt")
    write_whole(written[-1], summary(lines))
    return written


def by_scale(curves: Iterable[Curve]) -> list[list[Curve]]:
    """The curves in groups whose medians, without their signs, are within a factor of APART."""
    sizes = []
    for each in curves:
        values = np.abs(each.y[np.isfinite(each.y)])
        if len(values):
            sizes.append((float(np.median(values)), each))
    groups: list[list[Curve]] = []
    least = 0.0
    for size, each in sorted(sizes, key=lambda pair: pair[0]):
        if groups and size <= APART * least:
            groups[-1].append(each)
        else:
            groups.append([each])
            least = size
    return groups


def metric_curves(lines: list[Line], names: Iterable[str]) -> list[Curve]:
    """The curves of those metrics that the lines have."""
    curves = [curve(name, lines, X, "metrics", name) for name in names]
    return [each for each in curves if len(each.y)]


def summary(lines: dict[str, list[Line]]) -> str:
    """A text: for each step its length and every metric's first, last, least and greatest value."""
    parts = []
    for step, found in lines.items():
        times = curve("", found, X, "batch_time").y
        last, seconds = found[-1], f"{times.mean():.3f}" if len(times) else "?"
        position = f"epoch {last.get('epoch')}, global step {last.get(X)}"
        parts.append(f"{step}: to {position}, {seconds} s a batch\n")
        parts.append(f"  {'metric':<16}{'first':>12}{'last':>12}{'least':>12}{'greatest':>12}\n")
        names = sorted({name for line in found for name in table_of(line, "metrics")})
        for each in metric_curves(found, names):
            y = each.y
            row = "".join(f"{value:>12.5g}" for value in (y[0], y[-1], y.min(), y.max()))
            parts.append(f"  {each.name:<16}{row}\n")
    return "".join(parts)


def run(ranks: Ranks, arguments: Sequence[str]) -> int:
    """Draw the graphs of the run that the command line names; the exit status."""
    parser = Parser(
        prog="python -m flux.training.pretrain.graphs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="the run's folder, or its folder graph")
    given = parser.parse_args(arguments).run.expanduser()
    folder = given / "graph" if (given / "graph").is_dir() else given
    written = draw(folder)
    if not written:
        raise FluxError(f"{given}: no {METRICS.format('STEP')} of a training from scratch")
    print(*written, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(lambda ranks: run(ranks, sys.argv[1:])))
