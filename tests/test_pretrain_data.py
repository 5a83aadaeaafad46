"""Where pictures and captions come from, and that batches are a function of the step."""

import io
import json
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flux.data.sources import open_folder, open_hugging_face
from flux.data.webdataset import open_shards, shards
from flux.errors import FluxError
from flux.training.pretrain import validate
from flux.training.pretrain.batches import Batches, Shard
from flux.training.pretrain.config import ConfigError
from flux.training.pretrain.datasets import open_dataset

from . import fuzzing, pretraining


def png(value: int, size: tuple[int, int] = (6, 4), mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    colour = (value, 0, 0) if mode == "RGB" else (value, 0, 0, 0)
    Image.new(mode, size, colour).save(file, "PNG")
    return file.getvalue()


# --- folders ---


def test_a_captions_file(tmp_path):
    folder = pretraining.write_pictures(tmp_path / "data", 3)
    source = open_folder(folder, "captions.tsv")
    assert source.captions == [f"a picture with the number {i}" for i in range(3)]
    assert source.picture(0).shape == (16, 16, 3)
    elsewhere = tmp_path / "mine.tsv"
    elsewhere.write_text("2.png\ttwo words\n\n0.png\tnull\n")
    assert open_folder(folder, str(elsewhere)).captions == ["two words", "null"]


def test_train_jsonl_and_caption_files(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(png(i))
        (tmp_path / f"{i}.txt").write_text(f"the {i}th\n")
    assert open_folder(tmp_path).captions == ["the 0th", "the 1th"]
    rows = [{"image": "1.png", "prompt": "one"}, {"file_name": "0.png", "text": "none"}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_folder(tmp_path)
    assert source.captions == ["one", "none"]
    assert source.picture(0)[0, 0].tolist() == [1, 0, 0]


def test_what_is_transparent_is_white(tmp_path):
    (tmp_path / "a.png").write_bytes(png(200, mode="RGBA"))
    (tmp_path / "a.txt").write_text("nothing")
    assert open_folder(tmp_path).picture(0).min() == 255


@pytest.mark.parametrize(
    ("files", "captions", "message"),
    [
        ({}, None, "no pictures"),
        ({"a.png": b"", "b.png": b"", "b.txt": b"x"}, None, r"no caption for .*a\.png"),
        ({"c.tsv": b"a.png a cat"}, "c.tsv", r"c\.tsv: its first line should name the columns"),
        ({"c.tsv": b"a.png\ta cat\nb.png a dog"}, "c.tsv", r"c\.tsv, line 2: should be one object"),
        ({"c.tsv": b"a.png\ta cat"}, "c.tsv", r"no picture .*a\.png"),
        ({"c.tsv": b""}, "c.tsv", "lists no pictures"),
        ({}, "c.tsv", r"c\.tsv: cannot be read"),
        ({"train.jsonl": b'{"image": "a.png"}'}, None, r"no caption for .*a\.png.*; no picture .*a\.png"),
        ({"train.jsonl": b"[]"}, None, r"train\.jsonl: lists no pictures"),
    ],
)
def test_a_folder_with_a_fault(tmp_path, files, captions, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(FluxError, match=message):
        open_folder(tmp_path, captions)


# --- shards ---


def write_shard(path: Path, members: dict[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


@pytest.fixture
def two_shards(tmp_path) -> Path:
    write_shard(
        tmp_path / "train-000.tar",
        {"a/1.png": png(10), "a/1.txt": b"ten\n", "a/1.json": b'{"prompt": "10"}', "b/1.txt": b"no picture"},
    )
    write_shard(
        tmp_path / "train-001.tar",
        {
            "2.json": b'{"prompt": "20"}',
            "2.txt": b"twenty",
            "2.jpg": png(20),
            "3.png": png(30),
            "3.txt": b"30",
        },
    )
    return tmp_path


def test_shards(two_shards):
    source = open_shards(str(two_shards / "train-{000..001}.tar"), "jpg;png", "txt")
    assert source.captions == ["ten", "twenty", "30"]
    assert [source.picture(i)[0, 0, 0] for i in (2, 0, 1)] == [30, 10, 20]
    assert source.picture(0).shape == (4, 6, 3)
    assert open_shards(str(two_shards / "*.tar"), "jpg", "prompt").captions == ["20"]
    assert open_shards([str(two_shards / "train-000.tar")], "png", "prompt").captions == ["10"]


def test_shards_with_a_fault(two_shards):
    with pytest.raises(FluxError, match=r"train-001\.tar: the sample /3 has no caption 'prompt'"):
        open_shards(str(two_shards / "*.tar"), "png", "prompt")
    with pytest.raises(FluxError, match=r"no shard .*train-002\.tar"):
        shards([str(two_shards / "train-{000..002}.tar")])
    with pytest.raises(FluxError, match="no samples with a picture"):
        open_shards(str(two_shards / "*.tar"), "gif", "txt")
    write_shard(two_shards / "packed.tar", {"1.png": png(1)}, "w:gz")
    with pytest.raises(FluxError, match=r"packed\.tar: not an uncompressed tar file"):
        open_shards(str(two_shards / "packed.tar"), "png", "txt")
    with pytest.raises(FluxError, match="names too many shards"):
        shards(["x-{0..9999999999}.tar"])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b"[" * 100_000, "nested 100000 deep"),
        (b'{"prompt": "a", "prompt": "b"}', "the key 'prompt' comes twice"),
        (b'{"prompt": "\\ud800"}', "half of a surrogate pair"),
        (b'{"prompt": ["a"]}', "has no caption 'prompt'"),
        (b'{"prompt": "' + b"a" * 2**20 + b'"}', "1048576 are the most that is read"),
    ],
    ids=range(5),
)
def test_captions_of_shards_from_strangers(tmp_path, text, line):
    write_shard(tmp_path / "a.tar", {"1.png": png(1), "1.json": text})
    with pytest.raises(FluxError, match=line):
        open_shards(str(tmp_path / "a.tar"), "png", "prompt")


# --- Hugging Face ---


def test_a_saved_data_set_of_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets")
    pictures = [Image.new("RGB", (5, 3), (i, 0, 0)) for i in range(3)]
    table = datasets.Dataset.from_dict({"image": pictures, "text": ["a", "b", "c"], "n": [1, 2, 3]})
    table.save_to_disk(tmp_path / "set")
    source = open_hugging_face(str(tmp_path / "set"), None, "train", "image", "text")
    assert list(source.captions) == ["a", "b", "c"]
    assert source.picture(2).shape == (3, 5, 3)
    assert source.picture(2)[0, 0].tolist() == [2, 0, 0]
    with pytest.raises(FluxError, match="has no column 'caption'; it has image, text, n"):
        open_hugging_face(str(tmp_path / "set"), None, "train", "image", "caption")
    with pytest.raises(FluxError, match="no column 'n' that holds pictures"):
        open_hugging_face(str(tmp_path / "set"), None, "train", "n", "text")
    with pytest.raises(FluxError, match="the data set nobody/nothing, split 'train', cannot be loaded"):
        open_hugging_face("nobody/nothing", None, "train", "image", "text")


def test_a_saved_data_set_that_is_damaged(tmp_path):
    """40 of its files: each is a line, or the captions as they were."""
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"image": [Image.new("RGB", (5, 3))], "text": ["a"]})
    table.save_to_disk(tmp_path / "set")
    sound = {name: (tmp_path / "set" / name).read_bytes() for name in ("state.json", "dataset_info.json")}
    lines = 0
    for case in range(40):
        rng = random.Random(case)
        name = rng.choice(list(sound))
        (tmp_path / "set" / name).write_bytes(fuzzing.mutate_json(json.loads(sound[name]), rng))
        arguments = str(tmp_path / "set"), None, "train", "image", "text"
        found = fuzzing.outcome(lambda: open_hugging_face(*arguments).captions, f"case {case}")  # noqa: B023
        assert isinstance(found, FluxError) or found == ["a"], f"case {case}"
        lines += isinstance(found, FluxError)
        (tmp_path / "set" / name).write_bytes(sound[name])
    assert 10 < lines < 40


# --- batches ---

VAE = {"name": "vae", "train_vae": True, "max_steps": 6}


def make(folder: Path, shard: Shard | None = None, **sections) -> Batches:
    shard = shard or Shard()
    config = pretraining.config(folder, VAE, **sections)
    return Batches(config, 0, open_dataset(config.datasets["data"]), None, shard)


def numbers(batches: Batches, step: int) -> list[int]:
    return [int(text.split()[-1]) for text in batches.texts(step) if text]


def test_an_epoch_is_every_picture_once_and_the_next_one_another_order(tmp_path):
    batches = make(
        tmp_path, training={"pipeline": {"steps": [{**VAE, "cfg_dropout_prob": 0, "batch_size": 4}]}}
    )
    assert batches.epoch_length == 3
    epochs = [[n for step in range(3 * e, 3 * e + 3) for n in numbers(batches, step)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    assert epochs[0] != epochs[1]


def test_a_batch_depends_on_its_step_alone(tmp_path):
    straight = make(tmp_path, training={"workers": 0})
    threaded = make(tmp_path, training={"workers": 3})
    expected = {step: np.array(straight(step)["pictures"]) for step in range(7)}
    for step in (0, 1, 2, 5, 6, 3):  # a jump is what a resume does
        assert np.array_equal(np.array(threaded(step)["pictures"]), expected[step])
    assert not np.array_equal(expected[0], expected[1])
    threaded.close()


def test_processes_shard_an_epoch(tmp_path):
    steps = {"pipeline": {"steps": [{**VAE, "cfg_dropout_prob": 0, "batch_size": 3}]}}
    both = [make(tmp_path, Shard(rank, 2), training=steps) for rank in range(2)]
    assert both[0].epoch_length == 2
    seen = [n for step in range(2) for batches in both for n in numbers(batches, step)]
    assert sorted(seen) == list(range(12))


def test_reduced_sizes_and_the_prompt_prefix(tmp_path):
    batches = make(tmp_path, data={"reduced_min_sizes": [8], "fixed_prompt_prefix": "an icon, "})
    sides = {batches(step)["pictures"].shape[1:3] for step in range(10)}
    assert sides == {(16, 16), (8, 8)}
    assert all(text.startswith("an icon, a picture") for text in batches.texts(0) if text)


def test_one_of_several_captions_is_drawn_each_epoch(tmp_path):
    folder = pretraining.write_pictures(tmp_path / "data")
    rows = [{"image": f"{i}.png", "prompt": [f"a {i}", f"b {i}"]} for i in range(12)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    steps = {"pipeline": {"steps": [{**VAE, "cfg_dropout_prob": 0, "batch_size": 4}]}}

    def texts(shard=None) -> list[list[str]]:
        batches = make(tmp_path, shard, training=steps, data={"captions_file": "train.jsonl"})
        assert len(batches._source.captions) == 24, "both are in the vocabulary"
        return [batches.texts(step) for step in range(9)]

    straight = texts()
    assert straight == texts()
    assert {text for batch in straight for text in batch} > {"a 0"}
    epochs = [sorted(text for batch in straight[3 * e : 3 * e + 3] for text in batch) for e in range(3)]
    assert all(sorted(int(text.split()[1]) for text in epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    shared_out = [text for rank in range(3) for batch in texts(Shard(rank, 3))[:1] for text in batch]
    assert sorted(shared_out) == epochs[0], "whoever draws it, in whatever batch"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_everything_wrong_with_the_data_in_one_go(tmp_path):
    """A wrong key hides no picture, a picture no other, and a data set no other."""
    folder = pretraining.write_pictures(tmp_path / "data", 3)
    (folder / "1.png").write_bytes(b"no picture")
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:60])
    (tmp_path / "empty").mkdir()

    def faults(**step) -> list[str]:
        sets = {"b": {"type": "local", "path": str(tmp_path / "empty")}}
        tables = pretraining.tables(tmp_path, {**VAE, **step}, datasets=sets) | {"default_dataset": "data"}
        (tmp_path / "c.json").write_text(json.dumps(tables))
        with pytest.raises(ConfigError) as error:
            validate.load(tmp_path / "c.json", decode=True)
        return error.value.faults

    data = [
        "empty: no pictures in it",
        "1.png is not a picture",
        "2.png: ",
        "3 pictures are less than a batch of 4",
    ]
    found = faults()
    assert len(found) == len(data)
    assert all(any(words in fault for fault in found) for words in data)
    found = faults(lr=-1)
    assert all(any(words in fault for fault in found) for words in [*data[:3], "-1 must be above 0"])


def test_too_few_pictures_for_a_batch(tmp_path):
    steps = {"pipeline": {"steps": [{**VAE, "batch_size": 8}]}}
    with pytest.raises(FluxError, match='step "vae": 12 pictures cannot fill a batch of 8 for each of 2'):
        make(tmp_path, Shard(0, 2), training=steps)
