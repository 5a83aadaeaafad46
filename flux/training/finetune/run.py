"""A fine-tuning from its start, or from where it was stopped, to the adapter's file.

After every update all that the run depends on is a function of its options, of the data set and of the arrays
in the trainer. A state on disk holds these arrays and the options, so what follows it is the same whether the
run was stopped there or not.
"""

import math
import time
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten

from flux import adapters
from flux.adapters.attach import fingerprint
from flux.data import cache, samples
from flux.data.batches import Plan
from flux.distributed.fsdp import fully_shard
from flux.distributed.gradients import average_gradients
from flux.distributed.ranks import DOWNLOAD, Ranks, RanksError
from flux.errors import FluxError
from flux.training import optimizers
from flux.training.ema import EMA, averaged
from flux.training.finetune import fit
from flux.training.finetune.console import LINES, Console
from flux.training.finetune.features import Features, sample_key
from flux.training.finetune.length import Length
from flux.training.finetune.model import Base, Network, extract, inject
from flux.training.finetune.options import AUTO, QUANTIZE, WARMUP, Options
from flux.training.finetune.previews import Pictures, validation_loss
from flux.training.flow_matching import FlowLoss
from flux.training.gradient_checkpointing import checkpoint_blocks
from flux.training.report import Events, draw_loss
from flux.training.states import STATE, States
from flux.training.trainer import Metrics, Trainer
from flux.weights import quantize

DROPOUT_SEED = 0x44524F50  # apart from the samples' own


class Stopped(Exception):
    """The run was asked to stop, and its state is on disk."""


