"""Data sets from every source become the samples that their files describe; what is wrong is named."""

import json
import re
import sys

import pytest

from flux.data import batches, check, samples, schema
from flux.errors import FluxError
from flux.tables import Faults
from tests.datasets import OPTIONS, two_concepts, write_pictures, write_toml


def texts(dataset):
    return {sample.name.rsplit("/", 1)[-1]: sample.text for sample in dataset.samples}


# --- Lists and folders ---


@pytest.mark.parametrize("key", ["prompt", "text"])
def test_lists_of_both_ages_and_spellings(tmp_path, key):
    rows = [{"image": "b.png", key: "a “dog” 犬"}, {"image": "sub/a.png", key: ""}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    new = samples.load(tmp_path, OPTIONS)
    assert [s.picture for s in new.samples] == [tmp_path / "b.png", tmp_path / "sub/a.png"]
    assert [s.text for s in new.samples] == ["a “dog” 犬", ""]
    assert len(new.errors) == 1
    assert "1 without a caption" in new.errors[0]
    assert "sub/a.png" in new.errors[0]
    assert samples.load(tmp_path / "train.jsonl", OPTIONS).samples == new.samples
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "index.json").write_text(json.dumps({"data": rows}))
    assert samples.load(tmp_path, OPTIONS).samples == new.samples


def test_a_list_goes_before_the_folders_pictures(tmp_path):
    write_pictures(tmp_path, {"a.png": (64, 64), "b.png": (64, 64)})
    (tmp_path / "train.jsonl").write_text('{"image": "b.png", "prompt": "x"}')
    (tmp_path / "index.json").write_text('{"data": [{"image": "a.png", "text": "y"}]}')
    assert texts(samples.load(tmp_path, OPTIONS)) == {"b.png": "x"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "train.jsonl",
            'x\n{"image": "a.png", "prompt": "x"}\n[]\n{"prompt": "x"}',
            "line 1, line 3: should be",
        ),
        ("train.jsonl", '\n{"image": 3, "prompt": "x"}', "line 2: names no picture"),
        ("train.jsonl", '{"image": "a.png", "prompt": 3}', "line 1: prompt should be a text"),
        ("train.jsonl", '{"image": "https://x.org/a.png", "prompt": "x"}', "line 1: .* is an address"),
        ("train.jsonl", "\n", "no pictures"),
        ("train.jsonl", '{"image": "a.png", "prompt": "x\\u0000"}\0', "NUL"),
        ("index.json", '{"data": [{"image": "a.png", "text": "x"}, 5]}', "entry 2"),
        ("index.json", "{", '"data"'),
        ("metadata.csv", "name;text\na.png;x\n", "should name the columns"),
        ("metadata.csv", "file_name,text\na.png,x,y\n", "line 2: has more values than"),
        ("metadata.csv", 'file_name,text\na.png,"x\n', "cannot be read as CSV"),
        ("metadata.jsonl", '{"file_name": "a.png", "prompt_text": "x"}', "it has file_name, prompt_text"),
        ("metadata.parquet", "no parquet", "cannot be read as parquet"),
    ],
)
def test_faulty_lists(tmp_path, name, text, message):
    """All faults of a list, and the pictures beside it, at once."""
    (tmp_path / name).write_text(text)
    found = samples.load(tmp_path, OPTIONS)
    assert re.search(message, found.errors[0])
    assert str(tmp_path / name) in found.errors[0]
    with pytest.raises(FluxError, match=message):
        batches.Plan(found, 0)


def test_a_list_that_is_no_utf8(tmp_path):
    (tmp_path / "train.jsonl").write_bytes('{"image": "a.png", "prompt": "Ärger"}'.encode("latin-1"))
    assert "UTF-8" in samples.load(tmp_path, OPTIONS).errors[0]


