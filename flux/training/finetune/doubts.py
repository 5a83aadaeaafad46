"""What was asked for and will not come out: settings without effect, triggers cut off, a disk that fills up.

Each function returns lines for warnings. None of these ends a training: it might be meant.
"""

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from flux.adapters import partly_named
from flux.adapters.lora import linears
from flux.adapters.names import template
from flux.data.batches import Plan
from flux.data.check import Tokenizer
from flux.data.files import some
from flux.training.finetune.length import Length
from flux.training.finetune.options import Options, shown
from flux.training.trainer import Callback, Means, Trainer

PRODIGY_RATE = 0.1  # below it Prodigy, whose rate is a factor of about 1, hardly moves
ADAM_RATE = 0.1  # from it on any other optimizer destroys what it trains
LARGE_CACHE = 5e9  # bytes
PRODIGY_START = 1e-6  # Prodigy's d before its first update
UNFOUND = 3  # times that


@dataclass(frozen=True)
class Situation:
    """What decides whether an option has an effect."""

    options: Options
    plan: Plan
    guided: bool  # whether the model is told a guidance


# option -> whether it has an effect, and what that needs
NEEDS: dict[str, tuple[Callable[[Situation], bool], str]] = {
    "restarts": (
        lambda s: s.options.schedule == "cosine_with_restarts",
        "--lr-schedule cosine_with_restarts",
    ),
    "delta": (lambda s: s.options.loss in ("huber", "smooth_l1"), "--loss huber or smooth_l1"),
    "delta_schedule": (lambda s: s.options.loss in ("huber", "smooth_l1"), "--loss huber or smooth_l1"),
    **dict.fromkeys(
        ("adam_beta1", "adam_beta2"),
        (lambda s: s.options.optimizer != "adafactor", "--optimizer adam, adamw, lion or prodigy"),
    ),
    "adam_epsilon": (
        lambda s: s.options.optimizer in ("adam", "adamw", "prodigy"),
        "--optimizer adam, adamw or prodigy",
    ),
    "time_mean": (lambda s: s.options.time_sampling == "logit_normal", "--time-sampling logit_normal"),
    "time_std": (lambda s: s.options.time_sampling == "logit_normal", "--time-sampling logit_normal"),
    "time_scale": (
        lambda s: s.options.time_sampling in ("auto", "sigmoid", "shift", "flux_shift"),
        "--time-sampling sigmoid, shift or flux_shift",
    ),
    "guidance": (lambda s: s.guided, "a model that is told a guidance, such as dev"),
    "prior_weight": (
        lambda s: any(placed.sample.subset.is_reg for placed in s.plan.placed),
        "regularisation pictures (is_reg in a data.toml, or a folder reg)",
    ),
    "validate_every": (lambda s: bool(s.plan.held_out), "pictures that are held out (--validation-split)"),
    "progress_every": (lambda s: bool(s.options.progress_prompts), "--progress-prompt"),
    "progress_seed": (lambda s: bool(s.options.progress_prompts), "--progress-prompt"),
    "mask_floor": (lambda s: s.plan.masked, "pictures with masks"),
    "keep_tokens": (lambda s: bool(s.options.data_options.get("shuffle_caption")), "--shuffle-caption"),
    "bucket_no_upscale": (lambda s: bool(s.options.data_options.get("enable_bucket")), "--buckets"),
}


def of_options(options: Options, plan: Plan, guided: bool) -> list[str]:
    """Options without effect, and rates at which little or too much is trained."""
    usual = {field.name: field.default for field in fields(Options)}
    changed = {name for name in NEEDS if name in usual and getattr(options, name) != usual[name]}
    changed |= {name for name, value in options.data_options.items() if name in NEEDS and value}
    situation = Situation(options, plan, guided)
    lines = [
        f"{shown(name)} has no effect: it needs {NEEDS[name][1]}"
        for name in NEEDS
        if name in changed and not NEEDS[name][0](situation)
    ]
    rate = options.peak_rate
    if options.optimizer == "prodigy" and rate < PRODIGY_RATE:
        lines.append(
            f"--learning-rate {rate:g} with prodigy trains next to nothing: it is a factor of the step size "
            f"that Prodigy finds, and 1 as a rule"
        )
    if options.optimizer != "prodigy" and rate >= ADAM_RATE:
        lines.append(f"--learning-rate {rate:g} with {options.optimizer} is far too high: 1e-4 is usual")
    return lines


