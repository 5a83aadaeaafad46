"""Aspect-ratio buckets: the schema's table and choice, how pictures are cut, and the epochs made of them."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from flux.data import buckets, samples
from flux.data.batches import Plan
from flux.data.schema import Group
from flux.errors import FluxError
from tests.datasets import random_picture, two_concepts, write_pictures, write_toml

# --- The table and the choice ---


def test_table_of_the_defaults_at_512():
    """By hand: area 262144; 256 -> 1024, 320 -> 819 -> 768, 384 -> 682 -> 640, 448 -> 585 -> 576, 512."""
    one_way = {(256, 1024), (320, 768), (384, 640), (448, 576), (512, 512)}
    # Beyond the square: 576 -> 455 -> 448, 640 -> 409 -> 384, 704 -> 372 -> 320, 768 -> 341 -> 320, and
    # 832 -> 315 -> 256, 896 -> 292 -> 256, 960 -> 273 -> 256, 1024 -> 256.
    one_way |= {(320, 704), (256, 832), (256, 896), (256, 960)}
    expected = one_way | {(width, height) for height, width in one_way}
    assert buckets.table(Group(resolution=(512, 512), enable_bucket=True)) == sorted(expected)


@pytest.mark.parametrize(
    "group",
    [
        Group(resolution=(1024, 1024), enable_bucket=True),
        Group(resolution=(512, 768), enable_bucket=True, bucket_reso_steps=32),
        Group(resolution=(64, 64), enable_bucket=True, min_bucket_reso=32, bucket_reso_steps=16),
        Group(resolution=(512, 512), enable_bucket=True, min_bucket_reso=272, max_bucket_reso=1008),
    ],
)
def test_table_by_search(group):
    """The rules again, by trying: of each width the highest that fits; both orientations; the square."""
    area = group.resolution[0] * group.resolution[1]
    low, high, step = group.min_bucket_reso, group.max_bucket_reso, group.bucket_reso_steps
    sides = [side for side in range(step, high + 1, step) if side >= low]
    expected = {max((side, side) for side in range(step, 4096, step) if side**2 <= area)}
    for width in sides:
        heights = [height for height in sides if height * width <= area]
        if heights:
            expected |= {(max(heights), width), (width, max(heights))}
    assert buckets.table(group) == sorted(expected)


def test_largest_sides_hold_for_high_pictures_too():
    sizes = buckets.table(Group(resolution=(1024, 1024), enable_bucket=True))
    assert max(max(size) for size in sizes) == 1024
    assert (256, 1024) in sizes  # below the area, as 4096 would be above the largest side


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((512, 512), (512, 512)),
        ((4000, 4000), (512, 512)),
        ((90, 160), (384, 640)),  # 1.778: 640/384 = 1.667 is nearer than 704/320 = 2.2
        ((160, 90), (640, 384)),  # 0.5625: 384/640 = 0.6
        ((100, 1000), (256, 1024)),
        ((1000, 100), (1024, 256)),
        ((448, 576), (448, 576)),
    ],
)
def test_choice_by_ratio(size, bucket):
    assert buckets.choose(size, Group(resolution=(512, 512), enable_bucket=True)) == bucket


def test_equal_ratios_go_to_the_own_size_or_the_largest():
    group = Group(
        resolution=(128, 128),
        enable_bucket=True,
        min_bucket_reso=32,
        max_bucket_reso=96,
        bucket_reso_steps=32,
    )
    sizes = buckets.table(group)
    assert {(64, 64), (96, 96)} & set(sizes)
    same = [size for size in sizes if size[0] == size[1]]
    assert buckets.choose((1000, 1000), group) == max(same)
    assert all(buckets.choose(size, group) == size for size in same)


def test_without_buckets_all_have_the_resolution():
    assert buckets.choose((90, 160), Group(resolution=(512, 768))) == (512, 768)


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((500, 700), (448, 640)),  # smaller than the area: each side rounded down, not enlarged
        ((1024, 1024), (1024, 1024)),
        ((2048, 2048), (1024, 1024)),
        ((1500, 3000), (704, 1408)),  # 724.08 x 1448.15
        ((300, 6000), (192, 4544)),  # 228.97 x 4579.5: the limits of the table do not hold here
        ((40, 500), (64, 448)),
    ],
)
def test_no_upscale(size, bucket):
    group = Group(resolution=(1024, 1024), enable_bucket=True, bucket_no_upscale=True)
    assert buckets.choose(size, group) == bucket


# --- The cut ---


def test_middle_is_cut_out():
    picture = random_picture(64, 101)
    assert np.array_equal(buckets.fit(picture, (64, 64)), picture[:, 18:82])
    assert np.array_equal(buckets.fit(picture[..., 0].T, (64, 64)), picture[:, 18:82, 0].T)
    assert np.array_equal(buckets.fit(picture, (64, 101)), picture)


def test_scaling_down_averages_areas():
    picture = random_picture(96, 128)
    means = picture.reshape(48, 2, 64, 2, 3).mean(axis=(1, 3))
    assert np.abs(buckets.fit(picture, (48, 64)) - means).max() <= 1  # Pillow rounds after each direction


def test_scaling_up_is_lanczos_and_covers():
    picture = random_picture(32, 50)
    whole = np.array(Image.fromarray(picture).resize((100, 64), Image.Resampling.LANCZOS))
    assert np.array_equal(buckets.fit(picture, (64, 64)), whole[:, 18:82])


@pytest.mark.parametrize("size", [(64, 65), (65, 64), (63, 1000), (999, 61), (17, 17), (1, 1), (333, 334)])
def test_any_picture_fills_any_bucket(size):
    for bucket in ((64, 64), (48, 80), (80, 48)):
        for rng in (None, np.random.default_rng(0)):
            assert buckets.fit(random_picture(*size), bucket, rng).shape == (*bucket, 3)


def test_random_crops_reach_both_ends():
    picture = np.tile(np.arange(70, dtype=np.uint8)[None, :, None], (64, 1, 3))
    rng = np.random.default_rng(0)
    starts = {int(buckets.fit(picture, (64, 64), rng)[0, 0, 0]) for _ in range(200)}
    assert starts == set(range(7))


# --- Epochs ---

TOML = """
[general]
enable_bucket = true
min_bucket_reso = 32
bucket_reso_steps = 16
flip_aug = true
[[datasets]]
resolution = 64
batch_size = 3
[[datasets.subsets]]
image_dir = "a"
class_tokens = "a, b, c, d, e, f"
shuffle_caption = true
num_repeats = 3
[[datasets.subsets]]
image_dir = "r"
class_tokens = "reg"
is_reg = true
[[datasets]]
resolution = 96
batch_size = 2
[[datasets.subsets]]
image_dir = "a"
random_crop = true
class_tokens = "second"
"""


@pytest.fixture
def dataset(tmp_path):
    write_pictures(
        tmp_path / "a", {"sq1.png": (64, 64), "sq2.png": (80, 80), "wide.png": (40, 80), "high.png": (90, 45)}
    )
    write_pictures(tmp_path / "r", {"r1.png": (70, 70), "r2.png": (71, 70), "r3.png": (40, 81)})
    return samples.load(write_toml(tmp_path, TOML), {})


def entries_of(batches):
    return [entry for batch in batches for entry in batch.entries]


def name(entry):
    return entry.placed.sample.name.rsplit("/", 1)[-1]


def test_an_epoch_has_each_sample_as_often_as_it_repeats(dataset):
    plan = Plan(dataset, seed=1)
    for number in range(3):
        batches = plan.epoch(number)
        assert len(batches) == plan.batches_per_epoch
        entries = entries_of(batches)
        first = Counter(name(entry) for entry in entries if entry.placed.sample.group == 0)
        trained = dict.fromkeys(("sq1.png", "sq2.png", "wide.png", "high.png"), 3)
        assert first == trained | dict.fromkeys(("r1.png", "r2.png", "r3.png"), 4)  # 12 each in all
        assert sum(entry.is_reg for entry in entries) == 12
        second = Counter(name(entry) for entry in entries if entry.placed.sample.group == 1)
        assert second == dict.fromkeys(trained, 1)
        assert [entry.position for entry in entries] == list(range(number * 28, (number + 1) * 28))


def test_batches_are_of_one_bucket_and_full_but_for_the_last(dataset):
    plan = Plan(dataset, seed=1)
    counts, sizes = Counter(), Counter()
    for batch in plan.epoch(0):
        (key,) = {(entry.placed.sample.group, entry.placed.bucket) for entry in batch.entries}
        assert key[1] == batch.bucket
        limit = dataset.groups[key[0]].batch_size
        assert len(batch.entries) <= limit
        counts[key] += len(batch.entries)
        sizes[key] += len(batch.entries) < limit
    assert counts == plan.bucket_table()
    assert max(sizes.values()) == 1
    assert (
        sum(-(-n // dataset.groups[g].batch_size) for (g, _), n in counts.items()) == plan.batches_per_epoch
    )


def test_a_plan_is_a_function_of_seed_and_epoch(dataset):
    plan, again = Plan(dataset, seed=1), Plan(dataset, seed=1)
    straight = [plan.batch(i) for i in range(4 * plan.batches_per_epoch)]
    backwards = [again.batch(i) for i in reversed(range(len(straight)))]
    assert straight == backwards[::-1]
    assert straight[: plan.batches_per_epoch] == list(plan.epoch(0))
    orders = [[name(entry) for entry in entries_of(plan.epoch(i))] for i in range(4)]
    orders.append([name(entry) for entry in entries_of(Plan(dataset, seed=2).epoch(0))])
    assert len({tuple(order) for order in orders}) == 5


def test_processes_share_what_one_would_see(dataset):
    alone = Plan(dataset, seed=3)
    shared_out = [Plan(dataset, seed=3).batch(step * 2 + rank) for step in range(20) for rank in (0, 1)]
    assert shared_out == [alone.batch(i) for i in range(40)]


def test_flips_and_captions_change_from_epoch_to_epoch(dataset):
    plan = Plan(dataset, seed=1)
    flips, captions = [], Counter()
    for number in range(20):
        for entry in entries_of(plan.epoch(number)):
            flips.append(entry.flip)
            captions[entry.caption] += 1
    assert 0.4 < np.mean(flips) < 0.6
    assert captions["reg"] == 240
    assert len(captions) > 150
    assert set(plan.captions(20)) == set(captions)
    assert len(plan.captions(20)) == len(captions)


def test_only_crops_and_colours_make_variants(dataset):
    plan = Plan(dataset, seed=1)
    assert {entry.repeat for entry in entries_of(plan.epoch(0))} == {0}
    assert len(plan.variants()) == 4 + 3 + 4
    options = {"resolution": (64, 64), "class_tokens": "x", "random_crop": True, "num_repeats": 5}
    folder = dataset.samples[0].picture.parent
    crops = Plan(samples.load(folder, options), seed=1)
    variants = {(entry.placed, entry.repeat) for entry in entries_of(crops.epoch(0))}
    assert len(variants) == 4 * 5
    assert set(crops.variants()) == variants


def test_regularisation_pictures_go_round_with_new_variants(tmp_path):
    """Repeats are counted on over the laps: a second lap does not crop as the first did."""
    write_pictures(tmp_path / "a", {f"{i}.png": (64, 64) for i in range(5)})
    write_pictures(tmp_path / "r", {"r.png": (64, 128), "s.png": (64, 129)})
    toml = write_toml(
        tmp_path,
        """[[datasets]]
