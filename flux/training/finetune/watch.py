"""What goes on beside the updates of a fine-tuning: numbers, validation, pictures, adapter files, states."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from flux import adapters
from flux.training.callbacks import Estimate, Every, Finite, Log
from flux.training.console import Advance, Console
from flux.training.ema import averaged
from flux.training.finetune import doubts
from flux.training.finetune.doubts import Unmoved
from flux.training.finetune.model import extract
from flux.training.finetune.previews import validation_loss
from flux.training.finetune.results import Built, Encoded, Prepared
from flux.training.finetune.start import EVENTS, Start
from flux.training.report import Events, draw_loss
from flux.training.states import States
from flux.training.trainer import Callback, Means, Trainer
from flux.trees import named_arrays

LINES = 20  # of a whole run, where there is no terminal


class Watch:
    """Writes into the run's folder on rank 0 alone, but takes part on every rank in what all must do."""

    def __init__(self, start: Start, prepared: Prepared, encoded: Encoded, built: Built, console: Console):
        self._options = start.options
        self._folder = start.folder
        self._ranks = start.ranks
        self._is_new = start.state is None
        self._prepared = prepared
        self._encoded = encoded
        self._built = built
        self._length = prepared.length
        self._console = console
        self._states = States(self._folder / "states", self._options.keep_states)
        self._events = self._folder / EVENTS
        self._warned = False  # of what other programs leave out of the adapter

    def begin(self) -> None:
        """Says what begins. A new run has a validation loss, pictures and a state from before its updates."""
        done = self._built.trainer.step
        self._say_what_begins(done)
        self._write: Callable[[dict[str, Any]], None] = lambda line: None
        if self._ranks.is_rank_zero:
            self._write = Events(self._events, "update", -1 if self._is_new else done).write
        if self._is_new:
            self._validate()
            self._draw()
            self.save_state()

    def callbacks(self) -> tuple[Callback, ...]:
        """In their order: nothing is written of an update whose loss is not finite, a state comes last."""
        options, length = self._options, self._length

        def due(every: int | None, at_end: bool = True) -> Callable[[Trainer], bool]:
            return lambda trainer: (at_end and trainer.is_done) or length.due(every, trainer.step)

        return (
            Finite(self._advice),
            Unmoved(self._warn),
            Log(self._log),
            Advance(self._console),
            Estimate(self._console.say, length.updates, "updates"),
            Every(due(options.validate_every), lambda _: self._validate()),
            Every(due(options.progress_every), lambda _: self._draw()),
            Every(due(options.save_every, at_end=False), lambda _: self._save_step()),
            Every(lambda t: bool(self._epoch(t)), lambda t: self._save_adapter(f"{self._epoch(t):06d}")),
            Every(due(options.state_every), lambda _: self.save_state()),
        )

    def finish(self) -> Path:
        """Writes the adapter; its path."""
        path = self._folder / self._options.file
        self._write_adapter(path)
        self._draw_loss()
        prodigy = self._built.trainer.optimizer.state.get("prodigy")
        for line in doubts.of_result(self._up(), None if prodigy is None else prodigy["d"].item()):
            self._warn(line)
        return path

    def _up(self) -> dict[str, mx.array]:
        """The up weights of the adapter that is trained."""
        trained = named_arrays(self._built.network.trainable_parameters())
        return {name: array for name, array in trained if name.endswith(".up")}

    def _warn(self, text: str) -> None:
        if self._ranks.is_rank_zero:
            warnings.warn(text, stacklevel=2)

    # --- numbers ---

    def _say_what_begins(self, done: int) -> None:
        length, plan = self._length, self._prepared.plan
        count = sum(a.size for _, a in named_arrays(self._built.network.trainable_parameters()))
        several = f" on each of {self._ranks.size} ranks" if self._ranks.size > 1 else ""
        self._console.say(
            f"{len(plan.items)} samples and {length.batches_per_epoch} batches an epoch; "
            f"{length.iterations} iterations{several}, {length.updates} updates, {length.epochs} epochs"
        )
        self._console.say(f"training {count:,} weights of rank {self._options.rank}")
        if not self._is_new:
            self._console.say(f"going on from iteration {length.iterations_at(done)}")

    def _advice(self, trainer: Trainer) -> str:
        return (
            f"at iteration {self._length.iterations_at(trainer.step)}: try a lower --learning-rate; "
            f"the last good state is {self._states.latest()}"
        )

    def _log(self, trainer: Trainer, metrics: Means, seconds: float) -> None:
        optimizer, step, length = trainer.optimizer, trainer.step, self._length
        line: dict[str, Any] = {"event": "update", "update": step, "iteration": length.iterations_at(step)}
        line |= {"epoch": length.epoch_of(step), "loss": metrics["loss"], "norm": metrics.get("norm", 0.0)}
        line |= {"rate": optimizer.learning_rate.item(), "seconds": round(seconds, 4)}
        if "prodigy" in optimizer.state:
            line["d"] = optimizer.state["prodigy"]["d"].item()
        line["peak_memory"] = mx.get_peak_memory()
        self._write(line)
        peak = f"{line['peak_memory'] / 1e9:.2f} GB"
        rate = f"{line['rate'] * line.get('d', 1.0):.3g}"
        self._console.show(f"loss {line['loss']:.4f}, rate {rate}, peak {peak}")
        every = self._options.log_every
        due = length.due(every, step) if every else step % max(1, length.updates // LINES) == 0
        if due and not self._console.is_live:
            speed = f"{1 / max(1e-9, seconds):.2f} updates/s"
            position = f"iteration {line['iteration']}/{length.iterations}"
            self._console.say(f"{position} | loss {line['loss']:.4f} | rate {rate} | {speed} | peak {peak}")

    # --- what is looked at: the averaged weights, if there is an average ---

    @property
    def _looks(self) -> bool:
        """Whether this rank takes part: where the base is sharded, all must work together."""
        return self._ranks.is_rank_zero or self._options.shard_base

    def _validate(self) -> None:
        network, trainer = self._built.network, self._built.trainer
        if not (self._looks and self._prepared.plan.held_out):
            return
        with averaged(network, trainer.ema):
            loss = validation_loss(network, self._encoded.features, self._built.loss)
        iteration = self._length.iterations_at(trainer.step)
        self._write({"event": "validation", "update": trainer.step, "iteration": iteration, "loss": loss})
        self._console.say(f"iteration {iteration}: validation loss {loss:.5f}")

    def _draw(self) -> None:
        network, trainer = self._built.network, self._built.trainer
        if not (self._looks and self._options.progress_prompts):
            return
        path = self._folder / "progress" / f"step{self._length.iterations_at(trainer.step):08d}.png"
        with averaged(network, trainer.ema):
            self._encoded.pictures.draw(network, path if self._ranks.is_rank_zero else None)

    # --- files ---

    def _epoch(self, trainer: Trainer) -> int:
        return self._length.epoch_due(self._options.save_every_epochs, trainer.step)

    def _save_step(self) -> None:
        self._save_adapter(f"step{self._length.iterations_at(self._built.trainer.step):08d}")

    def _save_adapter(self, when: str) -> None:
        self._write_adapter(self._folder / f"{self._options.name or 'adapters'}-{when}.safetensors")

    def _write_adapter(self, path: Path) -> None:
        """The adapter with what is known of it."""
        if not self._ranks.is_rank_zero:
            return
        trainer = self._built.trainer
        known = {
            "base_model": self._prepared.base.checkpoint.spec.name,
            "trigger": self._options.trigger,
            "steps": str(self._length.iterations_at(trainer.step)),
            "dataset_hash": self._prepared.digest,
        }
        with averaged(self._built.network, trainer.ema):
            given = {name: value for name, value in known.items() if value}
            lost = adapters.save(path, extract(self._built.adapters), self._options.format, given)
        if lost and not self._warned:
            self._warned = True
            warnings.warn(f"of {self._options.format} files {'; '.join(lost)}", stacklevel=2)

    def save_state(self) -> None:
        """The state to go on from."""
        if not self._ranks.is_rank_zero:
            return
        trainer, size = self._built.trainer, self._ranks.size
        # By the batches of all ranks, because names must sort though their number changes.
        name = f"{self._length.iterations_at(trainer.step) * size:08d}"
        table = {"options": self._options.as_table(), "digest": self._prepared.digest, "ranks": size}
        table["is_done"] = trainer.step >= self._length.updates
        self._states.save(name, table, trainer.save)
        self._draw_loss()

    def _draw_loss(self) -> None:
        if self._ranks.is_rank_zero:
            draw_loss(self._events, self._folder / "loss.png")