def of_length(options: Options, length: Length) -> list[str]:
    """What does not go into the run's length."""
    lines = []
    if options.iterations is not None and options.iterations != length.iterations:
        lines.append(
            f"{length.iterations} iterations in the place of {options.iterations}: an update takes "
            f"{length.accumulate} (--grad-accumulate)"
        )
    if options.warmup is not None and options.warmup > length.updates // 2:
        lines.append(
            f"--warmup {options.warmup} is more than half of the {length.updates} updates: iterations / "
            f"--grad-accumulate"
        )
    if options.save_every is not None and options.save_every > length.iterations:
        lines.append(f"--save-every {options.save_every} is beyond the run's {length.iterations} iterations")
    if options.save_every_epochs is not None and options.save_every_epochs > length.epochs:
        lines.append(f"--save-every-epochs {options.save_every_epochs} is beyond the run's {length.epochs}")
    return lines


def of_targets(model: nn.Module, which: str) -> list[str]:
    """Layers that are trained whole though only parts of them were named."""
    found = partly_named(list(linears(model)), which)
    if not found:
        return []
    parts = some(dict.fromkeys(template(part) for parts in found.values() for part in parts))
    whole = some(dict.fromkeys(map(template, found)))
    return [f"--lora-targets: {parts} are parts of fused layers, which are trained whole: {whole}"]


def of_trigger(
    trigger: str | None, captions: Iterable[str], tokenizers: Mapping[str, Tokenizer]
) -> list[str]:
    """Whether the words that call the subject are in the captions, and before where an encoder stops."""
    if trigger is None:
        return []
    having = [text for text in captions if _squeezed(trigger) in _squeezed(text)]
    if not having:
        return [f"the trigger {trigger!r} is in no caption: it will call nothing"]
    lines = []
    for name, tokenizer in tokenizers.items():
        if cut := [text for text in having if _is_cut(trigger, text, tokenizer)]:
            lines.append(
                f"the trigger {trigger!r} comes after the {tokenizer.max_length} tokens that {name} reads in "
                f"{len(cut)} of {len(having)} captions: move it to their beginning: {cut[0]!r}"
            )
    return lines


def _is_cut(trigger: str, text: str, tokenizer: Tokenizer) -> bool:
    seen = _squeezed(text).removesuffix(_squeezed(tokenizer.truncated(text)))
    return _squeezed(trigger) not in seen


def _squeezed(text: str) -> str:
    """Without spaces and capitals, of which tokenizers change some."""
    return "".join(text.lower().split())


def of_cache(plan: Plan, size: int, texts: int, folder: Path) -> list[str]:
    """Whether the encoded pictures and texts, of `size` bytes, take much of the disk, or all of it."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    what = f"the cache takes about {size / 1e9:.1f} GB ({len(plan.variants())} pictures, {texts} captions)"
    if size > free:
        return [f"{what}, and the disk has {free / 1e9:.1f} GB: name another by --cache-dir"]
    return [f"{what}: --cache-dir puts it elsewhere"] if size > LARGE_CACHE else []


def of_result(up: Mapping[str, mx.array], step_size: float | None) -> list[str]:
    """Whether nothing has been trained. up: the LoRA's up weights, from 0. step_size: Prodigy's d."""
    if up and not any(bool(array.any()) for array in up.values()):
        return ["every update was 0: the adapter changes nothing"]
    if step_size is not None and step_size <= UNFOUND * PRODIGY_START:
        return [f"prodigy has found no step size in so few updates (d {step_size:.0e}): little is trained"]
    return []


class Unmoved(Callback):
    """Says once where an update cannot train anything: its loss or its gradient is exactly 0."""

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._said: set[str] = set()

    def after_step(self, trainer: Trainer, metrics: Means) -> None:
        """Looks at the means of the step."""
        if metrics["loss"] == 0:
            self._once(
                "loss", f"update {trainer.step} has a loss of exactly 0: masks or weights leave nothing"
            )
        elif metrics.get("norm") == 0:
            self._once("norm", f"update {trainer.step} has a gradient of exactly 0: it changes nothing")

    def _once(self, what: str, text: str) -> None:
        if what not in self._said:
            self._said.add(what)
            self._say(text)
