"""Everything wrong with a data set, without a model: what `dreambooth.py --check-data` prints."""

import hashlib
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from flux.data import batches, buckets, pictures
from flux.data.datasets import some
from flux.data.pictures import Placed
from flux.data.samples import Dataset, Sample
from flux.errors import FluxError

# What is worth a word: a picture enlarged more than so many times, a crop that takes more of the area.
ENLARGED = 1.25
LOST_SHARE = 1 / 3


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
    samples_per_epoch: int = 0
    steps_per_epoch: int = 0  # batches
    buckets: list[BucketRow] = field(default_factory=list)
    captions: dict[str, int] = field(default_factory=dict)  # the first epoch's, with their counts
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Picture:
    """A picture that could be decoded."""

    placed: Placed
    pixels: str  # a digest of what is seen: equal for copies in other formats
    has_alpha: bool
    animated: bool


def check(dataset: Dataset) -> Report:
    """Decodes every picture and reports all faults at once; raises for none of them."""
    report = Report(dataset.name, warnings=list(dataset.warnings))
    samples = dataset.samples + dataset.validation
    found = [picture for sample in samples if (picture := _open(sample, dataset, report))]
    report.pictures = sum(not sample.subset.is_reg for sample in dataset.samples)
    report.regularisation = len(dataset.samples) - report.pictures
    report.validation = len(dataset.validation)
    _check_duplicates(found, report)
    _check_sizes(found, dataset, report)
    _check_kinds(found, report)
    if not report.errors:
        _count(dataset, report)
    return report


def _open(sample: Sample, dataset: Dataset, report: Report) -> _Picture | None:
    try:
        placed = pictures.place_one(sample, dataset.groups[sample.group])
        content = pictures.read(sample)
        picture, alpha = pictures.load(sample, content)
    except FluxError as error:
        report.errors.append(str(error))
        return None
    digest = hashlib.sha256(repr(picture.shape).encode() + picture.tobytes())
    digest.update(b"" if alpha is None else alpha.tobytes())
    has_alpha = alpha is not None and bool(np.any(alpha < 255))
    return _Picture(placed, digest.hexdigest(), has_alpha, pictures.is_animated(content))


def _check_duplicates(found: list[_Picture], report: Report) -> None:
    names: dict[str, list[str]] = defaultdict(list)
    for picture in found:
        names[picture.pixels].append(picture.placed.sample.name)
    same = [" = ".join(group) for group in names.values() if len(group) > 1]
    report.warnings += [f"the same picture more than once: {group}" for group in same]


def _check_sizes(found: list[_Picture], dataset: Dataset, report: Report) -> None:
    for picture in found:
        placed = picture.placed
        (height, width), bucket = placed.size, placed.bucket
        name = f"{placed.sample.name} ({height}x{width})"
        scale = buckets.scale_to_cover(placed.size, bucket)
        if scale > ENLARGED:
            report.warnings.append(f"tiny: {name} is enlarged {scale:.2f} times to {bucket[0]}x{bucket[1]}")
        lost = 1 - bucket[0] * bucket[1] / (height * width * scale**2)
        if lost > LOST_SHARE:
            hint = "" if dataset.groups[placed.sample.group].enable_bucket else "; enable_bucket keeps more"
            report.warnings.append(f"{name} loses {lost:.0%} of its area to the crop{hint}")


def _check_kinds(found: list[_Picture], report: Report) -> None:
    """Pictures that are more than colours, and what is made of them."""

    def names(kind: list[_Picture]) -> str:
        return some(picture.placed.sample.name for picture in kind)

    masked = [picture for picture in found if picture.placed.sample.subset.alpha_mask]
    if opaque := [picture for picture in masked if not picture.has_alpha]:
        report.warnings.append(f"alpha_mask, but nothing is transparent: {names(opaque)}")
    if laid := [picture for picture in found if picture.has_alpha and picture not in masked]:
        report.warnings.append(f"transparent, laid over white (alpha_mask masks the loss): {names(laid)}")
    if animated := [picture for picture in found if picture.animated]:
        report.warnings.append(f"animated, the first frame is taken: {names(animated)}")


def _count(dataset: Dataset, report: Report) -> None:
    plan = batches.Plan(dataset, seed=0)
    files = defaultdict(int)
    for placed in plan.placed:
        files[placed.sample.group, placed.bucket] += 1
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
    if unused := [placed.sample.name for placed in plan.placed if placed not in used]:
        report.warnings.append(f"regularisation pictures beyond the training's count, unused: {some(unused)}")


def render(report: Report) -> str:
    """The report as lines of text."""
    lines = [
        f"{report.name}: {report.pictures} pictures to learn, {report.samples_per_epoch} samples an epoch"
    ]
    if report.regularisation:
        lines.append(f"{report.regularisation} regularisation pictures")
    if report.validation:
        lines.append(f"{report.validation} pictures held out for validation")
    if report.buckets:
        lines.append("dataset  height x width  pictures  samples  batches")
    for row in report.buckets:
        size = f"{row.height} x {row.width}"
        lines.append(f"{row.group:7}  {size:>14}  {row.pictures:8}  {row.samples:7}  {row.batches:7}")
    if report.buckets:
        lines.append(f"{report.steps_per_epoch} steps an epoch")
    lines += [f"caption ({count}): {caption}" for caption, count in sorted(report.captions.items())]
    lines += [f"error: {error}" for error in report.errors]
    lines += [f"warning: {warning}" for warning in report.warnings]
    return "\n".join(lines)