class FineTuning:
    """A run of `options`, in `options.output_dir`."""

    def __init__(
        self,
        options: Options,
        quiet: bool = False,
        state: Path | None = None,
        ranks: Ranks | None = None,
    ):
        """state: what `resume` goes on from. FluxError where the folder holds a run and there is none.

        On several ranks rank 0's options hold, and it alone reads and writes the folder, but for the cache.
        """
        self._ranks = ranks or Ranks()
        self.first = self._ranks.is_rank_zero
        if state is None:
            options = Options.from_table(self._ranks.broadcast_result(lambda: _begun(options).as_table()))
        self.options = options
        self.folder = Path(options.output_dir).expanduser()
        self._states = States(self.folder / "states", self.options.keep_states)
        self._state = state
        self._console = Console(quiet or not self.first)
        self._training, self._asked_to_stop, self._stops = False, False, False

    @classmethod
    def resume(
        cls, folder: str | Path, changes: dict[str, Any], quiet: bool = False, ranks: Ranks | None = None
    ) -> "FineTuning":
        """Goes on from the latest state in a run's folder; changes: options that were given anew.

        The number of ranks may be another one: see `Options.shared_out`. FluxError where there is no state,
        and for options that would make it another run.
        """
        ranks = ranks or Ranks()
        state, table = ranks.broadcast_result(lambda: _stored(folder, changes, ranks.size))
        return cls(Options.from_table(table), quiet, Path(state), ranks)

    def interrupt(self) -> None:
        """Asks the run to stop after the batch at hand, save its state and raise `Stopped`.

        On several ranks it stops after the update at hand, as soon as any of them was asked to.
        Raises KeyboardInterrupt where it is not training yet, and when it is asked again.
        """
        if not self._training or self._asked_to_stop:
            raise KeyboardInterrupt
        self._asked_to_stop = True
        self._console.say("stopping: saving the state")

    def execute(self) -> Path:
        """Encodes what is not encoded yet, trains, and writes the adapter; its path."""
        with self._ranks.waiting(None):
            self._ranks.on_all_ranks(self._prepare_data, DOWNLOAD)
            if self._ranks.size > 1:
                self._ranks.agree(self._ranks.on_all_ranks(self._facts))
            self._encode()
            self._prepare_training()
            self._train()
            path = self.folder / f"{self.options.name or 'final_adapters'}.safetensors"
            self._ranks.on_all_ranks(lambda: self._finish(path))
        return path

    def _finish(self, path: Path) -> None:
        self._save_adapter(path)
        if self.first:
            draw_loss(self._events.path, self.folder / "loss.png")

    # --- data ---

    def _prepare_data(self) -> None:
        options = self.options
        self._base = Base(options)
        sized = options.with_size(self._base.checkpoint.spec.image_size)
        dataset = samples.load(options.data, sized)
        for warning in dataset.warnings if self.first else ():
            warnings.warn(warning, stacklevel=2)
        self._plan = Plan(dataset, options.seed)
        self._digest = self._plan.digest()
        if self._state and self.first and States.read(self._state)["digest"] != self._digest:
            raise FluxError(
                f"the data set {options.data} is not the one that this run was begun with (its pictures, "
                f"captions or options have changed): restore it, or start anew with another --output-dir"
            )
        self.length = Length.of(options, self._plan.batches_per_epoch, self._ranks.size)
        self._say_whether_it_fits()
        # Faults of these options must show now, not after an hour of encoding.
        self._optimizer = self._make_optimizer()
        adapters.targets(self._base.pipeline.flow, options.targets, options.last_blocks)

    def _facts(self) -> dict[str, str]:
        """What must be the same on all ranks."""
        files = {f"adapter {file}": fingerprint(file) for file, _ in self.options.adapters}
        return {**self._base.checkpoint.fingerprints(), **files, "data set": self._digest[:12]}

    def _make_optimizer(self) -> Optimizer:
        options, updates = self.options, self.length.updates
        warmup = min(WARMUP, updates // 10) if options.warmup is None else options.warmup
        rate = optimizers.schedule(options.schedule, options.learning_rate, updates, warmup, options.restarts)
        return optimizers.make(options.optimizer, rate, options.weight_decay)

    def _say_whether_it_fits(self) -> None:
        plan, flow = self._plan, self._base.pipeline.flow
        shape = {
            "image_size": max((bucket for _, bucket in plan.bucket_table()), key=math.prod),
            "batch": max(group.batch_size for group in plan.groups),
            "text_tokens": self._base.checkpoint.spec.t5_length,
            "element_size": flow.dtype.size,
        }
        line, advice = fit.describe(
            self.options,
            flow.params,
            shape,
            fit.machine_memory(),
            self._ranks.size if self.options.shard_base else 1,
        )
        self._console.say(line)
        if self.options.quantize and self.first:
            bits, _ = QUANTIZE[self.options.quantize]
            self._console.say(f"quantized: {quantize.report(bits, transformer=flow)}")
        if advice and self.first:
            warnings.warn(advice, stacklevel=2)

    def _encode(self) -> None:
        """Fills the cache and lets go of the encoders."""
        options, plan = self.options, self._plan
        folder = Path(options.cache_dir).expanduser() if options.cache_dir else self.folder / "cache"
        identities = self._base.identities()
        self._features = Features(plan, cache.Cache(folder), identities, options.train_clip)
        size = plan.groups[0].resolution
        self._pictures = Pictures(
            self._base, self._features, options.progress_prompts, size, options.progress_seed
        )
        texts = [*plan.captions(self.length.epochs), *self._pictures.texts()]
        self._features.encode(self._base.pipeline, texts, self._ranks)
        self._base.drop_encoders(keep_clip=options.train_clip)

    # --- training ---

    def _prepare_training(self) -> None:
        options, pipeline = self.options, self._base.pipeline
        self.network = Network(pipeline.flow, pipeline.clip if options.train_clip else None)
        self._adapters = inject(self.network, options)
        if options.shard_base:
            fully_shard(pipeline.flow, self._ranks)
        if options.grad_checkpoint or options.shard_base:
            checkpoint_blocks(pipeline.flow, modulation_learns=options.train_clip)
        self.network.train()
        self._loss = self._make_loss()
        self.trainer = Trainer(
            self.network,
            self._loss_with_dropout,
            self._batch,
            self._optimizer,
            ema=None if options.ema is None else EMA(self.network, options.ema),
            average=average_gradients(self._ranks.group) if self._ranks.size > 1 else None,
            accumulate=options.accumulate,
            clip_norm=options.clip_norm or None,
            compiled=mx.default_device().type == mx.gpu,
            save_frozen=False,
        )
        if self._state:
            self._ranks.rank_zero_only(lambda: self.trainer.load(self._state / STATE))
        if self._ranks.size > 1:  # one beginning for all, whatever their machines are
            self.trainer.replace(self._ranks.broadcast)
            self.trainer.step = self._ranks.gather(self.trainer.step)[0]

    def _make_loss(self) -> FlowLoss:
        options, ae = self.options, self._base.ae_params
        sampling = options.time_sampling
        if sampling == AUTO:
            sampling = "sigmoid" if self.network.flow.params.guidance_embed else "schnell"
        return FlowLoss(
            ae.shift_factor,
            ae.scale_factor,
            time_sampling=sampling,
            time_scale=options.time_scale,
            time_mean=options.time_mean,
            time_std=options.time_std,
            loss=options.loss,
            delta=options.delta,
            delta_schedule=options.delta_schedule,
            guidance=options.guidance,
            prior_weight=options.prior_weight,
            end_token=self._base.end_token,
        )

    def _loss_with_dropout(
        self, network: Network, batch: dict[str, mx.array], key: mx.array
    ) -> tuple[mx.array, Metrics]:
        # The trainer's key is by the rank's own count of batches, and n ranks must drop what one would.
        return self._loss(network, batch, batch.get("dropout_key", key))

    def _batch(self, number: int) -> dict[str, mx.array]:
        """This rank's number-th batch: the ranks take those of the plan in turn."""
        batch = self._plan.batch(number * self._ranks.size + self._ranks.rank)
        seed = self.options.seed
        arrays = self._features.batch(batch, lambda position: sample_key(seed, position))
        if self.options.dropout:
            words = [seed ^ DROPOUT_SEED, batch.entries[0].position]
            arrays["dropout_key"] = mx.array(np.array(words, np.uint32))
        return arrays

    def _train(self) -> None:
        length, trainer = self.length, self.trainer
        if trainer.step > length.updates:
            done = length.iterations_at(trainer.step)
            raise FluxError(f"{self.folder} has come to iteration {done}, beyond {length.iterations}")
        self._say_what_begins()
        if self.first:
            done = trainer.step
            kept = done if self._state else -1
            self._events = Events(self.folder / "events.jsonl", lambda line: line["update"] <= kept)
        if not self._state:
            self._look(0, 0)
            self._save_state()
        self._console.begin(length.iterations, length.iterations_at(trainer.step))
        self._clock, self._training = time.monotonic(), True
        try:
            while trainer.step < length.updates:
                with self._ranks.waiting():
                    trainer.run(trainer.step + 1, (self._after_update,), self._between_batches)
        except Stopped:
            self._ranks.on_all_ranks(self._save_state)
            raise
        finally:
            self._training = False
            self._console.close()

    def _say_what_begins(self) -> None:
        length, options = self.length, self.options
        count = sum(a.size for _, a in tree_flatten(self.network.trainable_parameters()))
        several = f" on each of {self._ranks.size} ranks" if self._ranks.size > 1 else ""
        lines = [
            f"{len(self._plan.items)} samples and {length.batches_per_epoch} batches an epoch; "
            f"{length.iterations} iterations{several}, {length.updates} updates, {length.epochs} epochs",
            f"training {count:,} weights of rank {options.rank}",
        ]
        if self._state:
            lines.append(f"going on from iteration {length.iterations_at(self.trainer.step)}")
        for line in lines:
            self._console.say(line)

    def _between_batches(self) -> None:
        self._console.batch()
        if self._asked_to_stop and self._ranks.size == 1:
            raise Stopped

    def _after_update(self, trainer: Trainer, metrics: Metrics) -> None:
        self._write_update(metrics)
        self._look(trainer.step - 1, trainer.step)
        step, length, options = trainer.step, self.length, self.options
        if length.due(options.save_every, step):
            self._save_adapter(self._adapter_path(f"step{length.iterations_at(step):08d}"))
        if epoch := length.epoch_due(options.save_every_epochs, step):
            self._save_adapter(self._adapter_path(f"{epoch:06d}"))
        if length.due(options.state_every, step) or step == length.updates:
            self._save_state()
        if self._stops:
            raise Stopped

    def _write_update(self, metrics: Metrics) -> None:
        # Also to see that all ranks are alive: a sum without one of them is no error to MLX.
        losses, asked = zip(*self._ranks.gather((metrics["loss"].item(), self._asked_to_stop)), strict=True)
        loss, self._stops = sum(losses) / len(losses), any(asked)
        iteration = self.length.iterations_at(self.trainer.step)
        norm = metrics["norm"].item() if "norm" in metrics else 0.0
        if not math.isfinite(loss) or not math.isfinite(norm):
            state = self._states.latest()
            raise RanksError(  # the loss is the same on all of them
                f"the loss is {loss} and the gradient's norm {norm} at iteration {iteration}: try a lower "
                f"--learning-rate; the last good state is {state}"
            )
        if not self.first:
            return
        optimizer, now = self.trainer.optimizer, time.monotonic()
        line = {"event": "update", "update": self.trainer.step, "iteration": iteration}
        line |= {"epoch": self.length.epoch_of(self.trainer.step), "loss": loss, "norm": norm}
        line |= {"rate": optimizer.learning_rate.item(), "seconds": round(now - self._clock, 4)}
        if "prodigy" in optimizer.state:
            line["d"] = optimizer.state["prodigy"]["d"].item()
        line["peak_memory"] = mx.get_peak_memory()
        self._clock = now
        self._events.write(line)
        self._console.batch()
        self._console.update(line, max(1, self.length.updates // LINES))

    def _look(self, before: int, step: int) -> None:
        """Validation loss and progress pictures, where they are due; at the very start both are."""
        options, length = self.options, self.length
        if not self.first and not options.shard_base:  # where it is, all must work together
            return
        start, last = step == 0, step == length.updates
        iteration = length.iterations_at(step)
        validates = self._plan.held_out and (start or last or length.due(options.validate_every, step))
        draws = options.progress_prompts and (start or last or length.due(options.progress_every, step))
        if not (validates or draws):
            return
        with averaged(self.network, self.trainer.ema):
            if validates:
                loss = validation_loss(self.network, self._features, self._loss)
                line = {"event": "validation", "update": step, "iteration": iteration, "loss": loss}
                if self.first:
                    self._events.write(line)
                self._console.say(f"iteration {iteration}: validation loss {loss:.5f}")
            if draws:
                path = self.folder / "progress" / f"step{iteration:08d}.png"
                self._pictures.draw(self.network, path if self.first else None)
        self._clock = time.monotonic()

    # --- files ---

    def _adapter_path(self, place: str) -> Path:
        return self.folder / f"{self.options.name or 'adapters'}-{place}.safetensors"

    def _save_adapter(self, path: Path) -> None:
        """The adapter, averaged if there is an average, with what is known of it."""
        if not self.first:
            return
        options = self.options
        facts = {
            "base_model": self._base.checkpoint.spec.name,
            "trigger": options.trigger,
            "steps": str(self.length.iterations_at(self.trainer.step)),
            "dataset_hash": self._digest,
        }
        with averaged(self.network, self.trainer.ema):
            given = {name: value for name, value in facts.items() if value}
            lost = adapters.save(path, extract(self._adapters), options.format, given)
        if lost:  # Python shows a warning that it has shown once no more
            warnings.warn(f"of {options.format} files {'; '.join(lost)}", stacklevel=2)

    def _save_state(self) -> None:
        if self.first:
            # By the batches of all ranks, because names must sort though their number changes.
            name = f"{self.length.iterations_at(self.trainer.step) * self._ranks.size:08d}"
            table = {"options": self.options.as_table(), "digest": self._digest, "ranks": self._ranks.size}
            self._states.save(name, table, self.trainer.save)
            draw_loss(self._events.path, self.folder / "loss.png")


# --- What a run begins with: from rank 0's folder ---


def _begun(options: Options) -> Options:
    """The options of a new run. FluxError where its folder holds one."""
    found = States(Path(options.output_dir).expanduser() / "states", options.keep_states).latest()
    if found:
        raise FluxError(
            f"{options.output_dir} holds a run ({found.name} batches): go on with --resume "
            f"{options.output_dir}, or give another --output-dir"
        )
    return options.resolved()


def _stored(folder: str | Path, changes: dict[str, Any], ranks: int) -> tuple[str, dict[str, Any]]:
    """The latest state in a folder, and the options to go on with, as a table."""
    state = States(Path(folder).expanduser() / "states", 1).latest()
    if state is None:
        raise FluxError(f"{folder}: no state of a run to go on from: start it again without --resume")
    found = States.read(state)
    options = Options.from_table({**found["options"], "output_dir": str(folder)})
    options = options.shared_out(found.get("ranks", 1), ranks)
    changes = {name: value for name, value in changes.items() if name != "output_dir"}
    return str(state), options.changed(changes).as_table()
