"""data.toml files as people publish them: samples, captions and buckets of a table worked out by hand.

The rules are those of ../shared/specs/training.md (sd-scripts' schema); sd-scripts itself cannot be installed
beside this project, so the table stands for it: pictures -> repeats and the captions that an epoch may give;
buckets (height, width) -> samples an epoch.
"""

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from flux.data import batches, check, samples
from tests.kinds import draw, write

# Folders of pictures (height, width) with captions; ratios 1, 1.5 and 0.5.
TOY = {"a.png": (40, 40), "b.png": (40, 60), "c.jpg": (80, 40)}
TAGS = {"a": "sks, toy, red", "b": "sks, toy, blue", "c": "sks, toy, on grass"}
SQUARE, WIDE, HIGH = "toy/a.png", "toy/b.png", "toy/c.jpg"


@pytest.fixture
def folder(tmp_path) -> Path:
    for i, (name, size) in enumerate(TOY.items()):
        draw(tmp_path / "toy" / name, i, size)
        write(tmp_path / "toy" / f"{name[0]}.txt", TAGS[name[0]] + "\n")
        draw(tmp_path / "bare" / name, i + 10, size)
    for i in range(4):
        draw(tmp_path / "reg" / f"{i}.png", i + 20, (50, 50))
    draw(tmp_path / "long/l.png", 30)
    write(tmp_path / "long/l.caption", "first line, of two\nsecond {line|row}\n")
    metadata = {"a": {"caption": "a toy", "tags": "red"}, "b.png": {"caption": "a blue toy"}}
    write(tmp_path / "toy_md.json", json.dumps(metadata))
    return tmp_path


class Case(NamedTuple):
    """A file and what it says: picture -> repeats, picture -> captions, bucket -> samples."""

    text: str
    repeats: dict[str, int]
    captions: dict[str, set[str]]
    buckets: dict[tuple[int, int], int]


def every(captions: dict[str, set[str]], count: int = 1) -> dict[str, int]:
    return dict.fromkeys(captions, count)


