"""How programs end when they are interrupted, when nobody reads what they print, or a stream is closed."""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
from PIL import Image

import caption
from flux import arguments
from flux.arguments import run_program
from flux.errors import FluxError
from flux.outputs import LOCK, locked
from flux.training.finetune import Options
from flux.training.pretrain.run import Run

from . import finetuning, pretraining

ROOT = Path(__file__).parents[1]
TIMEOUT = 300  # seconds, for a machine that has much other work
INSPECT = "-m flux.adapters inspect a.safetensors a.safetensors"
DRAW = f"{ROOT}/txt2image.py --model tiny --steps 1 --image-size 16 --save-raw --n-images 2 apple"
EMOJI = "-m flux.recipes.emoji --output emoji --count 1"
STAGE = {"name": "vae", "train_vae": True, "n_epochs": 100_000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two adapters, pictures without captions, and a long pretraining."""
    folder = tmp_path_factory.mktemp("programs")
    layer = "diffusion_model.double_blocks.0.img_attn.proj.lora_"
    for name in ("a", "b"):
        factors = {f"{layer}A.weight": mx.ones((2, 192)), f"{layer}B.weight": mx.ones((192, 2))}
        mx.save_safetensors(str(folder / f"{name}.safetensors"), factors)
    (folder / "pictures").mkdir()
    Image.new("RGB", (32, 32)).save(folder / "pictures/a.png")
    pretraining.write(folder / "pretraining", STAGE)
    return folder


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}


def shell(folder: Path, command: str, after: str) -> tuple[int, str, str]:
    """Python's command with what follows it in a shell: its own exit status, what it and the rest print."""
    line = f"{sys.executable} {command} {after}; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment(), capture_output=True, text=True, timeout=TIMEOUT
    )
    return ended.returncode, ended.stdout, ended.stderr


# --- Streams ---


@pytest.mark.parametrize("command", [INSPECT, DRAW, EMOJI], ids=["inspect", "draw", "emoji"])
@pytest.mark.parametrize("buffer", ["", "-u"])
def test_nobody_reads_what_is_printed(folder: Path, command: str, buffer: str):
    """Neither a traceback nor Python's complaint at its end; 141 is what other programs end with."""
    status, out, err = shell(folder, f"{buffer} {command} 2>&1", "| (exec 0<&-; sleep 0.1)")
    assert (status, out, err) == (141, "", "")


def test_nobody_reads_an_error(folder: Path):
    status, out, err = shell(folder, "-m flux.adapters inspect none.safetensors 2>&1", "| (exec 0<&-)")
    assert (status, out, err) == (141, "", "")


def test_nobody_reads_what_is_printed_but_errors(folder: Path):
    status, out, err = shell(folder, INSPECT, "| (exec 0<&-)")
    assert (status, out, err) == (141, "", "")


def test_the_reader_has_seen_enough(folder: Path):
    status, out, err = shell(folder, f"-u {INSPECT}", "| head -1")
    assert (out.count("\n"), err) == (1, "")
    assert status in (0, 141)


@pytest.mark.parametrize("command", [INSPECT, DRAW, EMOJI], ids=["inspect", "draw", "emoji"])
@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams(folder: Path, command: str, closed: str):
    status, out, err = shell(folder, command, closed)
    assert status == 0, err
    assert err.startswith("seed: ") or err == "" or closed == "<&-"
    assert "Traceback" not in err
    assert bool(out) == (">&- 2" not in closed)


