"""States on disk: complete or absent, checked when they are read, the newest whole one is taken."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from flux.errors import FluxError
from flux.training.states import PROGRESS, STATE, States


def arrays(value: float):
    return lambda path: mx.save_safetensors(str(path), {"a": mx.full((100,), value)}, {"step": "1"})


def parse(table: dict[str, Any]) -> int:
    return int(table["number"])


@pytest.fixture
def states(tmp_path) -> States:
    """Three of them, 1 to 3."""
    made = States(tmp_path / "states", keep=3)
    for number in (1, 2, 3):
        made.save(f"{number:03d}", {"number": number, "odd": [1.5, None]}, arrays(number))
    return made


def test_they_keep_the_last_and_ignore_what_is_incomplete(tmp_path):
    states = States(tmp_path / "states", keep=2)
    assert states.latest() is None
    assert states.newest_whole(parse) is None
    for number in (1, 2, 3):
        states.save(str(number), {"number": number}, arrays(number))
    assert sorted(p.name for p in (tmp_path / "states").iterdir()) == ["2", "3"]
    (tmp_path / "states/4").mkdir()
    (tmp_path / "states/4/state.safetensors").write_bytes(b"half")
    assert states.latest().name == "3"

    def fails(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(FluxError, match="5: the state cannot be written: No space left on device"):
        states.save("5", {}, fails)
    found = states.newest_whole(parse)
    assert (found.path.name, found.value) == ("3", 3)
    states.save("6", {}, arrays(6))
    assert sorted(p.name for p in (tmp_path / "states").iterdir()) == ["3", "6"]


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def change_the_number(path: Path) -> None:
    path.write_text(path.read_text().replace('"number": 3', '"number": 5'))


def becomes(content: bytes):
    return lambda path: path.write_bytes(content)


DAMAGE = [
    (STATE, flip_a_bit, "checksum differs"),
    (STATE, lambda path: path.write_bytes(path.read_bytes()[:-50]), "cut short"),
    (STATE, becomes(b""), STATE),
    (STATE, becomes(b"\xff" * 64), STATE),
    (STATE, Path.unlink, "No such file"),
    (PROGRESS, becomes(b""), "cannot be understood"),
    (PROGRESS, becomes(b'{"number": 3'), "cannot be understood"),
    (PROGRESS, becomes(b"{}"), "cannot be understood: 'number'"),
    (PROGRESS, becomes(b"[]"), "cannot be understood"),
    (PROGRESS, becomes(b"\xff\xfe"), "cannot be understood"),
    (PROGRESS, becomes(b'{"number": "three"}'), "cannot be understood"),
    (PROGRESS, change_the_number, "checksum differs"),
    (PROGRESS, Path.unlink, "No such file"),
]


@pytest.mark.parametrize(("file", "damage", "message"), DAMAGE)
def test_a_damaged_state_is_named_and_the_one_before_is_taken(states, tmp_path, file, damage, message):
    damage(tmp_path / "states/003" / file)
    found = states.newest_whole(parse)
    assert (found.path.name, found.value) == ("002", 2)
    (line,) = found.damaged
    assert line.startswith(f"{tmp_path}/states/003 is damaged: ")
    assert message in line
    assert "\n" not in line
    # What goes on from there takes the place of the damaged one, which must not push a whole one out.
    states.save("0025", {"number": 2}, arrays(2))
    assert sorted(p.name for p in (tmp_path / "states").iterdir()) == ["001", "002", "0025"]
    assert states.newest_whole(parse).damaged == ()


def test_where_all_are_damaged_every_one_is_named(states, tmp_path):
    for number in (1, 2, 3):
        (tmp_path / f"states/00{number}" / PROGRESS).write_text("")
    with pytest.raises(FluxError, match=r"every state is damaged: .*003 is.*002 is.*001 is damaged"):
        states.newest_whole(parse)


def test_foreign_folders_and_files_are_left_alone(states, tmp_path):
    for name in ("notes", "004 copy", ".git"):
        (tmp_path / "states" / name).mkdir()
        (tmp_path / "states" / name / STATE).write_bytes(b"x")
        (tmp_path / "states" / name / PROGRESS).write_text("{}")
    (tmp_path / "states/9").write_text("a file")
    assert states.newest_whole(parse).path.name == "003"
    states.save("004", {"number": 4}, arrays(4))
    names = {path.name for path in (tmp_path / "states").iterdir()}
    assert names == {"002", "003", "004", "notes", "004 copy", ".git", "9"}


def test_a_state_of_an_earlier_version_has_no_checksums_and_is_read(states, tmp_path):
    (tmp_path / "states/003" / PROGRESS).write_text(json.dumps({"number": 3}))
    found = states.newest_whole(parse)
    assert (found.value, found.damaged) == (3, ())


def test_a_state_that_is_written_again_is_whole_at_every_moment(states, tmp_path, monkeypatch):
    """A kill between any two moves leaves a state to go on from."""
    moves, rename = [], __import__("os").rename

    def watched(*paths):
        rename(*paths)
        moves.append(states.newest_whole(parse).value)

    monkeypatch.setattr("flux.training.states.os.rename", watched)
    states.save("003", {"number": 3}, arrays(9))
    assert moves == [2, 3]
    assert sorted(p.name for p in (tmp_path / "states").iterdir()) == ["001", "002", "003"]
