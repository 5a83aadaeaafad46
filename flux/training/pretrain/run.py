"""The pipeline: the config's steps one after the other, resumable at any moment.

After every optimizer step all that the run depends on is a function of the arrays in the trainer and of
`Progress`. A checkpoint holds both, so what follows it is the same whether the run was stopped there or not.
"""

import dataclasses
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

from flux.distributed.ranks import Ranks
from flux.errors import FluxError
from flux.outputs import locked
from flux.training.callbacks import Estimate, Every, Finite, Log, Stop, Stopped, always, interval
from flux.training.console import Advance, Console
from flux.training.ema import averaged
from flux.training.pretrain import graphs
from flux.training.pretrain.batches import Batches, Shard
from flux.training.pretrain.config import Config
from flux.training.pretrain.losses import Objective
from flux.training.pretrain.prepare import LATENTS, known_by, latent_store, measure_latents, prepare
from flux.training.pretrain.previews import export, write_samples
from flux.training.pretrain.stage import Stage
from flux.training.pretrain.state import Checkpoints, Progress, begin_with, identity
from flux.training.pretrain.validate import save_interval
from flux.training.pretrain.watch import Move, Numbers, heading
from flux.training.states import STATE, load_state

Hook = Callable[[Stage, Progress], None]  # after each optimizer step; for tests