def test_standard_input_that_is_closed_has_no_prompts(folder: Path):
    status, _, err = shell(folder, f"{ROOT}/txt2image.py --model tiny --prompts-file -", "<&-")
    assert (status, err) == (2, "error: standard input holds no prompt; it should hold one a line\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_disk_that_is_full(folder: Path):
    status, _, err = shell(folder, INSPECT, ">/dev/full")
    assert (status, err) == (2, "error: cannot write the output: No space left on device\n")


# --- Ctrl-C ---


def interrupted(folder: Path, command: list[str], started: Path, seconds: float = 0.0) -> tuple[int, str]:
    """Status and stderr of a program that gets Ctrl-C so many seconds after `started` is there."""
    program = subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        while not started.exists() and program.poll() is None:
            time.sleep(0.05)
        time.sleep(seconds)
        program.send_signal(signal.SIGINT)
        _, err = program.communicate(timeout=TIMEOUT)
    finally:
        program.kill()
    return program.returncode, err


SLOW = """
import sys, runpy, time
import flux, flux.{module}
def slow(*args, **kwargs):
    open({started!r}, "w").close()
    while True:  # no long sleep: Python does not see a signal that comes just before it until it ends
        time.sleep(0.05)
flux.{module}.{name} = slow
sys.argv = {argv!r}
sys.exit(runpy.run_module({argv[0]!r})["main"]())
"""
GRID = "grid --model tiny --adapter a.safetensors --prompt apple"


@pytest.mark.parametrize(
    ("command", "module", "name"),
    [
        ("flux.adapters merge a.safetensors b.safetensors out.safetensors", "adapters.arithmetic", "merge"),
        ("flux.adapters resize a.safetensors out.safetensors --rank 1", "adapters.arithmetic", "resize"),
        (f"flux.adapters {GRID}", "pipeline", "FluxPipeline.prepare"),
        (f"flux.evaluation {GRID}", "pipeline", "FluxPipeline.prepare"),
        ("caption pictures --model tiny", "captioning.captioner", "Captioner.answers"),
        ("txt2image --model tiny apple", "pipeline", "FluxPipeline.prepare"),
    ],
)
def test_ctrl_c(folder: Path, tmp_path: Path, command: str, module: str, name: str):
    """In the middle of the work, which takes its time here; nothing is left behind."""
    before = sorted(folder.rglob("*"))
    started = tmp_path / "started"
    source = SLOW.format(module=module, name=name, argv=command.split(), started=str(started))
    status, err = interrupted(folder, ["-c", source], started)
    assert status == 130, err
    assert "Traceback" not in err
    assert sorted(folder.rglob("*")) == before


IMPORTING = """
import os, signal, sys
sys.argv = {argv!r}
{orig}
import flux
os.kill(os.getpid(), signal.SIGINT)
import time
while True:
    time.sleep(0.05)
"""


@pytest.mark.parametrize(
    "argv", [["txt2image.py"], ["flux-caption"], ["-m", "flux.adapters"], ["-m", "other"]]
)
def test_ctrl_c_while_a_program_is_imported(tmp_path: Path, argv: list[str]):
    """It ends as programs in C do; in others that import this package it is Python's KeyboardInterrupt."""
    orig = f"sys.orig_argv = ['python', *{argv!r}]" if argv[0] == "-m" else ""
    source = IMPORTING.format(argv=argv[:1], orig=orig)
    ended = subprocess.run(
        [sys.executable, "-c", source], cwd=tmp_path, env=environment(), capture_output=True, timeout=TIMEOUT
    )
    assert ended.returncode == -signal.SIGINT
    assert (ended.stderr == b"") == ("other" not in argv)


def test_ctrl_c_is_an_exception_in_a_program(monkeypatch):
    def program(_: object) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        return 0

    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # as flux.interrupts leaves it
    try:
        assert run_program(program) == 130
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_in_a_pretraining(folder: Path):
    """It saves its state, if it has begun, and lets go of its folder."""
    command = ["-m", "flux.training.pretrain", "pretraining/config.json"]
    status, err = interrupted(folder, command, folder / "pretraining/run", 3.0)
    assert status == 130, err
    assert "Traceback" not in err
    assert not (folder / "pretraining/run" / LOCK).exists()


# --- What a program can end with ---


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FluxError("no such thing"), "no such thing"),
        (PermissionError(13, "Permission denied", "secret.txt"), "cannot use secret.txt: Permission denied"),
        (MemoryError(), "there is not enough memory for this: no more to be had"),
        (RuntimeError("[malloc] Unable"), "there is not enough memory for this: [malloc] Unable"),
    ],
)  # fmt: skip
def test_errors_that_are_no_defects(error: Exception, line: str, capsys):
    def program(_: object) -> int:
        raise error

    assert run_program(program) == 2
    assert capsys.readouterr() == ("", f"error: {line}\n")


