"""Buckets of sizes, crops and drawn pictures in a training from scratch."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flux import known_words
from flux.data import buckets
from flux.data.sources import open_drawn, sizes
from flux.errors import FluxError
from flux.training.optimizers import Muon
from flux.training.pretrain import validate
from flux.training.pretrain.batches import Batches, Shard
from flux.training.pretrain.config import ConfigError, Data
from flux.training.pretrain.datasets import open_dataset
from flux.training.pretrain.order import Order, bucket_of, crops
from flux.training.pretrain.run import Run
from flux.training.report import read_lines
from flux.training.schedules import WarmupDecay

from . import pretraining

VAE = {"name": "vae", "train_vae": True, "max_steps": 6}
SIZES = [(16, 16), (16, 32), (32, 16), (32, 32)]


class Drawn:
    """Forty pictures of four sizes: the number is in every pixel."""

    def __init__(self) -> None:
        self.sizes = [SIZES[i % 4] for i in range(40)]
        self.captions = [f"number {i}" for i in range(40)]

    def __len__(self) -> int:
        return 40

    def texts(self, index: int) -> tuple[str, ...]:
        return (self.captions[index],)

    def picture(self, index: int) -> np.ndarray:
        return np.full((*self.sizes[index], 3), index, np.uint8)


DRAWN = {"datasets": {"drawn": {"type": "drawn", "source": f"{__name__}:Drawn"}}}


def made(folder: Path, shard: Shard | None = None, **step) -> Batches:
    pipeline = {"pipeline": {"steps": [{**VAE, "batch_size": 3, "cfg_dropout_prob": 0, **step}]}}
    data = {"img_sizes": [16, [16, 32], [32, 16], 32], "img_size": 16}
    tables = pretraining.tables(folder, data=data, training=pipeline, **DRAWN)
    del tables["data"]["data_path"], tables["data"]["captions_file"]
    (folder / "c.json").write_text(json.dumps(tables))
    config = validate.load(folder / "c.json")
    return Batches(config, 0, open_dataset(config.datasets["drawn"]), None, shard or Shard())


# --- buckets ---


def test_nearest_ratio_then_largest_that_is_not_larger():
    among = [(64, 64), (128, 128), (96, 96), (64, 128), (128, 64)]
    for size, expected in (
        ((100, 100), (96, 96)),
        ((30, 30), (64, 64)),
        ((4000, 3900), (128, 128)),
        ((64, 100), (64, 128)),
        ((900, 300), (128, 64)),
    ):
        assert among[buckets.nearest(size, among)] == expected


def test_img_sizes_are_a_side_or_width_and_height():
    assert Data(img_sizes=(64, (128, 64))).trained_sizes == [(64, 64), (64, 128)]
    assert Data(img_size=32, reduced_min_sizes=(16,)).trained_sizes == [(32, 32), (16, 16)]


def test_batches_have_one_size_and_an_epoch_every_picture_that_fills_one(tmp_path):
    batches = made(tmp_path)
    assert batches.epoch_length == 12  # ten pictures of each size: three batches of three
    seen = []
    for number in range(12):
        pictures = np.array(batches(number)["pictures"])
        rows = pictures[:, 0, 0, 0]
        assert {SIZES[row % 4] for row in rows} == {pictures.shape[1:3]}
        seen += rows.tolist()
    assert len(set(seen)) == 36
    first, second = ([batches._size(n) for n in range(12 * e, 12 * e + 12)] for e in (0, 1))
    assert first != sorted(first), "the sizes are mixed"
    assert first != second


def test_processes_have_other_pictures_of_the_same_size(tmp_path):
    both = [made(tmp_path, Shard(rank, 2)) for rank in range(2)]
    assert both[0].epoch_length == 4  # batches of six
    for number in range(4):
        a, b = (np.array(batches(number)["pictures"]) for batches in both)
        assert a.shape == b.shape
        assert not set(a[:, 0, 0, 0].tolist()) & set(b[:, 0, 0, 0].tolist())


def test_one_bucket_is_the_plain_permutation():
    order = Order(np.zeros(10, np.int64), 3, (7, 0))
    plain = np.random.default_rng((7, 0, 2)).permutation(10)
    assert order.batches == 3
    assert np.array_equal(np.concatenate([order.rows(2, i) for i in range(3)]), plain[:9])


def test_sizes_are_read_where_the_source_does_not_know_them(tmp_path):
    source = open_dataset(pretraining.config(tmp_path, VAE).datasets["data"])
    assert sizes(source) == [(16, 16)] * 12
    assert bucket_of(sizes(source), [(8, 16), (8, 8)]).tolist() == [1] * 12


# --- crops ---


def test_crops_are_of_the_grid_and_show_the_detail():
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:32, :32] = np.random.default_rng(0).integers(0, 256, (32, 32, 3))
    found = crops([picture], 32, 8, np.random.default_rng(1))
    assert [square.shape for square in found] == [(32, 32, 3)] * 4
    everywhere = [picture[y : y + 32, x : x + 32] for y in range(0, 33, 8) for x in range(0, 33, 8)]
    assert np.mean([s.std() for s in found]) > 1.2 * np.mean([s.std() for s in everywhere])
    places = {square.tobytes() for square in everywhere}
    assert all(square.tobytes() in places for square in found)


def test_a_share_of_the_batches_is_crops_with_as_many_pixels(tmp_path):
    batches = made(tmp_path, crop_size=16, crop_share=0.5)
    shapes = [batches(number)["pictures"].shape for number in range(60)]
    cropped = [shape[1:3] == (16, 16) and shape[0] != 3 for shape in shapes]
    assert {shape[0] for shape, is_crop in zip(shapes, cropped, strict=True) if is_crop} == {6, 12}
    assert 10 < sum(cropped) < 40  # those of 16x16 look whole
    again = made(tmp_path, crop_size=16, crop_share=0.5)
    assert np.array_equal(np.array(batches(7)["pictures"]), np.array(again(7)["pictures"]))


# --- drawn ---


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere.at_all:draw", "No module named 'nowhere'"),
        ("json:draw", "no attribute 'draw'"),
        (":", "Empty"),
    ],
)
def test_a_function_that_is_not_there_is_named(source, words):
    with pytest.raises(FluxError, match=words) as error:
        open_drawn(source)
    assert repr(source) in str(error.value)


def test_a_drawn_set_trains_with_muon_and_is_the_same_when_resumed(tmp_path):
    def run(folder: Path, stop_at: int | None = None, resume: bool = False) -> list[float]:
        def stop(stage, progress) -> None:
            if progress.global_step == stop_at:
                raise KeyboardInterrupt

        steps = [
            {**VAE, "max_steps": 8, "crop_size": 16, "crop_share": 0.5, "lr": 0.02},
            {"name": "flow", "train_diff": True, "train_text_encoders": True, "max_steps": 8, "lr": 0.02},
        ]
        muon = {"type": "Muon", "adamw_share": 0.2}
        decay = {"type": "warmup_decay", "warmup_steps": 2}
        groups = ("vae", "flow", "text_encoder")
        defaults = {
            "batch_size": 3,
            "compile": False,
            "optimization": {
                "optimizers": dict.fromkeys(groups, muon),
                "schedulers": dict.fromkeys(groups, decay),
            },
        }
        tables = pretraining.tables(
            folder,
            data={"img_sizes": [16, [16, 32], [32, 16], 32], "img_size": 16},
            training={"pipeline": {"defaults": defaults, "steps": steps}},
            output={"checkpoint_save_interval": 5},
            **DRAWN,
        )
        del tables["data"]["data_path"], tables["data"]["captions_file"]
        folder.mkdir(exist_ok=True)
        (folder / "c.json").write_text(json.dumps(tables))
        made = Run(validate.load(folder / "c.json"), resume=resume, quiet=True, hook=stop)
        if stop_at:
            with pytest.raises(KeyboardInterrupt):
                made.execute()
            return []
        made.execute()
        return [
            line["metrics"]["loss"]
            for name in ("vae", "flow")
            for line in read_lines(folder / f"run/graph/training_metrics_{name}.jsonl")
        ]

    straight = run(tmp_path / "a")
    run(tmp_path / "b", stop_at=7)
    run(tmp_path / "b", stop_at=14, resume=True)
    assert run(tmp_path / "b", resume=True) == straight
    assert len(straight) == 16
    assert straight[7] < straight[0]
    known = known_words.read(tmp_path / "b/run/model")
    assert known is not None
    assert known.of_prompt("number 7 of 99") == "words that the model was not trained on: of, 99"
    assert known.sides == (16, 32)


def test_muon_and_adamw_follow_one_rate():
    optimizer = Muon(adamw_share=0.25, adamw_layers=("edge",)).build(0.4)
    parameters = {"edge": mx.ones((2, 2)), "inner": mx.ones((2, 2)), "bias": mx.ones(2)}
    optimizer.init(parameters)
    assert [o.learning_rate.item() for o in optimizer.optimizers] == pytest.approx([0.1, 0.4])
    optimizer.learning_rate = 0.04
    assert [o.learning_rate.item() for o in optimizer.optimizers] == pytest.approx([0.01, 0.04])
    moved = optimizer.apply_gradients(parameters, parameters)
    assert mx.allclose(moved["edge"], mx.full((2, 2), 0.99), atol=1e-5).item()
    assert mx.allclose(moved["bias"], mx.full(2, 0.99), atol=1e-5).item()
    assert not mx.allclose(moved["inner"], mx.full((2, 2), 0.99), atol=1e-3).item()


def test_warm_up_hold_and_decay():
    schedule = WarmupDecay(warmup_steps=4, hold=0.5)
    factors = [schedule.factor(step, 24) for step in range(24)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])
    assert factors[4:15] == pytest.approx([1] * 11)
    assert factors[14:] == pytest.approx([(24 - step) / 10 for step in range(14, 24)])


# --- config ---


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"crop_size": 24}, "24 must be a multiple of 2, at most 16 pixels"),
        ({"crop_size": 9}, "9 must be a multiple of 2"),
        ({"crop_share": 0.5}, "crop_share has no effect without crop_size"),
        ({"optimization": {"optimizers": {"vae": {"type": "Muon", "adamw_share": 0}}}}, "0 must be above 0"),
    ],
)
def test_faults_of_crops_and_optimizers_are_named(tmp_path, step, words):
    with pytest.raises(ConfigError) as error:
        pretraining.config(tmp_path, {**VAE, **step})
    assert words in str(error.value)


def test_buckets_exclude_reduced_sizes(tmp_path):
    with pytest.raises(ConfigError, match="reduced_min_sizes: has no effect beside img_sizes"):
        pretraining.config(tmp_path, VAE, data={"img_sizes": [16, 32], "reduced_min_sizes": [8]})
