"""txt2image.py --prompts: a folder of prompts becomes a folder of pictures."""

import os
import re
from pathlib import Path

import pytest

from flux import images

PROMPTS = {"a": "a red apple on a blue background", "b.c": "two\n  green birds\n", "z": "\ufeffun café ☃"}


@pytest.fixture
def prompts(tmp_path) -> Path:
    """A folder with prompts, and with what is not one."""
    folder = tmp_path / "prompts"
    (folder / "more").mkdir(parents=True)
    for name, text in PROMPTS.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    (folder / "more/d.txt").write_text("not asked for")
    (folder / "._a.txt").write_bytes(b"\x00\xff")  # what a Mac leaves on other disks
    (folder / "notes.md").write_text("no prompt")
    return folder


def test_each_prompt_has_its_picture_as_if_made_alone(call, model, prompts, tmp_path):
    options = ("--model", model, "--seed", 5, "--cfg-scale", 2, "--negative-prompt", "a dog")
    status, out, err = call("--prompts", prompts, "--output", "pictures", *options, "--n-images", 2)
    assert (status, err) == (0, [])
    assert out == [f"pictures/{name}.png" for name in PROMPTS]
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["a.png", "b.c.png", "z.png"]
    assert call("two green birds", *options, "--n-images", 2, "--output", "alone.png")[0] == 0
    assert (tmp_path / "alone.png").read_bytes() == (tmp_path / "pictures/b.c.png").read_bytes()
    assert images.read_metadata(tmp_path / "pictures/z.png")["prompt"] == "un café ☃"
    assert call("--remake", "pictures/a.png", "--output", "again.png")[0] == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "pictures/a.png").read_bytes()
    status, out, _ = call("--prompts", prompts, "--output", "raw", *options, "--n-images", 2, "--save-raw")
    assert out == [f"raw/{name}.{i}.png" for name in PROMPTS for i in range(2)]


def test_what_a_stopped_run_has_left_is_kept_and_all_else_is_made_anew(call, model, prompts, tmp_path):
    command = ("--prompts", prompts, "--output", "out", "--model", model)
    assert call(*command, "--seed", 5)[0] == 0
    out = tmp_path / "out"
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    stale = whole["a.png"]
    (out / "b.c.png").unlink()
    (out / "z.png").write_bytes(stale[:100])  # damaged
    status, paths, err = call(*command, "--seed", 5)
    assert (status, paths) == (0, ["out/b.c.png", "out/z.png"])
    assert err == ["kept, made before in the same way: 1 of 3 prompts"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
    assert call(*command, "--seed", 5)[1] == []  # without any work

    (prompts / "a.txt").write_text("a guitar")
    assert call(*command, "--seed", 5)[1] == ["out/a.png"]
    assert len(call(*command, "--seed", 6)[1]) == 3
    os.utime(next(Path(model).rglob("*.safetensors")), (2**32, 2**32))  # as a model that was trained on
    assert len(call(*command, "--seed", 6)[1]) == 3


BAD = [
    (["--prompts", "none", "--output", "out"], "folder none: No such file"),
    (["--prompts", "prompts/a.txt", "--output", "out"], r"folder prompts/a\.txt: Not a directory"),
    (["--prompts", "bare", "--output", "out"], r"folder bare holds no \.txt file"),
    (["--prompts", "empty", "--output", "out"], r"empty/e\.txt is empty"),
    (["--prompts", "latin1", "--output", "out"], r"latin1/e\.txt is not UTF-8"),
    (["--prompts", "twice", "--output", "out"], r"twice/A\.txt and a\.txt would both be"),
    (["--prompts", "prompts"], "needs a folder as --output, not nothing"),
    (["--prompts", "prompts", "--output", "out.png"], r"needs a folder as --output, not out\.png"),
    (
        ["--prompts", "prompts", "--output", "prompts/a.txt"],
        r"needs a folder as --output, not prompts/a\.txt",
    ),
    (["--prompts", "prompts", "--output", "no/where"], "folder no does not exist"),
    (["--prompts", "prompts", "--output", "out", "a dog"], "not from two"),
    (["--prompts", "prompts", "--output", "out", "--n-rows", "2"], r"n-rows 2 is more .*\(1\)"),
]


@pytest.mark.parametrize(("args", "message"), BAD)
def test_bad_input_has_one_clear_line_and_writes_nothing(call, model, prompts, tmp_path, args, message):
    for name in ("bare", "empty", "latin1", "twice"):
        (tmp_path / name).mkdir()
    (tmp_path / "empty/e.txt").write_text("\n ")
    (tmp_path / "latin1/e.txt").write_bytes("café".encode("latin1"))
    for name in ("A.txt", "a.txt"):
        (tmp_path / "twice" / name).write_text("a dog")
    before = sorted(tmp_path.rglob("*"))
    status, out, err = call(*args, "--model", model)
    assert (status, out, len(err)) == (2, [], 1)
    assert re.search(message, err[0])
    assert sorted(tmp_path.rglob("*")) == before