class Run:
    """A training from scratch. `resume` goes on from the latest checkpoint, if there is one."""

    def __init__(
        self,
        config: Config,
        resume: bool = False,
        quiet: bool = False,
        hook: Hook = lambda stage, progress: None,
        stop: Stop | None = None,
    ):
        """stop: what may be asked to end it; `execute` then raises `Stopped`."""
        self.config = config
        self.folder = Path(config.output.output_path).expanduser()
        self._ranks = Ranks()
        self.first = self._ranks.is_rank_zero
        self._quiet = quiet or not self.first
        self._hook = hook
        self._stop = stop or Stop(self._ranks, quiet)
        self._checkpoints = Checkpoints(
            self.folder / "checkpoints",
            config.output.keep_checkpoints,
            identity(config, self._ranks.size),
        )
        if not resume and self._checkpoints.latest() is not None:
            raise FluxError(f"{self.folder} holds a run: go on with --resume, or give another output_path")
        found = self._checkpoints.newest()
        self._latest = None if found is None else found.path / STATE
        self.progress = Progress()
        if found is not None:
            self.progress = found.value
            self.progress.session += 1
            for damage in found.damaged if self.first else ():
                warnings.warn(f"{damage}: going on from {found.path}", stacklevel=2)
        self._prepared = prepare(config, self.folder, self._ranks, found is None, self._quiet)
        self.networks = self._prepared.networks

    def execute(self) -> Path:
        """Runs all steps that are left; the path of the trained model.

        FluxError where another process trains in the folder.
        """
        with self._ranks.in_rank_zero(locked(self.folder)):
            return self._execute()

    def _execute(self) -> Path:
        if self._latest is not None:
            load_state(self.networks, self._latest)
        elif self.config.model_checkpoint is not None:
            Console(self._quiet).say(begin_with(self.networks, self.config.model_checkpoint))
        self._scale_latents()
        resumes = self.progress.begun
        while self.progress.index < len(self.config.steps):
            stage = self._begin()
            if resumes and self._latest is not None:
                stage.trainer.load(self._latest)
            resumes = False
            self._run(stage)
            self._end(stage)
        shutil.rmtree(self.folder / LATENTS, ignore_errors=True)
        if self.first:
            known = known_by(self.config, self._prepared.sources)
            return export(self.config, self.networks, self._prepared.tokenizers, known)
        return self.folder

    def _begin(self) -> Stage:
        """The next step, ready to run from its start."""
        config, index = self.config, self.progress.index
        step, tokenizers = config.steps[index], self._prepared.tokenizers
        shard = Shard(self._ranks.rank, self._ranks.size)
        source = self._prepared.sources[config.dataset_of(step)]
        encoded = latent_store(config, step, self.networks, self.folder) if step.train_diff else None
        kept = encoded if step.encodes_once else None
        batches = Batches(config, index, source, tokenizers, shard, kept)
        if encoded is not None and not self.progress.measured:
            scale, shift = measure_latents(batches, encoded)
            self.progress.scale, self.progress.shift, self.progress.measured = scale, shift, True
            self._scale_latents()
        end = tokenizers.clip.eos_token_id if tokenizers else 0
        objective = Objective(step, self._prepared.perceptual, step.use_fp16, end)
        return Stage(config, index, self.networks, batches, objective, self._ranks)

    def _run(self, stage: Stage) -> None:
        """Takes the optimizer steps that a stage has left, up to its length or its threshold."""
        progress, output = self.progress, self.config.output
        number, count = progress.index + 1, len(self.config.steps)
        console = Console(self._quiet)
        console.say(heading(stage.step, number, count, stage.total))
        title = f"Step {stage.step.name} ({number}/{count})"
        graph = self.folder / "graph" if self.first else None
        numbers = Numbers(stage, progress, graph, console, title)
        log = Log(numbers.log, output.log_interval, progress.window)
        steps, seconds = save_interval(output.checkpoint_save_interval)
        is_due = interval(steps, seconds)
        callbacks = (
            Finite(lambda _: self._advice(stage)),
            Move(stage, progress),
            log,
            numbers.live(log),
            Advance(console),
            Estimate(console.say, stage.total, "batches"),
            # The end of a step has a separate checkpoint.
            Every(lambda t: is_due(t) and not t.is_done, lambda _: self._save_and_draw(stage)),
            Every(always, lambda _: self._hook(stage, progress)),
            self._stop,
        )
        console.begin(stage.total * stage.accumulate, stage.trainer.step * stage.accumulate)
        try:
            with self._stop.training():
                stage.trainer.run(stage.total, callbacks)
        except Stopped:
            self._save(stage)
            raise
        finally:
            console.close()

    def _advice(self, stage: Stage) -> str:
        position = stage.position()
        return (
            f'in step "{stage.step.name}", epoch {position["epoch"]}, batch {position["batch"]}: try a lower '
            f"lr; the last checkpoint is {self._checkpoints.latest()}"
        )

    def _save_and_draw(self, stage: Stage) -> None:
        self._save(stage)
        self._sample(stage)

    def _end(self, stage: Stage) -> None:
        """Closes a step: its average becomes the networks, and nothing else of it reaches the next step."""
        self._sample(stage)
        if stage.trainer.ema is not None:
            stage.trainer.ema.copy_to(self.networks)
        progress = self.progress
        if "encoder" in stage.step.trained:
            progress.measured = False
        progress.index += 1
        progress.begun = False
        progress.epoch.take()
        progress.window.take()
        progress.plateaus = {}
        stage.batches.close()
        self._save(stage)

    def _save(self, stage: Stage) -> None:
        if self.first:
            self._checkpoints.save_progress(self.progress, stage.trainer.save)
            graphs.draw(self.folder / "graph", stage.step.name)

    def _sample(self, stage: Stage) -> None:
        if not self.first:
            return
        position = stage.position()
        name = f"{stage.step.name}_{self.progress.index + 1:03d}_{position['epoch']:03d}"
        if position["batch"] < stage.batches.epoch_length:
            name += f"_{position['batch']:05d}"
        with averaged(self.networks, stage.trainer.ema):
            write_samples(
                self.config, stage.step, self.networks, self._prepared.tokenizers, stage.batches, name
            )

    def _scale_latents(self) -> None:
        self.networks.ae.params = dataclasses.replace(
            self.networks.ae.params, scale_factor=self.progress.scale, shift_factor=self.progress.shift
        )
