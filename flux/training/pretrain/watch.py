"""What goes on beside the batches of a step of pretraining: rates, the metrics file, the console."""

import time
from pathlib import Path

from flux.training.callbacks import Every, Log, always
from flux.training.console import Console
from flux.training.pretrain.config import Step
from flux.training.pretrain.graphs import METRICS
from flux.training.pretrain.stage import Stage
from flux.training.pretrain.state import Progress
from flux.training.report import Events
from flux.training.trainer import Callback, Means, Trainer

SHOWN = {
    "vae": "VAE",
    "kl": "KL",
    "generator": "G",
    "discriminator": "D",
    "lpips": "LPIPS",
    "flow": "Flow",
}


class Move(Callback):
    """Moves `Progress` along, and with it the learning rates and the end of the step."""

    def __init__(self, stage: Stage, progress: Progress):
        self._stage = stage
        self._progress = progress

    def before_step(self, trainer: Trainer) -> None:
        self._stage.set_rates(self._progress)

    def after_step(self, trainer: Trainer, metrics: Means) -> None:
        self._progress.begun = True
        self._progress.global_step += 1
        self._progress.epoch.add(metrics)
        if trainer.step % self._stage.batches.epoch_length == 0 and self._stage.after_epoch(self._progress):
            trainer.stop()


class Numbers:
    """Writes the metrics of a step to `training_metrics_{step}.jsonl` and to the console."""

    def __init__(self, stage: Stage, progress: Progress, folder: Path | None, console: Console, title: str):
        """folder: of the metrics file; None on ranks that do not write. title: of the step."""
        self._stage = stage
        self._progress = progress
        self._console = console
        self._title = title
        self._start = time.monotonic()
        self._write = None
        if folder is not None:
            path = folder / METRICS.format(stage.step.name)
            self._write = Events(path, "global_step", progress.global_step).write

    def log(self, trainer: Trainer, means: Means, seconds: float) -> None:
        """For `callbacks.Log`."""
        line = {
            "timestamp": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "session": self._progress.session,
            **self._stage.position(),
            "global_step": self._progress.global_step,
            "metrics": means,
            "learning_rates": self._stage.rates,
            "batch_time": round(seconds, 4),
        }
        if self._write is not None:
            self._write(line)
        if not self._console.is_live:
            self._console.say(self._line(means, seconds))

    def live(self, log: Log) -> Callback:
        """Shows after every batch where the step is, with the numbers that were logged last."""
        return Every(always, lambda _: self._console.show(self._line(log.means, log.seconds)))

    def _line(self, metrics: Means, seconds: float) -> str:
        of = {"epoch": self._stage.epochs, "batch": self._stage.batches.epoch_length}
        elapsed = int(time.monotonic() - self._start)
        return console_line(self._title, elapsed, self._stage.position(), of, metrics, seconds)


def heading(step: Step, number: int, count: int, updates: int) -> str:
    """What is said before a step: its number among `count`, its description, its length."""
    epochs = f"{step.epochs} epoch{'s' if step.epochs != 1 else ''}, " if step.epochs else ""
    length = f"{epochs}{updates} updates"
    transition = step.transition_on
    if transition.metric is not None:
        length += f", or until {transition.metric} is at most {transition.threshold:g}"
    lines = [f"PIPELINE STEP {number}/{count}: {step.name}"]
    lines += [f"Description: {step.description}"] if step.description else []
    return "\n".join([*lines, f"Duration: {length}", "=" * 80])


def console_line(
    title: str,
    elapsed: int,
    position: dict[str, int],
    of: dict[str, int | None],
    metrics: Means,
    seconds: float,
) -> str:
    """Such as `[00:15:23] Step vae_gan (2/3) | Epoch 5/20 | Batch 127/500 | VAE 0.1 | 3.2s/batch`.

    elapsed: seconds. position, of: epoch and batch, and how many there are.
    """
    clock = f"[{elapsed // 3600:02d}:{elapsed // 60 % 60:02d}:{elapsed % 60:02d}]"
    positions = [f"{name.title()} {position[name]}" + (f"/{of[name]}" if of[name] else "") for name in of]
    values = [f"{label} {metrics[name]:.4g}" for name, label in SHOWN.items() if name in metrics]
    return " | ".join([f"{clock} {title}", *positions, *values, f"{seconds:.3g}s/batch"])
