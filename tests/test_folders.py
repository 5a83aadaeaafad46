"""One reader: every kind of data set gives the same captions to fine-tuning, pretraining and captioning."""

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flux.captioning import files, records
from flux.data import batches, check, lists, pictures, samples
from flux.data.sources import open_folder
from flux.errors import FluxError
from tests import kinds
from tests.datasets import OPTIONS, write_toml
from tests.kinds import draw, lines, write


def names(folder: Path, found: dict) -> dict[str, tuple[str, ...]]:
    return {Path(name).relative_to(folder).as_posix(): tuple(texts) for name, texts in found.items()}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", kinds.KINDS, ids=lambda kind: kind.__name__)
def test_all_programs_find_the_same_captions(tmp_path, kind):
    expected = kind(tmp_path)
    dataset = samples.load(tmp_path, OPTIONS)
    assert not dataset.errors
    assert names(tmp_path, {sample.name: sample.texts for sample in dataset.samples}) == expected
    assert batches.Plan(dataset, 0).batches_per_epoch >= len(expected)
    source = open_folder(tmp_path)
    assert names(tmp_path, dict(zip(source.names, source.of_each, strict=True))) == expected
    assert source.picture(0).shape == (64, 64, 3)
    if kind is kinds.kohya:  # the class of a folder is no caption that was written
        return
    found = [picture for picture in files.find([tmp_path]) if "test" not in picture.name]
    captions = records.read_elsewhere(found)
    firsts = {name: texts[0] for name, texts in expected.items()}
    assert {picture.name: captions[picture] for picture in found} == firsts


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("format", records.FORMATS)
@pytest.mark.parametrize("kind", [kinds.sub_folders, kinds.caption_files, kinds.unicode_names])
def test_what_caption_py_writes_the_trainer_reads(tmp_path, format, kind):
    """In every form; what was there in another one is carried over."""
    expected = kind(tmp_path)
    found = files.find([tmp_path])
    before = records.read_elsewhere(found)
    records.write(before, format, overwrite=True)
    assert records.read(found, format) == before
    texts = {sample.name: sample.texts for sample in samples.load(tmp_path, OPTIONS).samples}
    assert names(tmp_path, texts) == expected


def test_repeats_and_classes_of_kohyas_folders(tmp_path):
    kinds.kohya(tmp_path)
    draw(tmp_path / "reg/1_dog/r.png", 9)
    dataset = samples.load(tmp_path, {**OPTIONS, "num_repeats": 5, "class_tokens": "not this"})
    repeats = {Path(sample.name).name: sample.subset.num_repeats for sample in dataset.samples}
    assert repeats == {"a.png": 10, "b.png": 10, "c.png": 2, "r.png": 1}
    assert {Path(s.name).name for s in dataset.samples if s.subset.is_reg} == {"r.png"}
    assert any("10_sks dog: 10 repeats, class 'sks dog'" in note for note in dataset.warnings)
    inner = samples.load(tmp_path / "img/10_sks dog", OPTIONS)  # the folder itself is no set of folders
    assert {sample.subset.num_repeats for sample in inner.samples} == {1}
    assert "1 without a caption" in inner.errors[0]
    assert any("10 repeats of 'sks dog'" in note for note in inner.warnings)
    (tmp_path / "img/2_cat").rename(tmp_path / "img/2024_cat")  # a year
    years = samples.load(tmp_path / "img", {**OPTIONS, "class_tokens": "x"})
    assert [s.subset.num_repeats for s in years.samples if s.name.endswith("c.png")] == [1]


def test_names_that_unicode_writes_in_two_ways_are_two_files(tmp_path):
    for i, form in enumerate(("NFC", "NFD")):
        draw(tmp_path / unicodedata.normalize(form, "é.png"), i)
        draw(tmp_path / unicodedata.normalize(form, "ü") / "a.png", i + 2)
    assert len(samples.load(tmp_path, {**OPTIONS, "class_tokens": "x"}).samples) == 4


