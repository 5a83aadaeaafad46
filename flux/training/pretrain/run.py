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
from flux.training.console import Console
from flux.training.ema import averaged
from flux.training.matmul_convolution import use_products
from flux.training.pretrain import lpips, report
from flux.training.pretrain.batches import Batches, Share, open_dataset
from flux.training.pretrain.config import Config, Step
from flux.training.pretrain.encoded import Encoded
from flux.training.pretrain.encoded import identity as encoded_identity
from flux.training.pretrain.losses import Objective, encode
from flux.training.pretrain.networks import Networks, Tokenizers
from flux.training.pretrain.previews import export, write_samples
from flux.training.pretrain.stage import Stage
from flux.training.pretrain.state import Checkpoints, Progress, identity
from flux.training.pretrain.validate import save_interval
from flux.training.states import STATE
from flux.training.vocabularies import save_clip, train_clip, train_t5

LATENTS = "latents"  # the folder
MEASURED_PICTURES = 1024  # for the latents' mean and deviation
Hook = Callable[[Stage, Progress], None]  # after each optimizer step; for tests


class Run:
    """A training from scratch. `resume` goes on from the latest checkpoint, if there is one."""

    def __init__(self, config: Config, resume: bool = False, quiet: bool = False, hook: Hook | None = None):
        self.config = config
        self.folder = Path(config.output.output_path).expanduser()
        self._group = mx.distributed.init()
        self.first = self._group.rank() == 0
        self.quiet = quiet
        self._hook = hook
        self._checkpoints = Checkpoints(
            self.folder / "checkpoints",
            config.output.keep_checkpoints,
            identity(config, self._group.size()),
        )
        self._latest = self._checkpoints.latest()
        if self._latest is not None and not resume:
            raise FluxError(f"{self.folder} holds a run: go on with --resume, or give another output_path")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FluxError(f"output.output_path: {self.folder} cannot be made: {error.strerror}") from None
        self._sources = {name: open_dataset(config.datasets[name]) for name in self._used_datasets()}
        self._tokenizers = self._open_tokenizers()
        mx.random.seed(config.training.seed)
        self.networks = Networks(config, self._tokenizers)
        self._perceptual = self._load_lpips()
        if mx.default_device() == mx.cpu:  # elsewhere MLX's own convolutions are the faster ones
            use_products(self.networks.ae)
            if self._perceptual is not None:
                use_products(self._perceptual)
        self.progress = Progress()
        if self._latest is not None:
            self.progress = self._checkpoints.read_progress(self._latest)
            self.progress.session += 1

    def _used_datasets(self) -> list[str]:
        return list(dict.fromkeys(self.config.dataset_of(step) for step in self.config.steps))

    def _load_lpips(self) -> lpips.LPIPS | None:
        if not any(step.use_lpips for step in self.config.steps):
            return None
        return lpips.load(self.config.model.lpips.vgg, self.config.model.lpips.linear)

    # --- vocabularies ---

    def _open_tokenizers(self) -> Tokenizers | None:
        """The config's, or ones that are trained on the captions; None where no step trains the flow."""
        config = self.config
        texts = {
            config.data.fixed_prompt_prefix + caption
            for step in config.steps
            if step.train_diff
            for caption in self._sources[config.dataset_of(step)].captions
        }
        if not texts:
            return None
        folders = [self.folder / "vocabularies" / name for name in ("tokenizer", "tokenizer_2")]
        if self.first:
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

    # --- the steps ---

    def execute(self) -> Path:
        """Runs all steps that are left; the path of the trained model."""
        resumed = self._latest is not None
        if resumed and self.progress.index == len(self.config.steps):
            self._load_networks(self._latest / STATE)
        while self.progress.index < len(self.config.steps):
            stage = self._begin(resumed)
            resumed = False
            self._run(stage)
            self._end(stage)
        shutil.rmtree(self.folder / LATENTS, ignore_errors=True)
        if self.first:
            return export(self.config, self.networks, self._tokenizers)
        return self.folder

    def _begin(self, resumed: bool) -> Stage:
        """The next step, ready to run: from the checkpoint that the run resumes with, or from its start."""
        config, index = self.config, self.progress.index
        step = config.steps[index]
        share = Share(self._group.rank(), self._group.size())
        source = self._sources[config.dataset_of(step)]
        if resumed:
            self._load_networks(self._latest / STATE)
        encoded = self._encoded(step) if step.train_diff else None
        kept = encoded if step.encodes_once else None
        batches = Batches(config, index, source, self._tokenizers, share, kept)
        if step.train_diff and not self.progress.measured:
            self._measure_latents(batches, encoded)
        self._scale_latents()
        end = self._tokenizers.clip.eos_token_id if self._tokenizers else 0
        objective = Objective(step, self._perceptual, config.training.use_fp16, end)
        stage = Stage(config, index, self.networks, batches, objective, self._group)
        if resumed and self.progress.begun:
            stage.trainer.load(self._latest / STATE)
        return stage

    def _load_networks(self, path: Path) -> None:
        arrays = mx.load(str(path))
        model = [(n.removeprefix("model."), a) for n, a in arrays.items() if n.startswith("model.")]
        self.networks.update(tree_unflatten(model))
        self._scale_latents()

    def _run(self, stage: Stage) -> None:
        """Takes the optimizer steps that a stage has left, up to its length or its threshold."""
        progress, output = self.progress, self.config.output
        log = _Log(self, stage)
        every_steps, every_seconds = save_interval(output.checkpoint_save_interval)
        last_save, reached = time.monotonic(), False
        while stage.trainer.step < stage.total and not reached:
            start = time.monotonic()
            rates = stage.rates(progress)
            metrics = stage.advance(rates)
            progress.begun = True
            progress.global_step += 1
            progress.epoch.add(metrics)
            progress.window.add(metrics)
            done = stage.trainer.step
            if done % stage.batches.epoch_length == 0:
                reached = stage.after_epoch(progress)
            is_last = reached or done == stage.total
            log(rates, time.monotonic() - start, is_last)
            due = done % every_steps == 0 or time.monotonic() - last_save >= every_seconds
            if due and not is_last:  # the end of a step has a checkpoint of its own
                self._save(stage)
                self._sample(stage)
                last_save = time.monotonic()
            if self._hook is not None:
                self._hook(stage, progress)
        log.close()

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
            report.draw(self.folder / "graph", [step.name for step in self.config.steps])

    def _sample(self, stage: Stage) -> None:
        if not self.first:
            return
        place = stage.place()
        name = f"{stage.step.name}_e{place['epoch']:04d}_b{place['batch']:05d}"
        with averaged(self.networks, stage.trainer.ema):
            write_samples(self.config, stage.step, self.networks, self._tokenizers, stage.batches, name)

    # --- latents ---

    def _encoded(self, step: Step) -> Encoded:
        """Where the latents of a step's data are kept, for as long as its autoencoder is the same."""
        config, half = self.config, self.config.training.use_fp16
        name = config.dataset_of(step)
        key = encoded_identity(self.networks.ae, name, config.datasets[name], half)
        downscale, channels = self.networks.ae.downscale, config.model.autoencoder.z_channels

        def shape(side: int) -> tuple[int, ...]:
            return (2, side // downscale, side // downscale, channels)

        return Encoded(self.folder / LATENTS, key, shape, lambda x: encode(self.networks, x, half))

    def _measure_latents(self, batches: Batches, encoded: Encoded) -> None:
        """Mean and deviation of the autoencoder's latents, for which the flow sees them scaled to 0 and 1."""
        side = self.config.data.img_size
        pictures = batches.first(MEASURED_PICTURES, (side, side))
        records = [encoded.make(row, picture) for row, picture in enumerate(pictures)]
        mean, logvar = np.stack(records, axis=1).astype(np.float64)
        self.progress.shift = float(mean.mean())
        self.progress.scale = float(1 / np.sqrt(mean.var() + np.exp(logvar).mean()))
        self.progress.measured = True

    def _scale_latents(self) -> None:
        self.networks.ae.params = dataclasses.replace(
            self.networks.ae.params, scale_factor=self.progress.scale, shift_factor=self.progress.shift
        )


class _Log:
    """The console's line and the metrics file of a stage."""

    def __init__(self, run: Run, stage: Stage):
        self._progress, self._stage, self._interval = run.progress, stage, run.config.output.log_interval
        self._file = None
        if run.first:
            global_step = run.progress.global_step
            self._file = report.MetricsFile(run.folder / "graph", stage.step.name, global_step)
        number, total = run.progress.index + 1, len(run.config.steps)
        self._console = Console(
            stage.step.name, number, total, stage.total, stage.trainer.step, run.quiet or not run.first
        )

    def __call__(self, rates: dict[str, float], seconds: float, is_last: bool) -> None:
        """After an optimizer step that took `seconds` at these learning rates."""
        progress, place = self._progress, self._stage.place()
        means = None
        if is_last or self._stage.trainer.step % self._interval == 0:
            means = progress.window.take()
            if self._file is not None:
                numbers = {"session": progress.session, **place, "global_step": progress.global_step}
                self._file.write(numbers, means, rates, seconds)
        of = {"epoch": self._stage.epochs, "batch": self._stage.batches.epoch_length}
        self._console.update(place, of, means, seconds)

    def close(self) -> None:
        self._console.close()


def _whole(folder: Path, write: Callable[[Path], None]) -> None:
    """A folder that is there only when it is complete."""
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    write(new)
    new.rename(folder)