def test_a_bare_folder(tmp_path):
    names = ("b.JPG", "a.png", "c.webp", "d.png")
    write_pictures(tmp_path, dict.fromkeys(names, (64, 64)))
    (tmp_path / "a.txt").write_text("\ufeffa cat\n", encoding="utf-8")
    (tmp_path / "b.caption").write_text("a dog")
    (tmp_path / "b.txt").write_text("not this one")
    (tmp_path / "c.txt").write_text("")
    (tmp_path / ".hidden.png").write_bytes(b"")
    dataset = samples.load(tmp_path, {**OPTIONS, "class_tokens": "sks pet"})
    expected = {"a.png": "a cat", "b.JPG": "a dog", "c.webp": "sks pet", "d.png": "sks pet"}
    assert texts(dataset) == expected
    assert list(texts(dataset)) == sorted(expected)
    empty, unused = dataset.warnings
    assert empty.startswith("caption files without a caption")
    assert "c.txt" in empty
    assert "b.txt" in unused
    only_txt = samples.load(tmp_path, {**OPTIONS, "caption_extension": "txt"})
    assert texts(only_txt)["b.JPG"] == "not this one"


def test_warnings_of_a_folder(tmp_path):
    write_pictures(tmp_path, {"a.png": (64, 64)})
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.txt").write_text("of a picture that is gone")
    (tmp_path / "c.HEIC").write_bytes(b"")
    first, second = samples.load(tmp_path, OPTIONS).warnings
    assert "c.HEIC" in first
    assert "b.txt" in second
    assert "a.txt" not in second