def test_what_is_not_used_is_named(tmp_path):
    """Everything that lies in a folder, and the reason."""
    for i, name in enumerate(("a.png", "b.png", "b.jpg", "c.png", "d.png")):
        draw(tmp_path / name, i)
    write(tmp_path / "a.caption", "x")
    write(tmp_path / "a.txt", "not this one")
    write(tmp_path / "b.txt", "of two")
    write(tmp_path / "c.captions", "x")
    write(tmp_path / "d.txt", "  \n")
    write(tmp_path / "gone.txt", "x")
    write(tmp_path / "mine.csv", "file;caption\n")
    write(tmp_path / "e.heic", "x")
    (tmp_path / "folder.jpg").mkdir()
    os.symlink(tmp_path / "nowhere.png", tmp_path / "link.png")
    dataset = samples.load(tmp_path, OPTIONS)
    notes = "\n".join(dataset.warnings)
    for words in (
        "b.txt is the caption of",
        "other captions of the same pictures go first: " + str(tmp_path / "a.txt"),
        "only .caption, .txt, .json are: " + str(tmp_path / "c.captions"),
        "caption files without a caption: " + str(tmp_path / "d.txt"),
        "captions without a picture: " + str(tmp_path / "gone.txt"),
        "not read as a list",
        "e.heic has a format that is not read here",
        "folder.jpg is a folder, not a picture",
        "link.png is a link to nothing",
    ):
        assert words in notes
    (error,) = dataset.errors
    assert "2 without a caption" in error
    assert "c.png" in error
    assert "d.png" in error


def test_what_lies_beside_a_list(tmp_path):
    for i, name in enumerate(("a.png", "b.png", "sub/c.png")):
        draw(tmp_path / name, i)
    lines(tmp_path / "train.jsonl", {"image": "a.png", "prompt": "x"})
    lines(tmp_path / "metadata.jsonl", {"file_name": "b.png", "text": "y"})
    write(tmp_path / "a.txt", "z")
    dataset = samples.load(tmp_path, OPTIONS)
    notes = "\n".join(dataset.warnings)
    assert not dataset.errors
    assert f"not in {tmp_path}/train.jsonl, and not used: {tmp_path}/b.png, {tmp_path}/sub/c.png" in notes
    assert f"train.jsonl goes first: {tmp_path}/metadata.jsonl" in notes
    assert f"other captions of the same pictures go first: {tmp_path}/a.txt" in notes


def test_however_a_path_is_written(tmp_path, monkeypatch):
    """Relative, with dots, through a link: what is used is not named as unused."""
    draw(tmp_path / "set/a.png")
    write(tmp_path / "set/a.txt", "x")
    draw(tmp_path / "set/sub/b.png", 1)
    write(tmp_path / "set/sub/b.txt", "y")
    os.symlink(tmp_path / "set", tmp_path / "link")
    monkeypatch.chdir(tmp_path)
    for source in ("set", "./set/", "set/sub/..", "link", str(tmp_path / "set")):
        dataset = samples.load(source, OPTIONS)
        assert [sample.text for sample in dataset.samples] == ["x", "y"]
        assert not [note for note in dataset.warnings if "not used" in note], source
    lines(
        tmp_path / "set/list.jsonl",
        {"image": "./sub/../a.png", "prompt": "z"},
        {"image": "sub//b.png", "prompt": "w"},
    )
    (note,) = samples.load("set/list.jsonl", OPTIONS).warnings
    assert note.startswith("not used, as other captions of the same pictures go first")
    assert all(name in note for name in ("a.txt", "b.txt"))


def test_a_folder_of_a_data_toml_is_read_without_those_in_it(tmp_path):
    """As sd-scripts does; and its names are no repeats."""
    draw(tmp_path / "10_dog/a.png")
    draw(tmp_path / "10_dog/sub/b.png", 1)
    text = '[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "10_dog"\nclass_tokens = "x"\n'
    dataset = samples.load(write_toml(tmp_path, text), {})
    assert [(Path(s.name).name, s.subset.num_repeats, s.text) for s in dataset.samples] == [("a.png", 1, "x")]
    assert any(f"not used: {tmp_path}/10_dog/sub" in note for note in dataset.warnings)


def test_captions_in_any_encoding_are_read_or_named_all_at_once(tmp_path):
    texts = {"a": "é".encode("cp1252"), "b": "é".encode("utf-16-le"), "c": "é".encode("utf-16"), "d": b"\xff"}
    for i, (name, content) in enumerate(texts.items()):
        draw(tmp_path / f"{name}.png", i)
        (tmp_path / f"{name}.txt").write_bytes(content)
    dataset = samples.load(tmp_path, {**OPTIONS, "uncaptioned": True})
    assert [sample.text for sample in dataset.samples][2] == "é"
    wrong = [error.split(":")[0] for error in dataset.errors]
    assert wrong == [str(tmp_path / f"{name}.txt") for name in "abd"]


@pytest.mark.parametrize(
    "options",
    [
        {"class_tokens": "x"},
        {"uncaptioned": True},
        {"caption_dropout_rate": 0.1},
        {"caption_dropout_every_n_epochs": 2},
    ],
)
def test_pictures_without_captions_must_be_meant(tmp_path, options):
    draw(tmp_path / "a.png")
    with pytest.raises(FluxError, match=r"1 without a caption: .*a\.png"):
        batches.Plan(samples.load(tmp_path, OPTIONS), 0)
    assert batches.Plan(samples.load(tmp_path, {**OPTIONS, **options}), 0).items
    with pytest.raises(FluxError, match=r"no caption for .*a\.png.*uncaptioned"):
        open_folder(tmp_path)
    assert open_folder(tmp_path, uncaptioned=True).texts(0) == ()