@pytest.mark.parametrize("error", [RuntimeError("shapes"), KeyError("x")])
def test_defects_keep_their_traceback(error: Exception):
    def program(_: object) -> int:
        raise error

    with pytest.raises(type(error)):
        run_program(program)


# --- Too much ---


def test_too_much_is_said_at_once(tmp_path: Path, monkeypatch):
    model, data = finetuning.write_model(tmp_path / "model"), finetuning.write_data(tmp_path / "data")
    for changes, line in (
        ({"rank": 10**9}, "--lora-rank 1000000000 must be at most 16384"),
        ({"iterations": 10**20}, "--iterations 100000000000000000000 must be at most 1000000"),
        ({"name": "../../x"}, "--name '../../x' must be a name for files in the output folder"),
        ({"name": "/tmp/x"}, "--name '/tmp/x' must be a name"),
    ):
        with pytest.raises(FluxError, match=line):
            Options(data=data, model=model, **changes)
    options = finetuning.options(model, data, tmp_path / "run", iterations=None, epochs=900_000)
    with pytest.raises(FluxError, match="iterations; 1000000 are the most"):
        finetuning.run(options)
    options = finetuning.options(model, data, tmp_path / "run", rank=10_000)
    monkeypatch.setattr("flux.machine.memory", lambda: 10**8)
    with pytest.raises(FluxError, match=r"an adapter of rank 10000 needs .* GB at least, and there are 0 GB"):
        finetuning.run(options)
    assert sorted(os.listdir(tmp_path)) == ["data", "model"]


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "x", "9" * 9, "9" * 5000])
def test_counts(text: str):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        arguments.count(text)
    assert len(str(error.value)) < 100


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("txt2image.py --model tiny --steps 10000000 apple", "a picture of 10000000 steps needs "),
        ("txt2image.py --model tiny --image-size 100000 apple", "a picture of 100000x100000 needs "),
        ("txt2image.py --model tiny --n-images 9999999 apple", "--n-images 9999999 makes 9999999 pictures; "),
        ("caption.py --model tiny pictures --beams 101", "a search with 101 beams; 100 are the most"),
    ],
)
def test_too_much_for_a_program(folder: Path, command: str, said: str):
    before = sorted(folder.rglob("*"))
    status, out, err = shell(folder, f"{ROOT}/{command}", "")
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {said}")
    assert err.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


# --- One folder, two runs ---


def test_two_trainings_in_one_folder(tmp_path: Path):
    model, data = finetuning.write_model(tmp_path / "model"), finetuning.write_data(tmp_path / "data")
    options = finetuning.options(model, data, tmp_path / "run")
    with locked(tmp_path / "run"), pytest.raises(FluxError, match="run is in use by process"):
        finetuning.run(options)
    finetuning.run(options)
    assert not (tmp_path / "run" / LOCK).exists()


def test_two_pretrainings_in_one_folder(tmp_path: Path):
    config = pretraining.config(tmp_path, {**STAGE, "n_epochs": 1})
    with locked(tmp_path / "run"), pytest.raises(FluxError, match="run is in use by process"):
        Run(config, quiet=True).execute()
    Run(config, quiet=True).execute()
    assert not (tmp_path / "run" / LOCK).exists()


def test_two_captionings_of_one_folder(folder: Path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["caption.py", str(folder / "pictures"), "--model", "tiny"])
    with locked(folder / "pictures"):
        assert caption.main() == 2
    assert "pictures is in use by process" in capsys.readouterr().err
    assert os.listdir(folder / "pictures") == ["a.png"]
