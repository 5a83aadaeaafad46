"""Everything wrong with a data set, without a model: what `dreambooth.py --check-data` prints."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from flux.data import batches, buckets, pictures
from flux.data.files import some
from flux.data.pictures import Look, Placed
from flux.data.samples import Dataset

# What is worth a word: a picture enlarged more than so many times, a crop that takes more of the area.
ENLARGED = 1.25
LOST_SHARE = 1 / 3
LATENT = 8, 16  # pixels of a side to one of the latent, and its channels: of FLUX's autoencoder
T5_WIDTH, CLIP_WIDTH = 4096, 768  # of FLUX's text encoders


class Tokenizer(Protocol):
    """What this file knows of a tokenizer."""

    max_length: int

    def truncated(self, text: str) -> str:
        """The end of a text that does not fit."""


@dataclass(frozen=True)
class BucketRow:
    """A line of the bucket table."""

    group: int  # of [[datasets]], from 1
    height: int
    width: int
    pictures: int
    samples: int  # an epoch
    batches: int  # an epoch


@dataclass
class Report:
    """What a data set holds. errors: it cannot be trained on; warnings: it can, but is that meant?"""

    name: str
    pictures: int = 0
    regularisation: int = 0
    validation: int = 0
    masked: int = 0  # pictures whose loss is masked
    samples_per_epoch: int = 0
    steps_per_epoch: int = 0  # batches
    cache_bytes: int = 0  # of the disk, for the captions of one epoch
    buckets: list[BucketRow] = field(default_factory=list)
    captions: dict[str, int] = field(default_factory=dict)  # the first epoch's, with their counts
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def check(dataset: Dataset, tokenizers: Mapping[str, Tokenizer] | None = None) -> Report:
    """Decodes every picture and reports all faults at once; raises for none of them.

    tokenizers: "T5" and "CLIP", to find captions that are too long.
    """
    tokenizers = tokenizers or {}
    report = Report(dataset.name, errors=list(dataset.errors), warnings=list(dataset.warnings))
    looks, faults = pictures.look_at_all(dataset)
    report.errors += faults
    report.pictures = sum(not sample.subset.is_reg for sample in dataset.samples)
    report.regularisation = len(dataset.samples) - report.pictures
    report.validation = len(dataset.validation)
    report.masked = sum(look.placed.mask != "" or look.placed.sample.subset.alpha_mask for look in looks)
    _check_duplicates(looks, report)
    _check_sizes(looks, dataset, report)
    _check_kinds(looks, report)
    if not report.errors:
        text_tokens = tokenizers["T5"].max_length if "T5" in tokenizers else 512
        _count(dataset, [look.placed for look in looks], report, text_tokens)
    _check_lengths(dataset, tokenizers, report)
    return report


def _check_duplicates(looks: list[Look], report: Report) -> None:
    """Equal pictures of one group; several groups have the same ones where they train several sizes."""
    names: dict[tuple[int, str], list[str]] = defaultdict(list)
    for look in looks:
        names[look.placed.sample.group, look.pixels].append(look.placed.sample.name)
    same = [" = ".join(group) for group in names.values() if len(group) > 1]
    report.warnings += [f"the same picture more than once: {group}" for group in same]


def _check_sizes(looks: list[Look], dataset: Dataset, report: Report) -> None:
    for look in looks:
        placed = look.placed
        (height, width), bucket = placed.size, placed.bucket
        name = f"{placed.sample.name} ({height}x{width})"
        scale = buckets.scale_to_cover(placed.size, bucket)
        if scale > ENLARGED:
            report.warnings.append(f"tiny: {name} is enlarged {scale:.2f} times to {bucket[0]}x{bucket[1]}")
        lost = 1 - bucket[0] * bucket[1] / (height * width * scale**2)
        if lost > LOST_SHARE:
            hint = "" if dataset.groups[placed.sample.group].enable_bucket else "; enable_bucket keeps more"
            report.warnings.append(f"{name} loses {lost:.0%} of its area to the crop{hint}")


def _check_kinds(looks: list[Look], report: Report) -> None:
    """Pictures that are more than colours, and what is made of them."""

    def names(kind: list[Look]) -> str:
        return some(look.placed.sample.name for look in kind)

    masked = [look for look in looks if look.placed.sample.subset.alpha_mask]
    if opaque := [look for look in masked if not look.has_alpha and not look.placed.mask]:
        report.warnings.append(f"alpha_mask, but nothing is transparent: {names(opaque)}")
    if laid := [look for look in looks if look.has_alpha and look not in masked]:
        report.warnings.append(f"transparent, laid over white (alpha_mask masks the loss): {names(laid)}")
    if animated := [look for look in looks if look.animated]:
        report.warnings.append(f"animated, the first frame is taken: {names(animated)}")


def _check_lengths(dataset: Dataset, tokenizers: Mapping[str, Tokenizer], report: Report) -> None:
    """Captions of which a text encoder does not see the end."""
    texts = [(sample.name, text) for sample in dataset.samples for text in sample.texts]
    for name, tokenizer in tokenizers.items():
        cut = [
            f"{sample} ({tokenizer.truncated(text)!r})" for sample, text in texts if tokenizer.truncated(text)
        ]
        if cut:
            tokens = f"{tokenizer.max_length} tokens of {name}, which does not see their end"
            report.warnings.append(f"captions longer than the {tokens}: {some(cut)}")


def _count(dataset: Dataset, placed: list[Placed], report: Report, text_tokens: int) -> None:
    plan = batches.Plan(dataset, 0, placed)
    files: dict[tuple, int] = defaultdict(int)
    for each in plan.placed:
        files[each.sample.group, each.bucket] += 1
    for (group, (height, width)), samples in plan.bucket_table().items():
        batch_count = -(-samples // dataset.groups[group].batch_size)
        count = files[group, (height, width)]
        report.buckets.append(BucketRow(group + 1, height, width, count, samples, batch_count))
    report.samples_per_epoch = len(plan.items)
    report.steps_per_epoch = plan.batches_per_epoch
    for batch in plan.epoch(0):
        for entry in batch.entries:
            report.captions[entry.caption] = report.captions.get(entry.caption, 0) + 1
    used = {item.placed for item in plan.items}
    if unused := [each.sample.name for each in plan.placed if each not in used]:
        report.warnings.append(f"regularisation pictures beyond the training's count, unused: {some(unused)}")
    report.cache_bytes = cache_bytes(plan, len(plan.captions(1)), text_tokens)


def cache_bytes(
    plan: batches.Plan, texts: int, text_tokens: int, text_width: int = T5_WIDTH, element_size: int = 2
) -> int:
    """The disk that the encoded pictures and so many texts take, about; for FLUX's autoencoder."""
    downscale, channels = LATENT
    total = 0
    for placed, _ in plan.variants():
        area = placed.bucket[0] * placed.bucket[1] // downscale**2
        views = 2 if placed.sample.subset.flip_aug else 1
        masked = placed.mask or placed.sample.subset.alpha_mask
        total += area * (2 * views * channels * element_size + (4 if masked else 0))
    return total + texts * (text_tokens * text_width + CLIP_WIDTH) * element_size


def render(report: Report) -> str:
    """The report as lines of text."""
    lines = [
        f"{report.name}: {report.pictures} pictures to learn, {report.samples_per_epoch} samples an epoch"
    ]
    if report.regularisation:
        lines.append(f"{report.regularisation} regularisation pictures")
    if report.validation:
        lines.append(f"{report.validation} pictures held out for validation")
    if report.masked:
        lines.append(f"{report.masked} pictures with a masked loss")
    if report.buckets:
        lines.append("dataset  height x width  pictures  samples  batches")
    for row in report.buckets:
        size = f"{row.height} x {row.width}"
        lines.append(f"{row.group:7}  {size:>14}  {row.pictures:8}  {row.samples:7}  {row.batches:7}")
    if report.buckets:
        lines.append(f"{report.steps_per_epoch} steps an epoch")
        lines.append(f"cache: about {report.cache_bytes / 1e9:.2g} GB on disk (captions of one epoch)")
    lines += [f"caption ({count}): {caption}" for caption, count in sorted(report.captions.items())]
    lines += [f"error: {error}" for error in report.errors]
    lines += [f"warning: {warning}" for warning in report.warnings]
    return "\n".join(lines)