def test_any_column(tmp_path):
    draw(tmp_path / "a.png")
    row = {"file_name": "a.png", "text": "not this", "style": ["one", "two"]}
    lines(tmp_path / "metadata.jsonl", row)
    (sample,) = samples.load(tmp_path, {**OPTIONS, "caption_column": "style"}).samples
    assert sample.texts == ("one", "two")
    assert open_folder(tmp_path, caption_column="style").texts(0) == ("one", "two")
    errors = samples.load(tmp_path, {**OPTIONS, "caption_column": "stile"}).errors
    assert "it has file_name, text, style, not the column 'stile'" in errors[0]


def test_one_of_several_captions_is_drawn_each_epoch(tmp_path):
    for i in range(4):
        draw(tmp_path / f"{i}.png", i)
    rows = ({"image": f"{i}.png", "prompt": [f"{i}a", f"{i}b", f"{i}c"]} for i in range(4))
    lines(tmp_path / "train.jsonl", *rows)
    options = {**OPTIONS, "num_repeats": 2}

    def drawn(seed: int, epoch: int, **more) -> list[tuple[str, str]]:
        plan = batches.Plan(samples.load(tmp_path, {**options, **more}), seed)
        entries = [entry for batch in plan.epoch(epoch) for entry in batch.entries]
        return sorted((entry.placed.sample.name, entry.caption) for entry in entries)

    assert drawn(1, 0) == drawn(1, 0, batch_size=3), "it belongs to the sample, not to its place in a batch"
    assert drawn(1, 0) != drawn(1, 1)
    assert drawn(1, 0) != drawn(2, 0)
    plan = batches.Plan(samples.load(tmp_path, options), 1)
    assert set(plan.captions(30)) == {f"{i}{letter}" for i in range(4) for letter in "abc"}
    assert len(plan.captions(1)) < 12


# --- Masks ---


def mask(path: Path, size: tuple[int, int] = (64, 64), white: slice | None = slice(0, 32)) -> None:
    """White in some rows, black in the others."""
    pixels = np.zeros(size, np.uint8)
    pixels[white or slice(0)] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize(
    "place", ["a-masklabel.png", "a_mask.png", "masks/a.png", "mask/a.jpg", "masks/a-masklabel.png"]
)
def test_masks_beside_pictures(tmp_path, place):
    """They mask the loss and are never trained as pictures."""
    draw(tmp_path / "a.png")
    write(tmp_path / "a.txt", "x")
    mask(tmp_path / place)
    dataset = samples.load(tmp_path, OPTIONS)
    plan = batches.Plan(dataset, 0)
    assert [Path(placed.sample.name).name for placed in plan.placed] == ["a.png"]
    assert plan.masked
    assert any("the loss is masked: 1 pictures have a mask" in note for note in dataset.warnings)
    _, found = pictures.prepare(plan.placed[0], 0, 0)
    assert found[:28].min() > 250
    assert found[36:].max() < 5
    digest = plan.digest()
    mask(tmp_path / place, white=slice(0, 16))
    assert batches.Plan(samples.load(tmp_path, OPTIONS), 0).digest() != digest
    with pytest.raises(FluxError, match=r"the mask .* has changed"):
        pictures.prepare(plan.placed[0], 0, 0)
    assert [picture.name for picture in files.find([tmp_path])] == ["a.png"]
    with pytest.warns(UserWarning, match="masks are not used in a training from scratch"):
        assert len(open_folder(tmp_path)) == 1


def test_a_name_that_ends_in_mask_is_a_picture_alone(tmp_path):
    for i, name in enumerate(("man_mask.png", "b-masklabel.png", "c-condlabel.png")):
        draw(tmp_path / name, i)
    dataset = samples.load(tmp_path, {**OPTIONS, "class_tokens": "x"})
    assert [Path(sample.name).name for sample in dataset.samples] == ["man_mask.png"]
    (note,) = dataset.warnings
    assert "masks that are not used" in note
    assert "b-masklabel.png" in note
    assert "c-condlabel.png" in note


