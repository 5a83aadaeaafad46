"""Files that are whole or absent, and folders of one process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flux import outputs
from flux.errors import FluxError
from flux.outputs import LOCK, check_writable, locked, name_fault, replacing

HOLDER = """
import sys, time
from pathlib import Path
from flux.outputs import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_file_is_whole_or_what_it_was(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    try:
        with replacing(path) as partial:
            partial.write_text("half")
            assert path.read_text() == "before"
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert path.read_text() == "before"
    with replacing(path) as partial:
        partial.write_text("after")
    assert path.read_text() == "after"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_the_content_is_on_the_disk_before_the_name_and_the_name_before_the_end(tmp_path: Path, monkeypatch):
    done: list[str] = []
    replace = os.replace
    monkeypatch.setattr(outputs, "flush", lambda path: done.append(f"flush {Path(path).suffix}"))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("replace"), replace(a, b)))
    for sync in (True, False):
        with replacing(tmp_path / "a.txt", ".part", sync) as partial:
            partial.write_text("x")
    assert done == ["flush .part", "replace", "flush ", "replace"]


def test_flush_syncs_files_and_folders(tmp_path: Path, monkeypatch):
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (synced.append(os.fstat(number).st_ino), fsync(number)))
    (tmp_path / "a").write_text("x")
    for path in (tmp_path / "a", tmp_path):
        outputs.flush(path)
    assert synced == [(tmp_path / "a").stat().st_ino, tmp_path.stat().st_ino]


def test_what_cannot_be_written_is_named_before_the_work(tmp_path: Path, monkeypatch):
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "new/folders/a.bin")
    assert os.listdir(tmp_path) == ["file"]
    for path, reason in ((tmp_path / "file/a.bin", "Not a directory"), (tmp_path / ("a" * 300), "too long")):
        with pytest.raises(FluxError, match=f"cannot write .*{reason}"):
            check_writable(path)

    def refuse(*_: object, **__: object) -> None:  # as root one may write anywhere
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(FluxError, match=r"cannot write .*: Permission denied"):
        check_writable(tmp_path / "a.bin")
    with (
        pytest.raises(FluxError, match=r"cannot write into the folder .*: Permission denied"),
        locked(tmp_path),
    ):
        pass


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "a/b", "a\\b", "..", ".", "", "a\0"])
def test_names_that_lead_elsewhere(name: str):
    assert name_fault(name)


def test_names_of_files():
    assert [name_fault(name) for name in ("final", "my dog", "v1.2", "..a", "Hündin")] == [None] * 5


# --- locks ---


def hold(folder: Path) -> subprocess.Popen:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"locked\n"
    return holder


def test_a_folder_is_one_process_s(tmp_path: Path):
    holder = hold(tmp_path / "run")
    try:
        with (
            pytest.raises(FluxError, match=f"run is in use by process {holder.pid} on "),
            locked(tmp_path / "run"),
        ):
            pass
    finally:
        holder.kill()
        holder.wait()
    assert os.listdir(tmp_path / "run") == [LOCK]  # of a process that has ended: nobody has to remove it
    with locked(tmp_path / "run"):
        (tmp_path / "run/a").write_text("")
    assert os.listdir(tmp_path / "run") == ["a"]


def test_a_lock_ends_with_an_error_and_with_an_interrupt(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), locked(tmp_path / "run"):
        raise KeyboardInterrupt
    assert not (tmp_path / "run").exists()  # it was made for nothing
    holder = hold(tmp_path)
    holder.send_signal(signal.SIGINT)
    holder.wait()
    assert os.listdir(tmp_path) == []


def test_a_lock_that_is_removed_between_opening_and_taking_is_none(tmp_path: Path, monkeypatch):
    take = outputs._take
    taken: list[int] = []

    def late(file, folder: Path) -> None:
        if not taken:
            (tmp_path / LOCK).unlink()  # by the process that had it
        taken.append(1)
        take(file, folder)

    monkeypatch.setattr(outputs, "_take", late)
    with locked(tmp_path):
        assert len(taken) == 2
        with pytest.raises(FluxError, match="is in use by"), locked(tmp_path):
            pass
