"""JSON of strangers: what `json` takes and should not is one line, and nothing valid is refused."""

import json
import os
import time
from dataclasses import dataclass

import pytest

from flux import jsonfiles
from flux.errors import FluxError

VALID = {
    "text": 'brackets [[[{{{ in a "text" \\',
    "numbers": [0, -1, 1.5, 1e300, True, None],
    "emoji": "\N{GRINNING FACE}é",
    "": {"nested": [[[]]]},
}


@pytest.mark.parametrize("ascii_only", [True, False])
def test_valid(ascii_only, tmp_path):
    """Pairs of surrogates are a letter; a byte order mark is passed over."""
    text = json.dumps(VALID, ensure_ascii=ascii_only)
    file = tmp_path / "f.json"
    for mark in (b"", b"\xef\xbb\xbf"):
        file.write_bytes(mark + text.encode())
        assert jsonfiles.read(file) == VALID
    assert jsonfiles.parse(text) == VALID


def test_brackets_in_texts_are_no_depth():
    text = json.dumps({"a": "[" * 1000, "b": "\\" + "{" * 1000, "c": '"' + "[" * 1000})
    assert jsonfiles.parse(text) == json.loads(text)


def test_depth_is_exact():
    most = jsonfiles.MAX_DEPTH
    assert jsonfiles.parse("[" * most + "]" * most)
    with pytest.raises(ValueError, match=f"nested {most + 1} deep"):
        jsonfiles.parse("[" * (most + 1) + "]" * (most + 1))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b"[" * 10**6, "nested 1000000 deep"),
        (b'{"a":' * 10**5, "nested 100000 deep"),
        (b"[" + b"{}," * 1_000_001 + b"{}]", "more than 1000000 values"),
        (b'"",' * 5_000_000, "more than 1000000 values"),
        (b'{"a": 1, "b": 2, "a": 1}', "the key 'a' comes twice"),
        (b'[{"k": {"a": 1, "a": 2}}]', "the key 'a' comes twice"),
        (b"[NaN]", "NaN is not a number"),
        (b"[-Infinity]", "-Infinity is not a number"),
        (b"[1e999]", "1e999 is not a number"),
        (b"1" * 5000, "digits"),
        (rb'{"\ud800": 1}', "half of a surrogate pair"),
        (rb'["\uDC00x"]', "half of a surrogate pair"),
        (b'"\xff"', "not UTF-8"),
        (b"", "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b"[1, 2", "not JSON"),
        (b"\0\0\0", "not JSON"),
    ],
    ids=range(17),
)
def test_refused(text, line):
    start = time.process_time()
    with pytest.raises(ValueError, match=line) as error:
        jsonfiles.parse(text)
    assert len(str(error.value)) < 200
    assert "\n" not in str(error.value)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("text", "kind"), [("[]", "a list"), ('"x"', "a text"), ("null", "null"), ("1", "a number")]
)
def test_an_object_is_wanted(text, kind, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(FluxError, match=f"config.json: should hold a JSON object, not {kind}"):
        jsonfiles.read(file)


def test_files(tmp_path):
    with pytest.raises(FluxError, match=r"none\.json: cannot be read: No such file"):
        jsonfiles.read(tmp_path / "none.json")
    with pytest.raises(FluxError, match="not a file"):
        jsonfiles.read(tmp_path)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(FluxError, match=r"pipe\.json: not a file"):
        jsonfiles.read(tmp_path / "pipe.json")
    (tmp_path / "large.json").write_bytes(b" " * 101)
    with pytest.raises(FluxError, match=r"large\.json: it has 101 bytes; 100 are the most"):
        jsonfiles.read(tmp_path / "large.json", 100)


@dataclass
class Settings:
    steps: int = 1
    scale: float = 1.0
    name: str = ""
    early: bool = True
    last: int | None = None
    size: tuple[int, int] = (1, 1)
    widths: tuple[int, ...] = (1,)


def test_fields():
    values = {
        "steps": 3,
        "scale": 2,
        "name": "x",
        "early": False,
        "last": None,
        "size": [1, 2],
        "widths": [1] * 5,
    }
    wanted = {**values, "size": (1, 2), "widths": (1,) * 5}
    assert jsonfiles.fields(Settings, values, "f.json") == wanted
    assert jsonfiles.fields(Settings, {"last": 5}, "f.json") == {"last": 5}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("steps", [True, 1.0, "1", None, -1, 10**9, []]),
        ("scale", ["1", True, None, [], 1e39, 10**400]),
        ("name", [5, None, "x" * 2000]),
        ("early", [0, "true", None]),
        ("last", ["x", 1.5, -1]),
        ("size", [5, [1], [1, 2, 3], ["a", "b"], {}]),
        ("widths", [[], [0.5], [1] * 100, "12"]),
        ("", [1]),
        ("\ud800" * 9999, [1]),
    ],
    ids=range(9),
)
def test_fields_of_another_type(name, values):
    for value in values:
        with pytest.raises(FluxError, match=r"^f\.json: ") as error:
            jsonfiles.fields(Settings, {name: value}, "f.json")
        assert len(str(error.value)) < 200
        assert str(error.value).isprintable()


def test_text(tmp_path):
    file = tmp_path / "merges.txt"
    file.write_bytes(b"\xef\xbb\xbfa b\n")
    assert jsonfiles.read_text(file) == "a b\n"
    file.write_bytes(b"\xff")
    with pytest.raises(FluxError, match=r"merges\.txt: its text is not UTF-8"):
        jsonfiles.read_text(file)
    with pytest.raises(FluxError, match="cannot be read"):
        jsonfiles.read_text(tmp_path / "none")


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    """Another name of the old file keeps the old text: it was replaced, not written over."""
    file, old = tmp_path / "new/run.json", tmp_path / "old.json"
    jsonfiles.write(file, {"a": 1, "text": "\u00e9"})
    old.hardlink_to(file)
    jsonfiles.write(file, {"a": 2})
    assert (jsonfiles.read(old), jsonfiles.read(file)) == ({"a": 1, "text": "\u00e9"}, {"a": 2})
    assert [path.name for path in file.parent.iterdir()] == ["run.json"]
    with pytest.raises(FluxError, match=r"run\.json/x\.json: cannot be written"):
        jsonfiles.write(file / "x.json", {})


def test_infinite_numbers_where_they_may_be():
    assert jsonfiles.parse("[NaN, -Infinity, 1e999]", infinite=True)[1:] == [float("-inf"), float("inf")]


def test_more_values_where_there_may_be():
    text = "[" + "0," * 1_000_001 + "0]"
    assert len(jsonfiles.parse(text, max_values=2_000_000)) == 1_000_002