@pytest.mark.parametrize("key", ["conditioning_data_dir", "mask_dir"])
def test_masks_of_a_data_toml(tmp_path, key):
    for i, name in enumerate(("a", "b")):
        draw(tmp_path / f"img/{name}.jpg", i)
        write(tmp_path / f"img/{name}.txt", name)
    mask(tmp_path / "m/a.png", (32, 32))
    text = '[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "img"\n'
    text += f'{key} = "m"\nmask_floor = 0.25\n'
    dataset = samples.load(write_toml(tmp_path, text), {})
    assert not dataset.errors
    assert any("without a mask, trained whole" in note and "b.jpg" in note for note in dataset.warnings)
    report = check.check(dataset)
    assert (report.pictures, report.masked) == (2, 1)
    assert {sample.subset.mask_floor for sample in dataset.samples} == {0.25}
    mask(tmp_path / "m/b.png", (32, 48))
    assert "should have one shape" in check.check(samples.load(tmp_path, {})).errors[0]


def test_nothing_to_train_is_named(tmp_path):
    draw(tmp_path / "a.png")
    mask(tmp_path / "a-masklabel.png", white=None)
    Image.new("RGBA", (64, 64), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    options = {**OPTIONS, "class_tokens": "x"}
    errors = check.check(samples.load(tmp_path, options)).errors
    assert len(errors) == 2
    assert "a-masklabel.png: the mask is all black" in errors[0]
    assert "clear.png: the picture is all transparent" in errors[1]
    assert len(check.check(samples.load(tmp_path, {**options, "mask_floor": 0.1})).errors) == 1


# --- The report ---


class Words:
    """A tokenizer of three words."""

    max_length = 3

    def truncated(self, text: str) -> str:
        return " ".join(text.split()[3:])


def test_long_captions_and_the_caches_size(tmp_path):
    draw(tmp_path / "a.png")
    lines(tmp_path / "train.jsonl", {"image": "a.png", "prompt": "one two three four"})
    report = check.check(samples.load(tmp_path, {**OPTIONS, "flip_aug": True}), {"T5": Words()})
    assert report.warnings == [
        f"captions longer than the 3 tokens of T5, which does not see their end: {tmp_path}/a.png ('four')"
    ]
    # Latents of 8x8x16, mean and log variance, mirrored too, and 3 tokens of T5 with CLIP's vector: 16 bits.
    assert report.cache_bytes == 2 * 2 * 2 * 8 * 8 * 16 + 2 * (3 * 4096 + 768)


def test_the_folder_of_a_run_is_no_data(tmp_path):
    """`dreambooth.py .` a second time: its own progress pictures are not trained."""
    draw(tmp_path / "a.png")
    draw(tmp_path / "sub/b.png", 1)
    draw(tmp_path / "mlx_output/progress/step0.png", 2)
    write(tmp_path / "mlx_output/events.jsonl", "")
    dataset = samples.load(tmp_path, {**OPTIONS, "class_tokens": "x"})
    assert [Path(sample.name).name for sample in dataset.samples] == ["a.png", "b.png"]
    notes = "\n".join(dataset.warnings)
    assert f"{tmp_path}/mlx_output is the folder of a training run" in notes
    assert f"with the pictures of the folders in it: {tmp_path}/sub" in notes
    assert [picture.name for picture in files.find([tmp_path])] == ["a.png", "sub/b.png"]


def test_a_parquet_file_with_the_pictures_in_it(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    draw(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    columns = {"image": [{"bytes": content, "path": "x.png"}], "text": ["inside"]}
    table = pytest.importorskip("pyarrow").table(columns)
    parquet.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    dataset = samples.load(tmp_path / "train-00000-of-00001.parquet", OPTIONS)
    (placed,) = batches.Plan(dataset, 0).placed
    assert (placed.size, placed.sample.text) == ((64, 64), "inside")
    assert placed.sample.name.endswith("parquet, row 1")


def test_a_split_that_holds_none_out_is_named(tmp_path):
    draw(tmp_path / "a.png")
    options = {**OPTIONS, "class_tokens": "x", "validation_split": 0.1}
    assert "validation_split 0.1 of 1 pictures holds none out" in samples.load(tmp_path, options).warnings[0]


def test_a_link_that_leads_back_is_followed_once(tmp_path):
    draw(tmp_path / "sub/a.png")
    os.symlink(tmp_path, tmp_path / "sub/again")
    assert len(samples.load(tmp_path, {**OPTIONS, "class_tokens": "x"}).samples) == 1


def test_a_small_parquet_file_of_very_many_rows(tmp_path):
    """Its columns are runs of one value: some kilobytes, and gigabytes as rows."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(2_000_000, np.int32)), pa.array(["a.png"]))
    parquet.write_table(pa.table({"image": column, "text": column}), tmp_path / "metadata.parquet")
    assert (tmp_path / "metadata.parquet").stat().st_size < 1_000_000
    with pytest.raises(FluxError, match="its rows are very much larger than the file"):
        lists.read_objects(tmp_path / "metadata.parquet")