WHOLE = {SQUARE: {TAGS["a"]}, WIDE: {TAGS["b"]}, HIGH: {TAGS["c"]}}
CLASS = {f"bare/{name}": {"sks toy"} for name in TOY}
REG = {f"reg/{i}.png": {"toy"} for i in range(4)}
AT_512 = "[[datasets]]\nresolution = 512\n"
IN_TOY = "[[datasets.subsets]]\nimage_dir = 'toy'\ncaption_extension = '.txt'\n"
SHUFFLED = {
    SQUARE: {"sks, toy, red", "sks, red, toy"},
    WIDE: {"sks, toy, blue", "sks, blue, toy"},
    HIGH: {"sks, toy, on grass", "sks, on grass, toy"},
}
CASES = {
    "the shortest": Case(
        AT_512 + "[[datasets.subsets]]\nimage_dir = 'bare'\nclass_tokens = 'sks toy'\n",
        every(CLASS),
        CLASS,
        {(512, 512): 3},
    ),
    "repeats and an extension without its point": Case(
        "[[datasets]]\nresolution = 512\nbatch_size = 2\n[[datasets.subsets]]\n"
        "image_dir = 'toy'\ncaption_extension = 'txt'\nnum_repeats = 10\nclass_tokens = 'x'\n",
        every(WHOLE, 10),
        WHOLE,
        {(512, 512): 30},
    ),
    "buckets of 1024": Case(
        "[general]\nenable_bucket = true\n[[datasets]]\nresolution = 1024\n" + IN_TOY,
        every(WHOLE),
        WHOLE,
        {(1024, 1024): 1, (704, 1024): 1, (1024, 512): 1},
    ),
    "buckets of 1024 up to 2048": Case(
        "[general]\nenable_bucket = true\nmax_bucket_reso = 2048\n[[datasets]]\nresolution = [1024, 1024]\n"
        + IN_TOY,
        every(WHOLE),
        WHOLE,
        {(1024, 1024): 1, (832, 1216): 1, (1408, 704): 1},
    ),
    "buckets of 512": Case(
        "[general]\nenable_bucket = true\nmin_bucket_reso = 256\n" + AT_512 + IN_TOY,
        every(WHOLE),
        WHOLE,
        {(512, 512): 1, (384, 640): 1, (704, 320): 1},
    ),
    "buckets of 768": Case(
        "[general]\nenable_bucket = true\nbucket_reso_steps = 64\n[[datasets]]\nresolution = 768\n" + IN_TOY,
        every(WHOLE),
        WHOLE,
        {(768, 768): 1, (640, 896): 1, (1024, 512): 1},
    ),
    "never enlarged": Case(
        "[general]\nenable_bucket = true\nbucket_no_upscale = true\nbucket_reso_steps = 16\n"
        "" + AT_512 + IN_TOY,
        every(WHOLE),
        WHOLE,
        {(32, 32): 1, (32, 48): 1, (80, 32): 1},
    ),
    "wide without buckets": Case(
        "[[datasets]]\nresolution = [768, 512]\n" + IN_TOY, every(WHOLE), WHOLE, {(512, 768): 3}
    ),
    "several resolutions of one folder": Case(
        "[general]\nenable_bucket = true\n"
        + "".join(f"[[datasets]]\nresolution = {side}\nbatch_size = 1\n{IN_TOY}" for side in (512, 768)),
        every(WHOLE, 2),
        WHOLE,
        {
            **{(512, 512): 1, (384, 640): 1, (704, 320): 1},
            **{(768, 768): 1, (640, 896): 1, (1024, 512): 1},
        },
    ),
    "shuffled tags, the first kept": Case(
        "[general]\nshuffle_caption = true\nkeep_tokens = 1\n" + AT_512 + IN_TOY,
        every(WHOLE),
        SHUFFLED,
        {(512, 512): 3},
    ),
    "a subset's own number of kept tags": Case(
        "[general]\nshuffle_caption = true\nkeep_tokens = 1\n"
        "[[datasets]]\nresolution = 512\nkeep_tokens = 2\n" + IN_TOY + "keep_tokens = 3\n",
        every(WHOLE),
        WHOLE,
        {(512, 512): 3},
    ),
    "regularisation pictures": Case(
        "[[datasets]]\nresolution = 512\nbatch_size = 4\n[[datasets.subsets]]\nimage_dir = 'bare'\n"
        "class_tokens = 'sks toy'\nnum_repeats = 2\n[[datasets.subsets]]\nis_reg = true\nimage_dir = 'reg'\n"
        "class_tokens = 'toy'\n",
        every(CLASS, 2) | {"reg/0.png": 2, "reg/1.png": 2, "reg/2.png": 1, "reg/3.png": 1},
        CLASS | REG,
        {(512, 512): 12},
    ),
    "two concepts": Case(
        "[general]\nshuffle_caption = false\nkeep_tokens = 2\n"
        "[[datasets]]\nresolution = 1024\nbatch_size = 1\n"
        "[[datasets.subsets]]\nimage_dir = 'bare'\nclass_tokens = 'sks toy'\n"
        "num_repeats = 1\nflip_aug = true\n"
        "[[datasets.subsets]]\nimage_dir = 'reg'\nclass_tokens = 'tj cat'\n"
        "num_repeats = 2\nflip_aug = true\n",
        every(CLASS) | {f"reg/{i}.png": 2 for i in range(4)},
        CLASS | {f"reg/{i}.png": {"tj cat"} for i in range(4)},
        {(1024, 1024): 11},
    ),
    "paths of Windows": Case(
        AT_512 + "[[datasets.subsets]]\nimage_dir = 'C:\\train\\bare'\nclass_tokens = 'sks toy'\n",
        every(CLASS),
        CLASS,
        {(512, 512): 3},
    ),
    "metadata": Case(
        AT_512 + "[[datasets.subsets]]\nimage_dir = 'toy'\nmetadata_file = 'toy_md.json'\n",
        {SQUARE: 1, WIDE: 1},
        {SQUARE: {"a toy, red"}, WIDE: {"a blue toy"}},
        {(512, 512): 2},
    ),
    "prefix and suffix": Case(
        "[general]\ncaption_prefix = 'photo of'\ncaption_suffix = 'in 4k'\n[[datasets]]\nresolution = 512\n"
        + IN_TOY,
        every(WHOLE),
        {name: {f"photo of {text} in 4k" for text in texts} for name, texts in WHOLE.items()},
        {(512, 512): 3},
    ),
    "the first line": Case(
        AT_512 + "[[datasets.subsets]]\nimage_dir = 'long'\n",
        {"long/l.png": 1},
        {"long/l.png": {"first line, of two"}},
        {(512, 512): 1},
    ),
    "any line, with wildcards": Case(
        "[[datasets]]\nresolution = 512\nenable_wildcard = true\n[[datasets.subsets]]\nimage_dir = 'long'\n",
        {"long/l.png": 1},
        {"long/l.png": {"first line, of two", "second line", "second row"}},
        {(512, 512): 1},
    ),
    "dropped captions": Case(
        AT_512 + "[[datasets.subsets]]\nimage_dir = 'bare'\ncaption_dropout_rate = 0.5\n"
        "class_tokens = 'sks toy'\ncaption_dropout_every_n_epochs = 0\n",
        every(CLASS),
        {name: {"sks toy", ""} for name in CLASS},
        {(512, 512): 3},
    ),
    "options that change nothing": Case(
        "[general]\nflip_aug = false\ncolor_aug = false\ntoken_warmup_min = 1\ntoken_warmup_step = 0\n"
        "[[datasets]]\nresolution = 512\nnetwork_multiplier = 1.0\n[[datasets.subsets]]\nimage_dir = 'toy'\n"
        "caption_extension = '.txt'\ncache_info = true\n"
        "[datasets.subsets.custom_attributes]\nauthor = 'me'\n",
        every(WHOLE),
        WHOLE,
        {(512, 512): 3},
    ),
    "tags that fall out": Case(
        "[general]\ncaption_tag_dropout_rate = 1.0\nkeep_tokens = 2\n[[datasets]]\nresolution = 512\n"
        + IN_TOY,
        every(WHOLE),
        {name: {"sks, toy"} for name in WHOLE},
        {(512, 512): 3},
    ),
    "another separator": Case(
        "[general]\nshuffle_caption = true\nkeep_tokens_separator = 'toy'\n[[datasets]]\nresolution = 512\n"
        + IN_TOY,
        every(WHOLE),
        {SQUARE: {"sks, red"}, WIDE: {"sks, blue"}, HIGH: {"sks, on grass"}},
        {(512, 512): 3},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_samples_captions_and_buckets(folder, name):
    case = CASES[name]
    (folder / "data.toml").write_text(case.text, encoding="utf-8")
    dataset = samples.load(folder / "data.toml", {})
    assert not dataset.errors
    plan = batches.Plan(dataset, seed=3)
    repeats: dict[str, int] = {}
    captions: dict[str, set[str]] = {}
    for epoch in range(40):
        entries = [entry for batch in plan.epoch(epoch) for entry in batch.entries]
        names = [Path(entry.placed.sample.name).relative_to(folder).as_posix() for entry in entries]
        repeats = {picture: names.count(picture) for picture in names}
        for picture, entry in zip(names, entries, strict=True):
            captions.setdefault(picture, set()).add(entry.caption)
        assert repeats == case.repeats
    assert captions == case.captions
    assert {size: count for (_, size), count in plan.bucket_table().items()} == case.buckets


def test_caption_files_go_before_lists(folder):
    """In a data.toml alone; a list is read where the subset has no caption file."""
    write(folder / "toy/train.jsonl", '{"image": "a.png", "prompt": "from the list"}\n')
    (folder / "data.toml").write_text(AT_512 + IN_TOY)
    dataset = samples.load(folder / "data.toml", {})
    assert {sample.text for sample in dataset.samples} == set(TAGS.values())
    assert any(
        "not used, as a caption file goes first" in note and "train.jsonl" in note
        for note in dataset.warnings
    )
    (folder / "data.toml").write_text(AT_512 + IN_TOY.replace(".txt", ".caption"))
    assert [sample.text for sample in samples.load(folder / "data.toml", {}).samples] == ["from the list"]


def test_a_caption_of_several_lines_is_said_to_be_cut(folder):
    text = AT_512 + "[[datasets.subsets]]\nimage_dir = 'long'\n"
    (folder / "data.toml").write_text(text)
    (note,) = samples.load(folder / "data.toml", {}).warnings
    assert "only the first is taken, as by sd-scripts" in note
    assert "long/l.png" in note


REFUSED = {
    "secondary_separator = ';;;'": "is an option of sd-scripts that is not supported here: separates tags",
    "face_crop_aug_range = [2.0, 4.0]": "crops around faces",
    "token_warmup_step = 0.5": "token_warmup_step is an option of sd-scripts",
    "resize_interpolation = 'cubic'": "how pictures are resized",
    "network_multiplier = 0.5": "network_multiplier is an option of sd-scripts",
    "caption_dropout_every_n_epoches = 2": "did you mean 'caption_dropout_every_n_epochs'?",
    "num_repeat = 2": "did you mean 'num_repeats'?",
    "colour = 'red'": "unknown key 'colour'",
    "batch_size = 2": "batch_size belongs into [[datasets]] or [general]",
    "num_repeats = 0": "subset 1.num_repeats: 0 must be at least 1",
    "num_repeats = 1000000000": "subset 1.num_repeats: 1000000000 must be at most 100000",
    "flip_aug = 'yes'": "subset 1.flip_aug: must be true or false, not 'yes'",
    "mask_dir = 'nowhere'": "no folder mask_dir (conditioning_data_dir) = 'nowhere'",
    "metadata_file = 'nowhere.json'": "no file metadata_file = 'nowhere.json'",
}


@pytest.mark.parametrize("line", REFUSED)
def test_options_that_are_refused(folder, line):
    (folder / "data.toml").write_text("" + AT_512 + IN_TOY + line + "\n")
    (error,) = check.check(samples.load(folder / "data.toml", {})).errors
    assert REFUSED[line] in error
    assert line.startswith("colour") == error.endswith("unknown key 'colour'"), (
        "only what is near is suggested"
    )
