"""Damaged lists, options and captions: each is read or named in one line, by every program, and soon."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flux.captioning import files, records
from flux.data import check, samples
from flux.data.sources import open_folder
from flux.errors import FluxError
from tests.datasets import OPTIONS
from tests.kinds import draw

SOUND = {
    "train.jsonl": """{"image": "a.png", "prompt": "x", "n": [1, 2]}
{"image": "sub\\\\b.png", "prompt": ["x", "y"]}
""",
    "metadata.csv": 'file_name,text\r\na.png,"one, two"\r\nsub/b.png,x\r\n',
    "index.json": '{"data": [{"image": "a.png", "text": "x"}, {"image": "sub/b.png", "text": null}]}',
    "metadata.json": '{"a": {"caption": "x", "tags": "y"}, "sub/b.png": {"tags": ["z"]}}',
    "data.toml": """[general]
shuffle_caption = true
[[datasets]]
resolution = [64, 96]
batch_size = 2
enable_bucket = true
min_bucket_reso = 32
bucket_reso_steps = 16
[[datasets.subsets]]
image_dir = "sub"
class_tokens = "x"
num_repeats = 2
""",
    "a.json": '{"caption": "x", "tags": ["y"]}',
}
PIECES = (
    *('"', "{", "}", "[", "]", ",", "\n", "\\", "\0", "null", "1e999", "-1", "NaN", "true", "[[", "=", ".."),
    *("\ud7ff", "a.png", "\t", "999999999999", '{"a":', "datasets", "text", "\u2028", '"image"', "[" * 3000),
)


def damaged(rng: random.Random, text: str) -> bytes:
    for _ in range(rng.randint(1, 4)):
        k = rng.randrange(len(text) + 1)
        kind = rng.randrange(3)
        cut = rng.randint(1, 8)
        text = (text[:k] + rng.choice(PIECES) + text[k:], text[:k] + text[k + cut :], text[:k])[kind]
    content = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        content = bytes(rng.randrange(256) if rng.random() < 0.05 else byte for byte in content)
    return content


def message(program: Callable[[], object]) -> str | None:
    """What the program refuses its input with, if it does."""
    try:
        program()
    except FluxError as error:
        return str(error)
    return None


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", SOUND)
def test_damaged_files_are_read_or_named(tmp_path, name):
    draw(tmp_path / "a.png")
    draw(tmp_path / "sub/b.png", 1)
    programs = (
        lambda: check.check(samples.load(tmp_path, OPTIONS)),
        lambda: open_folder(tmp_path),
        lambda: records.read(files.find([tmp_path]), "jsonl"),
        lambda: records.read_elsewhere(files.find([tmp_path])),
    )
    rng = random.Random(name)
    for _ in range(60):
        Path(tmp_path / name).write_bytes(damaged(rng, SOUND[name]))
        begun = time.monotonic()
        lines = [line for program in programs if (line := message(program)) is not None]
        assert not [line for line in lines if "\n" in line]
        assert time.monotonic() - begun < 5
