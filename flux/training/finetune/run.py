"""A fine-tuning from its start, or from where it was stopped, to the adapter's file.

After every update all that the run depends on is a function of its options, of the data set and of the arrays
in the trainer. A state on disk holds these arrays and the options, so what follows it is the same whether the
run was stopped there or not.

The parts hand each other what they have made: prepare -> encode -> build -> train.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from mlx.optimizers import Optimizer

from flux import adapters, machine
from flux.adapters.attach import fingerprint
from flux.data import cache, samples
from flux.data.batches import Plan
from flux.data.check import cache_bytes
from flux.distributed.fsdp import fully_shard
from flux.distributed.gradients import average_gradients, average_metrics
from flux.distributed.ranks import DOWNLOAD, Ranks
from flux.errors import FluxError
from flux.outputs import locked
from flux.training import optimizers, schedules
from flux.training.callbacks import Stop, Stopped
from flux.training.console import Console
from flux.training.ema import EMA
from flux.training.finetune import doubts, fit
from flux.training.finetune.features import Features, Tensors
from flux.training.finetune.length import Length
from flux.training.finetune.model import Base, Network, inject
from flux.training.finetune.options import AUTO, WARMUP, Options
from flux.training.finetune.previews import Pictures
from flux.training.finetune.results import Built, Encoded, Prepared
from flux.training.finetune.start import CACHE, Start, make_folder
from flux.training.finetune.watch import Watch
from flux.training.flow_matching import FlowLoss
from flux.training.gradient_checkpointing import checkpoint_blocks
from flux.training.states import STATE
from flux.training.trainer import Metrics, Trainer, sample_key
from flux.weights import quantize

DROPOUT_SEED = 0x44524F50  # apart from that of the samples


@dataclass(frozen=True)
class Result:
    """path: of the adapter's file."""

    path: Path
    prepared: Prepared
    encoded: Encoded
    built: Built


def finetune(start: Start, quiet: bool = False, stop: Stop | None = None) -> Result:
    """Encodes what is not encoded yet, trains, and writes the adapter.

    stop: what may be asked to end it; it then raises `Stopped`. On several ranks rank 0 alone reads and
    writes the folder, but for the cache. FluxError for a data set, a model or options that cannot be, and
    where another process trains in the folder.
    """
    ranks = start.ranks
    console = Console(quiet or not ranks.is_rank_zero)
    with ranks.waiting(None), ranks.in_rank_zero(locked(start.folder)):
        prepared = ranks.on_all_ranks(lambda: prepare(start, console), DOWNLOAD)
        if ranks.size > 1:
            ranks.agree(ranks.on_all_ranks(lambda: facts(start.options, prepared)))
        if kept := ranks.rank_zero_only(lambda: make_folder(start)):
            console.say(f"{start.folder} held a finished run, which is now {kept}")
        encoded = encode(start, prepared, console)
        built = build(start, prepared, encoded)
        path = train(start, prepared, encoded, built, console, stop or Stop(ranks, quiet))
    return Result(path, prepared, encoded, built)


# --- prepare ---


def prepare(start: Start, console: Console) -> Prepared:
    """Reads the model's files and the data set: what is wrong shows now, not after an hour of encoding."""
    options, ranks = start.options, start.ranks
    base = Base(options)
    dataset = samples.load(options.data, options.with_size(base.checkpoint.spec.image_size))
    for warning in dataset.warnings if ranks.is_rank_zero else ():
        warnings.warn(warning, stacklevel=2)
    plan = Plan(dataset, options.seed)
    digest = plan.digest()
    if start.digest not in (None, digest) and ranks.is_rank_zero:
        raise FluxError(
            f"the data set {options.data} is not the one that this run was begun with (its pictures, "
            f"captions or options have changed): restore it, or start anew with another --output-dir"
        )
    length = Length.of(options, plan.batches_per_epoch, ranks.size)
    say_whether_it_fits(options, base, plan, ranks, console)
    adapters.targets(base.pipeline.flow, options.targets, options.last_blocks)
    optimizer = make_optimizer(options, length.updates)
    for line in doubtful(options, base, plan, length) if ranks.is_rank_zero else ():
        warnings.warn(line, stacklevel=2)
    return Prepared(base, plan, digest, length, optimizer)