resolution = 64
[[datasets.subsets]]
image_dir = "a"
class_tokens = "x"
num_repeats = 2
[[datasets.subsets]]
image_dir = "r"
class_tokens = "y"
is_reg = true
random_crop = true
num_repeats = 2
""",
    )
    entries = [entry for entry in entries_of(Plan(samples.load(toml, {}), 1).epoch(0)) if entry.is_reg]
    variants = sorted((name(entry), entry.repeat) for entry in entries)
    # Laps of r0 r1 s0 s1: two whole ones, then r4 and r5.
    assert variants == [("r.png", i) for i in range(6)] + [("s.png", i) for i in range(4)]


def test_validation_is_without_chance(tmp_path):
    write_pictures(tmp_path / "a", {f"{i}.png": (64, 64) for i in range(10)})
    toml = write_toml(
        tmp_path,
        """[general]
flip_aug = true
shuffle_caption = true
caption_dropout_rate = 1.0
[[datasets]]
resolution = 64
batch_size = 2
validation_split = 0.5
[[datasets.subsets]]
image_dir = "a"
class_tokens = "a, b, c, d"
""",
    )
    plan = Plan(samples.load(toml, {}), seed=1)
    batches = plan.validation()
    assert [len(batch.entries) for batch in batches] == [2, 2, 1]
    assert {entry.caption for entry in entries_of(batches)} == {"a, b, c, d"}
    assert not any(entry.flip for entry in entries_of(batches))
    assert [entry.placed for entry in entries_of(batches)] == plan.held_out
    assert {entry.caption for entry in entries_of(plan.epoch(0))} == {""}
    assert set(plan.captions(1)) == {"", "a, b, c, d"}
    assert len(plan.variants()) == 10


def test_digest_tells_data_and_options_apart(tmp_path):
    write_pictures(tmp_path / "a", {"a.png": (64, 64)})
    (tmp_path / "a").joinpath("a.txt").write_text("one")

    def digest(seed=0, **options):
        options = {"resolution": (64, 64), **options}
        return Plan(samples.load(tmp_path / "a", options), seed).digest()

    first = digest()
    assert digest(seed=1) == first
    assert digest(num_repeats=2) != first
    assert digest(resolution=(64, 32)) != first
    (tmp_path / "a/a.txt").write_text("two")
    assert digest() != first
    (tmp_path / "a/a.txt").write_text("one")
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    assert digest() == first
    write_pictures(tmp_path / "b", {"a.png": (63, 64)})
    assert digest() != first


def test_negative_seeds_are_refused(dataset):
    with pytest.raises(FluxError, match="seed -1"):
        Plan(dataset, seed=-1)


def test_two_concepts_in_buckets(shared, tmp_path, monkeypatch):
    """Each picture's bucket by the rules, worked out apart from the code under test."""
    two_concepts(shared, tmp_path)
    monkeypatch.chdir(tmp_path)
    plan = Plan(samples.load("flux_data/data.toml", {"enable_bucket": True}), seed=0)
    widths = np.arange(256, 1025, 64)
    sizes = {(1024, 1024)}
    for width in widths:
        height = min(1024, 1024 * 1024 // width // 64 * 64)
        sizes |= {(int(height), int(width)), (int(width), int(height))}
    for placed in plan.placed:
        height, width = Image.open(placed.sample.picture).size[::-1]
        assert placed.size == (height, width)
        nearest = min(abs(w / h - width / height) for h, w in sizes)
        assert placed.bucket in sizes
        assert abs(placed.bucket[1] / placed.bucket[0] - width / height) == nearest
    assert len(plan.items) == plan.batches_per_epoch == 20
    assert Counter(entry.caption for entry in entries_of(plan.epoch(7))) == {
        "tjtoy toy": 6,
        "sparkgpu gpu": 14,
    }
