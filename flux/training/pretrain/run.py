"""The pipeline: the config's steps one after the other, resumable at any moment.

After every optimizer step all that the run depends on is a function of the arrays in the trainer and of
`Progress`. A checkpoint holds both, so what follows it is the same whether the run was stopped there or not.
"""

import dataclasses
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from flux.errors import FluxError
from flux.training.pretrain import lpips, report
from flux.training.pretrain.batches import Batches, Share, open_dataset
from flux.training.pretrain.config import Config
from flux.training.pretrain.console import Console
from flux.training.pretrain.networks import Networks, Tokenizers
from flux.training.pretrain.objectives import Objective
from flux.training.pretrain.progress import STATE, Checkpoints, Progress, identity
from flux.training.pretrain.samples import averaged, export, write_samples
from flux.training.pretrain.stage import Stage
from flux.training.pretrain.validate import save_interval
from flux.training.pretrain.vocabularies import save_clip, train_clip, train_t5

MEASURED_PICTURES = 1024  # for the latents' mean and deviation
Hook = Callable[[Stage, Progress], None]  # after each optimizer step; for tests


class Run:
    """A training from scratch. `resume` goes on from the latest checkpoint, if there is one."""

    def __init__(self, config: Config, resume: bool = False, quiet: bool = False, hook: Hook | None = None):
        self._config = config
        self._folder = Path(config.output.output_path).expanduser()
        self._group = mx.distributed.init()
        self._first = self._group.rank() == 0
        self._quiet = quiet or not self._first
        self._hook = hook
        self._checkpoints = Checkpoints(
            self._folder / "checkpoints",
            config.output.keep_checkpoints,
            identity(config, self._group.size()),
        )
        self._latest = self._checkpoints.latest()
        if self._latest is not None and not resume:
            raise FluxError(f"{self._folder} holds a run: go on with --resume, or give another output_path")
        self._sources = {name: open_dataset(config.datasets[name]) for name in self._used_datasets()}
        self._tokenizers = self._open_tokenizers()
        mx.random.seed(config.training.seed)
        self.networks = Networks(config, self._tokenizers)
        self._perceptual = self._load_lpips()
        self.progress = Progress()
        if self._latest is not None:
            self.progress = self._checkpoints.read(self._latest)
            self.progress.session += 1

    def _used_datasets(self) -> list[str]:
        return list(dict.fromkeys(self._config.dataset_of(step) for step in self._config.steps))

    def _load_lpips(self) -> lpips.LPIPS | None:
        if not any(step.use_lpips for step in self._config.steps):
            return None
        return lpips.load(self._config.model.lpips.vgg, self._config.model.lpips.linear)

    # --- vocabularies ---------------------------------------------------------------------------------------------

    def _open_tokenizers(self) -> Tokenizers | None:
        """The config's, or ones that are trained on the captions; None where no step trains the flow."""
        config = self._config
        texts = {
            config.data.fixed_prompt_prefix + caption
            for step in config.steps
            if step.train_diff
            for caption in self._sources[config.dataset_of(step)].captions
        }
        if not texts:
            return None
        folders = [self._folder / "vocabularies" / name for name in ("tokenizer", "tokenizer_2")]
        if self._first:
            if config.model.tokenizer is None and not folders[0].is_dir():
                vocab, merges = train_clip(sorted(texts), config.model.clip_merges)
                _whole(folders[0], lambda new: save_clip(vocab, merges, new))
            if config.model.tokenizer_2 is None and not folders[1].is_dir():
                size = config.model.t5_vocabulary
                _whole(folders[1], lambda new: train_t5(sorted(texts), size, new / "spiece.model"))
        mx.eval(mx.distributed.all_sum(mx.array(0.0), group=self._group))  # the others wait for the files
        given = (config.model.tokenizer, config.model.tokenizer_2)
        chosen = [Path(g).expanduser() if g else own for g, own in zip(given, folders, strict=True)]
        return Tokenizers(*chosen, config.model.t5_length)

    # --- the steps ------------------------------------------------------------------------------------------------

    def execute(self) -> Path:
        """Runs all steps that are left; the path of the trained model."""
        resumed = self._latest is not None
        if resumed and self.progress.index == len(self._config.steps):
            self._load_networks(self._latest / STATE)
        while self.progress.index < len(self._config.steps):
            stage = self._begin(resumed)
            resumed = False
            self._run(stage)
            self._end(stage)
        if self._first:
            return export(self._config, self.networks, self._tokenizers)
        return self._folder

    def _begin(self, resumed: bool) -> Stage:
        """The next step, ready to run: from the checkpoint that the run resumes with, or from its start."""
        config, index = self._config, self.progress.index
        step = config.steps[index]
        share = Share(self._group.rank(), self._group.size())
        source = self._sources[config.dataset_of(step)]
        batches = Batches(config, index, source, self._tokenizers, share)
        if resumed:
            self._load_networks(self._latest / STATE)
        if step.train_diff and not self.progress.measured:
            self._measure_latents(batches)
        self._scale_latents()
        end = self._tokenizers.clip.eos_token_id if self._tokenizers else 0
        objective = Objective(step, self._perceptual, config.training.use_fp16, end)
        stage = Stage(config, index, self.networks, batches, objective, self._group)
        if resumed:
            stage.trainer.load(self._latest / STATE)
        return stage

    def _load_networks(self, path: Path) -> None:
        arrays = mx.load(str(path))
        model = [(n.removeprefix("model."), a) for n, a in arrays.items() if n.startswith("model.")]
        self.networks.update(tree_unflatten(model))
        self._scale_latents()

    def _run(self, stage: Stage) -> None:
        config, progress = self._config, self.progress
        metrics_file = None
        if self._first:
            metrics_file = report.MetricsFile(self._folder / "graph", stage.step.name, progress.global_step)
        console = Console(
            stage.step.name,
            progress.index + 1,
            len(config.steps),
            stage.total,
            stage.trainer.step,
            self._quiet,
        )
        every_steps, every_seconds = save_interval(config.output.checkpoint_save_interval)
        last_save, reached = time.monotonic(), False
        while stage.trainer.step < stage.total and not reached:
            start = time.monotonic()
            rates = stage.rates(progress)
            metrics = stage.advance(rates)
            progress.global_step += 1
            progress.epoch.add(metrics)
            progress.window.add(metrics)
            done, length = stage.trainer.step, stage.batches.epoch_length
            seconds = time.monotonic() - start
            place = {"epoch": (done - 1) // length + 1, "batch": (done - 1) % length + 1}
            means = None
            if done % config.output.log_interval == 0 or done == stage.total:
                means = progress.window.take()
                if metrics_file is not None:
                    numbers = {"session": progress.session, **place, "global_step": progress.global_step}
                    metrics_file.write(numbers, means, rates, seconds)
            console.update(place, {"epoch": stage.epochs, "batch": length}, means, seconds)
            if done % length == 0:
                reached = stage.after_epoch(progress)
            due = done % every_steps == 0 or time.monotonic() - last_save >= every_seconds
            if due and not reached and done < stage.total:
                self._save(stage, sample=True)
                last_save = time.monotonic()
            if self._hook is not None:
                self._hook(stage, progress)
        console.close()

    def _end(self, stage: Stage) -> None:
        """Closes a step: its average becomes the networks, and the next step begins with nothing else of it."""
        if self._first:
            self._sample(stage)
        if stage.trainer.ema is not None:
            stage.trainer.ema.copy_to(self.networks)
        progress = self.progress
        if "encoder" in stage.step.trained:
            progress.measured = False
        progress.index += 1
        progress.epoch.take()
        progress.window.take()
        progress.plateaus = {}
        stage.batches.close()
        self._save(stage, sample=False)

    def _save(self, stage: Stage, sample: bool) -> None:
        if not self._first:
            return
        self._checkpoints.save(self.progress, stage.trainer.save)
        if sample:
            self._sample(stage)
        report.draw(self._folder / "graph", [step.name for step in self._config.steps])

    def _sample(self, stage: Stage) -> None:
        done, length = stage.trainer.step, stage.batches.epoch_length
        name = f"{stage.step.name}_e{(done - 1) // length + 1:04d}_b{(done - 1) % length + 1:05d}"
        with averaged(self.networks, stage.trainer.ema):
            write_samples(self._config, stage.step, self.networks, self._tokenizers, stage.batches, name)

    # --- latents --------------------------------------------------------------------------------------------------

    def _measure_latents(self, batches: Batches) -> None:
        """Mean and deviation of the autoencoder's latents, for which the flow sees them scaled to 0 and 1."""
        side = self._config.data.img_size
        pictures = batches.first(MEASURED_PICTURES, (side, side))
        means, variances = [], []
        for start in range(0, len(pictures), 16):
            x = mx.array(np.stack(pictures[start : start + 16])).astype(mx.float32) / 127.5 - 1
            mean, logvar = self.networks.ae.moments(x)
            means.append(np.array(mean, np.float64).reshape(-1))
            variances.append(np.exp(np.array(logvar, np.float64)).reshape(-1))
        mean = np.concatenate(means)
        self.progress.shift = float(mean.mean())
        self.progress.scale = float(1 / np.sqrt(mean.var() + np.concatenate(variances).mean()))
        self.progress.measured = True

    def _scale_latents(self) -> None:
        self.networks.ae.params = dataclasses.replace(
            self.networks.ae.params, scale_factor=self.progress.scale, shift_factor=self.progress.shift
        )


def _whole(folder: Path, write: Callable[[Path], None]) -> None:
    """A folder that is there only when it is complete."""
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    write(new)
    new.rename(folder)