def doubtful(options: Options, base: Base, plan: Plan, length: Length) -> list[str]:
    """What was asked for and will not come out, a line each."""
    flow, tokenizers = base.pipeline.flow, base.pipeline
    return [
        *doubts.of_options(options, plan, flow.params.guidance_embed),
        *doubts.of_length(options, length),
        *doubts.of_targets(flow, options.targets),
        *doubts.of_trigger(
            options.trigger,
            plan.captions(1),
            {"T5": tokenizers.t5_tokenizer, "CLIP": tokenizers.clip_tokenizer},
        ),
    ]


def facts(options: Options, prepared: Prepared) -> dict[str, str]:
    """What must be the same on all ranks."""
    files = {f"adapter {file}": fingerprint(file) for file, _ in options.adapters}
    return {**prepared.base.checkpoint.fingerprints(), **files, "data set": prepared.digest[:12]}


def make_optimizer(options: Options, updates: int) -> Optimizer:
    """For so many updates. options: as `Options.resolved` gives them."""
    warmup = min(WARMUP, updates // 10) if options.warmup is None else options.warmup
    rate = schedules.schedule(options.schedule, options.peak_rate, updates, warmup, options.restarts)
    betas = options.adam_beta1, options.adam_beta2
    return optimizers.make(options.optimizer, rate, options.weight_decay or 0.0, betas, options.adam_epsilon)


def say_whether_it_fits(options: Options, base: Base, plan: Plan, ranks: Ranks, console: Console) -> None:
    """Says what a step will take in memory, and warns where that is more than there is."""
    flow = base.pipeline.flow
    shape = {
        "image_size": max((bucket for _, bucket in plan.bucket_table()), key=math.prod),
        "batch": max(group.batch_size for group in plan.groups),
        "text_tokens": base.checkpoint.spec.t5_length,
        "element_size": flow.dtype.size,
    }
    sharing = ranks.size if options.shard_base else 1
    line, advice = fit.describe(options, flow.params, shape, machine.memory(), sharing)
    console.say(line)
    if options.quantize is not None:
        console.say(f"quantized: {quantize.report(options.quantize, transformer=flow)}")
    if advice and ranks.is_rank_zero:
        warnings.warn(advice, stacklevel=2)


# --- encode ---


def encode(start: Start, prepared: Prepared, console: Console) -> Encoded:
    """Fills the cache and lets go of the encoders."""
    options, base, plan = start.options, prepared.base, prepared.plan
    folder = Path(options.cache_dir).expanduser() if options.cache_dir else start.folder / CACHE
    features = Features(plan, cache.Cache(folder), base.identities(), options.train_clip)
    size = plan.groups[0].resolution
    pictures = Pictures(base, features, options.progress_prompts, size, options.progress_seed)
    texts = [*plan.captions(prepared.length.epochs), *pictures.texts()]
    if start.state is None and start.ranks.is_rank_zero:
        width, element_size = base.pipeline.flow.params.context_in_dim, base.pipeline.flow.dtype.size
        size_on_disk = cache_bytes(plan, len(texts), base.checkpoint.spec.t5_length, width, element_size)
        for line in doubts.of_cache(plan, size_on_disk, len(texts), folder):
            warnings.warn(line, stacklevel=2)
    features.encode(base.pipeline, texts, start.ranks, console)
    base.drop_encoders(keep_clip=options.train_clip)
    return Encoded(features, pictures)


# --- build ---


def build(start: Start, prepared: Prepared, encoded: Encoded) -> Built:
    """Puts the adapter into the network, and makes the trainer, the same on all ranks."""
    options, ranks, pipeline = start.options, start.ranks, prepared.base.pipeline
    network = Network(pipeline.flow, pipeline.clip if options.train_clip else None)
    parts = inject(network, options)
    if options.shard_base:
        fully_shard(pipeline.flow, ranks)
    if options.grad_checkpoint or options.shard_base:
        checkpoint_blocks(pipeline.flow, modulation_is_trained=options.train_clip)
    network.train()
    loss = make_loss(options, network, prepared.base)
    several = ranks.size > 1
    trainer = Trainer(
        network,
        with_own_dropout(loss),
        batches(options, prepared.plan, encoded.features, ranks),
        prepared.optimizer,
        ema=None if options.ema is None else EMA(network, options.ema),
        average=average_gradients(ranks.group) if several else None,
        average_metrics=average_metrics(ranks) if several else None,
        around_step=ranks.waiting,
        accumulate=options.accumulate,
        clip_norm=options.clip_norm or None,
        compiled=mx.default_device().type == mx.gpu,
        save_frozen=False,
    )
    if start.state:
        state = start.state / STATE
        ranks.rank_zero_only(lambda: trainer.load(state))
    if several:  # one beginning for all, whatever their machines are
        trainer.replace(ranks.broadcast)
        trainer.step = ranks.gather(trainer.step)[0]
    return Built(network, parts, loss, trainer)


def make_loss(options: Options, network: Network, base: Base) -> FlowLoss:
    """The loss that the options ask for, of this model."""
    sampling = options.time_sampling
    if sampling == AUTO:
        sampling = "sigmoid" if network.flow.params.guidance_embed else "schnell"
    return FlowLoss(
        base.ae_params.shift_factor,
        base.ae_params.scale_factor,
        time_sampling=sampling,
        time_scale=options.time_scale,
        time_mean=options.time_mean,
        time_std=options.time_std,
        loss=options.loss,
        delta=options.delta,
        delta_schedule=options.delta_schedule,
        guidance=options.guidance,
        prior_weight=options.prior_weight,
        end_token=base.end_token,
    )


def with_own_dropout(loss: FlowLoss) -> Callable[[Network, Tensors, mx.array], tuple[mx.array, Metrics]]:
    """The loss with the batch's key for dropout, if it has one, instead of the trainer's.

    The trainer's key is by the rank's count of batches, and n ranks must drop what one would.
    """
    return lambda network, batch, key: loss(network, batch, batch.get("dropout_key", key))


def batches(options: Options, plan: Plan, features: Features, ranks: Ranks) -> Callable[[int], Tensors]:
    """This rank's batches by number: the ranks take those of the plan in turn."""

    def batch(number: int) -> Tensors:
        chosen = plan.batch(number * ranks.size + ranks.rank)
        arrays = features.batch(chosen, options.seed)
        if options.dropout:
            arrays["dropout_key"] = sample_key(options.seed ^ DROPOUT_SEED, chosen.entries[0].position)
        return arrays

    return batch


# --- train ---


def train(
    start: Start, prepared: Prepared, encoded: Encoded, built: Built, console: Console, stop: Stop
) -> Path:
    """Takes the updates that are left, with everything that goes on beside them; the adapter's path."""
    ranks, trainer, length = start.ranks, built.trainer, prepared.length
    if trainer.step > length.updates:
        done = length.iterations_at(trainer.step)
        raise FluxError(f"{start.folder} has come to iteration {done}, beyond {length.iterations}")
    watch = Watch(start, prepared, encoded, built, console)
    watch.begin()
    console.begin(length.iterations, length.iterations_at(trainer.step))
    try:
        with stop.training():
            trainer.run(length.updates, (*watch.callbacks(), stop))
    except Stopped:
        ranks.on_all_ranks(watch.save_state)
        raise
    finally:
        console.close()
    return ranks.on_all_ranks(watch.finish)