def test_sources_that_are_none(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for source in ("a.zip", "empty", "absent", "no/such/folder", "flux_data/data.toml"):
        where = tmp_path / source if source in ("a.zip", "empty") else source
        with pytest.raises(FluxError, match=source):
            samples.load(where, OPTIONS)


def test_options_of_the_command_line(tmp_path):
    write_pictures(tmp_path, {"a.png": (64, 64)})
    dataset = samples.load(tmp_path, {"resolution": (32, 96), "num_repeats": 5, "class_tokens": None})
    assert dataset.groups[0].resolution == (32, 96)
    assert dataset.samples[0].subset.num_repeats == 5
    with pytest.raises(FluxError, match="resolution is missing"):
        samples.load(tmp_path, {})
    with pytest.raises(FluxError, match=r"'num_repeat'; did you mean 'num_repeats'"):
        samples.load(tmp_path, {**OPTIONS, "num_repeat": 5})
    with pytest.raises(FluxError, match="resolution: 100 must be a multiple of 16"):
        samples.load(tmp_path, {"resolution": (64, 100)})


# --- data.toml ---

TOML = """
[general]
shuffle_caption = true
caption_prefix = "general"
keep_tokens = 1
num_repeats = 7
[[datasets]]
resolution = [96, 64]
keep_tokens = 2
caption_suffix = "dataset"
[[datasets.subsets]]
image_dir = "a"
keep_tokens = 3
shuffle_caption = false
[[datasets.subsets]]
image_dir = "b"
[[datasets]]
resolution = 128
batch_size = 3
[[datasets.subsets]]
image_dir = "a"
"""


def test_lookup_order(tmp_path):
    for name in "ab":
        write_pictures(tmp_path / name, {f"{name}.png": (64, 64)})
    command_line = {
        "resolution": (16, 16),
        "num_repeats": 9,
        "flip_aug": True,
        "batch_size": 2,
        "caption_prefix": "command line",
    }
    dataset = samples.load(write_toml(tmp_path, TOML), command_line)
    assert [group.resolution for group in dataset.groups] == [(64, 96), (128, 128)]  # [w, h] -> (h, w)
    assert [group.batch_size for group in dataset.groups] == [2, 3]
    first, second, third = (sample.subset for sample in dataset.samples)
    assert [sample.group for sample in dataset.samples] == [0, 0, 1]
    assert [first.keep_tokens, second.keep_tokens, third.keep_tokens] == [3, 2, 1]
    assert [first.shuffle_caption, second.shuffle_caption, third.shuffle_caption] == [False, True, True]
    assert [first.caption_suffix, third.caption_suffix] == ["dataset", ""]
    assert {s.num_repeats for s in (first, second, third)} == {7}
    assert {s.caption_prefix for s in (first, second, third)} == {"general"}
    assert all(s.flip_aug and s.caption_separator == "," for s in (first, second, third))


def test_every_key_of_the_schema_is_taken_and_checked():
    """The whole schema of the spec: a key that is missing here would be refused in a user's file."""
    dataset = {
        "resolution": 512,
        "batch_size": 2,
        "enable_bucket": True,
        "min_bucket_reso": 128,
        "max_bucket_reso": 2048,
        "bucket_reso_steps": 32,
        "bucket_no_upscale": True,
    }
    subset = {
        "num_repeats": 2,
        "class_tokens": "x",
        "is_reg": True,
        "caption_extension": ".txt",
        "shuffle_caption": True,
        "keep_tokens": 1,
        "caption_separator": ";",
        "keep_tokens_separator": "|||",
        "caption_prefix": "p",
        "caption_suffix": "s",
        "enable_wildcard": True,
        "flip_aug": True,
        "color_aug": True,
        "random_crop": True,
        "caption_dropout_rate": 0.1,
        "caption_tag_dropout_rate": 1,
        "caption_dropout_every_n_epochs": 2,
        "alpha_mask": True,
        "validation_split": 0.5,
        "validation_seed": 3,
        "caption_column": "x",
        "uncaptioned": True,
        "mask_dir": "m",
        "mask_floor": 0.25,
    }
    assert set(schema.GROUP) == set(dataset)
    assert set(schema.SUBSET) == set(subset)
    document = {"datasets": [{**dataset, "subsets": [{"image_dir": "a", **subset}]}]}
    faults = Faults()
    (group,), (source,) = schema.parse(document, {}, faults)
    assert not faults.lines
    assert vars(group) == {**dataset, "resolution": (512, 512)}
    assert vars(source.subset) == subset
    for table, values in (
        (document["datasets"][0], dataset),
        (document["datasets"][0]["subsets"][0], subset),
    ):
        for key, value in values.items():
            filled = ("caption_extension", "caption_separator", "caption_column", "mask_dir")
            for wrong in ([], {}, -1, 1.5, "" if key in filled else []):
                table[key] = wrong
                faults = Faults()
                schema.parse(document, {}, faults)
                assert any(f".{key}: " in line for line in faults.lines), (key, wrong)
            table[key] = value


@pytest.mark.parametrize(
    ("before", "after", "messages"),
    [
        (
            "keep_tokens = 3",
            "keep_token = 3",
            ["subset 1: unknown key 'keep_token'; did you mean 'keep_tokens'"],
        ),
        ("batch_size = 3", "batchsize = 3", ["[[datasets]] 2: unknown key 'batchsize'", "'batch_size'"]),
        ("num_repeats = 7", "repeats = 7", ["[general]: unknown key 'repeats'"]),
        (
            "keep_tokens = 3",
            "batch_size = 3",
            ["subset 1: batch_size belongs into [[datasets]] or [general]"],
        ),
        ("[general]", "[generel]", ["unknown key 'generel'", "'general'"]),
        (
            "keep_tokens = 2",
            'keep_tokens = "2"',
            ["[[datasets]] 1.keep_tokens: must be a whole number, not '2'"],
        ),
        ("resolution = 128", "", ["[[datasets]] 2: resolution is missing"]),
        ("resolution = 128", "resolution = 100", ["[[datasets]] 2.resolution: 100 must be a multiple of 16"]),
        ('image_dir = "b"', "", ["subset 2: image_dir"]),
        ("resolution = 128", "resolution = 128\nenable_bucket = true", ["min_bucket_reso 256 is above"]),
        ("resolution = 128", "resolution = 2048\nenable_bucket = true", ["max_bucket_reso 1024 is below"]),
        ("batch_size = 3", "batch_size = [", ["data.toml"]),
        ('image_dir = "b"', 'image_dir = "c"', ["no folder image_dir = 'c'"]),
    ],
)
def test_faulty_toml(tmp_path, before, after, messages):
    for name in "ab":
        write_pictures(tmp_path / name, {f"{name}.png": (64, 64)})
    assert before in TOML
    toml = write_toml(tmp_path, TOML.replace(before, after))
    if messages == ["data.toml"]:  # no TOML at all
        with pytest.raises(FluxError, match=r"data\.toml"):
            samples.load(toml, {})
        return
    errors = "\n".join(samples.load(toml, {"class_tokens": "x"}).errors)
    assert errors.startswith(str(toml))
    for message in messages:
        assert message in errors


def test_all_faults_of_a_toml_at_once():
    table = {"resolutoin": 64, "subsets": [{"image_dir": "a", "flip_agu": 1}, {"num_repeats": 0}]}
    faults = Faults()
    schema.parse({"datasets": [table]}, {"resolution": (64, 64)}, faults)
    assert faults.lines == [
        "[[datasets]] 1: unknown key 'resolutoin'; did you mean 'resolution'?",
        "[[datasets]] 1, subset 1: unknown key 'flip_agu'; did you mean 'flip_aug'?",
        "[[datasets]] 1, subset 2.num_repeats: 0 must be at least 1",
        "[[datasets]] 1, subset 2: image_dir, the folder of its pictures, is missing",
    ]
    for empty in ({}, {"datasets": []}, {"datasets": [{"resolution": 64}]}):
        faults = Faults()
        schema.parse(empty, {}, faults)
        assert "at least one such table" in faults.lines[0]


def test_a_faulty_toml_does_not_hide_bad_pictures(tmp_path):
    write_pictures(tmp_path / "a", {"a.png": (64, 64)})
    (tmp_path / "a/b.png").write_bytes(b"no picture")
    text = "[[datasets]]\nresolution = 64\nbatchsize = 2\n"
    text += '[[datasets.subsets]]\nimage_dir = "a"\nnum_repeats = 0\n'
    text += '[[datasets.subsets]]\nimage_dir = "gone"\n'
    report = check.check(samples.load(write_toml(tmp_path, text), {}))
    words = ("batchsize", "num_repeats", "'gone'", "2 without a caption", "b.png is not a picture")
    assert len(report.errors) == len(words)
    for word, error in zip(words, report.errors, strict=True):
        assert word in error


def test_python_without_toml(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tomllib", None)
    monkeypatch.setitem(sys.modules, "tomli", None)
    with pytest.raises(FluxError, match=r"Python 3\.11"):
        samples.load(write_toml(tmp_path, TOML), {})


def test_where_a_toml_finds_its_folders(tmp_path, monkeypatch):
    write_pictures(tmp_path / "set/flux_data/toy", {"a.png": (64, 64)})
    text = '[[datasets]]\nresolution=64\n[[datasets.subsets]]\nimage_dir="flux_data/toy"\n'
    toml = write_toml(tmp_path / "set/flux_data", text)
    here = tmp_path / "elsewhere"
    here.mkdir()
    monkeypatch.chdir(here)
    assert samples.load(toml, {}).samples[0].picture.resolve() == (tmp_path / "set/flux_data/toy/a.png")
    (tmp_path / "set/flux_data").rename(tmp_path / "set/moved")
    moved = samples.load(tmp_path / "set/moved/data.toml", {})
    assert moved.samples[0].picture.resolve() == tmp_path / "set/moved/toy/a.png"
    write_pictures(here / "flux_data/toy", {"here.png": (64, 64)})
    assert samples.load(tmp_path / "set/moved", {}).samples[0].name.endswith("here.png")


def test_validation_split(tmp_path):
    write_pictures(tmp_path / "a", {f"{i}.png": (64, 64) for i in range(10)})
    write_pictures(tmp_path / "r", {f"{i}.png": (64, 64) for i in range(4)})
    text = """[[datasets]]
resolution = 64
validation_split = 0.3
[[datasets.subsets]]
image_dir = "a"
[[datasets.subsets]]
image_dir = "r"
is_reg = true
"""
    toml = write_toml(tmp_path, text)
    dataset = samples.load(toml, {})
    assert len(dataset.validation) == 3
    assert len(dataset.samples) == 7 + 4
    assert not set(dataset.validation) & set(dataset.samples)
    assert samples.load(toml, {}).validation == dataset.validation
    assert samples.load(toml, {"validation_seed": 1}).validation != dataset.validation
    rounded = samples.load(write_toml(tmp_path, text.replace("0.3", "0.28")), {})
    assert len(rounded.validation) == 3
    assert "leaves nothing" in samples.load(write_toml(tmp_path, text.replace("0.3", "1.0")), {}).errors[0]
    of_subset = text.replace("validation_split = 0.3\n", "").replace('"a"', '"a"\nvalidation_split = 0.3')
    assert len(samples.load(write_toml(tmp_path, of_subset), {}).validation) == 3


def test_only_regularisation_is_refused(tmp_path):
    write_pictures(tmp_path, {"a.png": (64, 64)})
    assert "nothing to learn" in samples.load(tmp_path, {**OPTIONS, "is_reg": True}).errors[-1]


# --- The Hub ---


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A data set as `datasets` gives it, with a repository's name."""
    package = pytest.importorskip("datasets")
    write_pictures(tmp_path / "hub", {"a.png": (64, 80), "b.jpg": (32, 32)})
    content = [(tmp_path / "hub" / name).read_bytes() for name in ("a.png", "b.jpg")]
    columns = {"image": [{"bytes": each, "path": None} for each in content], "prompt": ["one", None]}
    types = {"image": package.Image(), "prompt": package.Value("string")}
    table = package.Dataset.from_dict(columns, features=package.Features(types))
    monkeypatch.setattr(
        package, "load_dataset", lambda repo, name, split: {("me/set", "train"): table}[repo, split]
    )
    return content


def test_hugging_face(hub):
    dataset = samples.load("me/set", {**OPTIONS, "class_tokens": "fallback"})
    assert [sample.text for sample in dataset.samples] == ["one", "fallback"]
    assert [sample.picture for sample in dataset.samples] == hub
    assert [placed.size for placed in batches.Plan(dataset, 0).placed] == [(64, 80), (32, 32)]


def test_a_table_that_was_saved(hub, tmp_path):
    import datasets as package

    package.load_dataset("me/set", None, split="train").save_to_disk(tmp_path / "saved")
    dataset = samples.load(tmp_path / "saved", OPTIONS)
    assert [sample.text for sample in dataset.samples] == ["one", ""]
    assert [sample.picture for sample in dataset.samples] == hub


def test_hugging_face_refuses_other_columns(monkeypatch):
    package = pytest.importorskip("datasets")
    table = package.Dataset.from_dict({"image": ["a.png"], "prompt": ["x"]})
    monkeypatch.setattr(package, "load_dataset", lambda repo, name, split: table)
    with pytest.raises(
        FluxError, match=r"me/set: no column `image` that holds pictures; it has image, prompt"
    ):
        samples.load("me/set", OPTIONS)


def test_hugging_face_out_of_reach(monkeypatch):
    package = pytest.importorskip("datasets")

    def refuse(repo, name, split):
        raise package.exceptions.DatasetNotFoundError(f"Dataset '{repo}' doesn't exist")

    monkeypatch.setattr(package, "load_dataset", refuse)
    with pytest.raises(FluxError, match="me/none, split 'train', cannot be loaded: Dataset"):
        samples.load("me/none", OPTIONS)


# --- The two-concept set ---


def test_two_concepts(shared, tmp_path, monkeypatch):
    two_concepts(shared, tmp_path)
    monkeypatch.chdir(tmp_path)
    dataset = samples.load("flux_data/data.toml", {})
    assert len(dataset.samples) == 13
    assert not dataset.warnings
    by_class = {"tjtoy toy": (6, 1), "sparkgpu gpu": (7, 2)}
    for text, (count, repeats) in by_class.items():
        own = [sample.subset for sample in dataset.samples if sample.text == text]
        assert len(own) == count
        assert {(s.num_repeats, s.flip_aug, s.is_reg, s.keep_tokens) for s in own} == {
            (repeats, True, False, 2)
        }
    report = check.check(dataset)
    assert not report.errors
    assert report.samples_per_epoch == report.steps_per_epoch == 20
    assert report.captions == {"tjtoy toy": 6, "sparkgpu gpu": 14}
    assert [(row.height, row.width, row.samples) for row in report.buckets] == [(1024, 1024, 20)]
    moved = samples.load(shared / "data/two_concepts/data.toml", {})  # not where its image_dir says
    assert [sample.text for sample in moved.samples] == [sample.text for sample in dataset.samples]
