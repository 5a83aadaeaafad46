"""Several ranks on one machine, over the ring backend, as mlx.launch starts them and by hand."""

import json
import platform
import random
import re
import shutil
import signal
import subprocess
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flux import __version__, images
from flux.distributed.ranks import Ranks
from flux.distributed.sharding import shard_range
from flux.errors import FluxError
from tests import redux_files, tiny_pipeline

from .launch import ROOT, TIMEOUT, by_hand, run_program

SIZES = (1, 2, 3, 4)
PROMPT = "a red apple on a blue background"
COMMON = ("--seed", "5", "--image-size", "32x48", "--save-raw")
# As many pictures as no number of ranks divides; two prompts; a grid that is split; prompts of a folder.
MANY = (
    "--model",
    "model",
    "--prompts-file",
    "prompts.txt",
    "--n-images",
    "3",
    *COMMON,
    "--output",
    "many.png",
)
MANY = (*MANY, "--cfg-scale", "2", "--negative-prompt", "two green birds", "--decoding-batch-size", "2")
MANY = (*MANY, "--steps", "4", "--cache", "1e3")
REDUX = ("--redux", "cat.png:0.8", "--redux-model", "redux")  # rank 0 alone has the picture
SPLIT = ("--model", "tiny", "--steps", "2", "--force-shard", *COMMON, "--output", "split.png", PROMPT)
EDIT = ("--image", "photo.png", "--mask", "mask.png", "--strength", "0.8")  # rank 0 alone has these
ONE = (
    *EDIT,
    "--model",
    "model",
    "--steps",
    "2",
    "--seed",
    "9",
    "--image-size",
    "32x48",
    "--output",
    "one.png",
    *REDUX,
    "--cache",
    "0",
    PROMPT,
)
FOLDER = (
    *EDIT,
    "--model",
    "model",
    "--steps",
    "2",
    "--prompts",
    "prompts",
    "--n-images",
    "2",
    *COMMON,
    *REDUX,
    "--output",
    "made",
)
BAD = ("--model", "none", PROMPT)
MISSING = ("--model", "model", "--ae", "only0.safetensors", PROMPT)  # rank 0 alone has the file
OTHER = ("--model", "model", "--transformer", "own.safetensors", PROMPT)  # rank 1 has another
WRONG = ("--nonsense", PROMPT)
COMMANDS = (MANY, SPLIT, ONE, FOLDER, BAD, MISSING, OTHER, WRONG)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    heads = replace(tiny_pipeline.FLUX, hidden_size=128, num_heads=4)  # one for each of four ranks
    return tiny_pipeline.write_checkpoint(tmp_path_factory.mktemp("checkpoint"), flow=heads)


@pytest.fixture(scope="module")
def reports(tmp_path_factory, model):
    """Folder and every rank's report of the program, by the number of ranks, each started once."""
    made: dict[int, tuple[Path, list[dict]]] = {}

    def report(size: int) -> tuple[Path, list[dict]]:
        if size not in made:
            folder = tmp_path_factory.mktemp(f"ranks{size}")
            for rank in range(size):
                prepare(folder / f"rank{rank}", rank, model)
            commands = COMMANDS if size > 1 else COMMANDS[:4]
            program = ["-m", "tests.distributed.program", str(folder), json.dumps(commands)]
            run_program(size, program, folder)
            paths = [folder / f"report{rank}.json" for rank in range(size)]
            assert all(path.exists() for path in paths)
            made[size] = folder, [json.loads(path.read_text()) for path in paths]
        return made[size]

    return report


def prepare(folder: Path, rank: int, model: Path) -> None:
    """What a rank's machine has; prompts are on rank 0 alone."""
    folder.mkdir()
    (folder / "model").symlink_to(model)
    redux_files.write_diffusers(folder / "redux")
    own = mx.load(str(next((model / "transformer").glob("*.safetensors"))))
    own["x_embedder.bias"] = own["x_embedder.bias"] + (rank == 1)
    mx.save_safetensors(str(folder / "own.safetensors"), own)
    if rank == 0:
        images.save(folder / "cat.png", np.arange(40 * 32 * 3, dtype=np.uint8).reshape(40, 32, 3))
        shutil.copy(next((model / "vae").glob("*.safetensors")), folder / "only0.safetensors")
        (folder / "prompts.txt").write_text(f"{PROMPT}\ntwo green birds\n")
        photo = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
        images.save(folder / "photo.png", photo)
        images.save(
            folder / "mask.png", np.where(photo[:1] > 100, 255, 0).repeat(40, axis=0).astype(np.uint8)
        )
        (folder / "prompts").mkdir()
        for name in "abc":
            (folder / f"prompts/{name}.txt").write_text(f"{PROMPT} {name}\n")


@pytest.mark.parametrize("size", SIZES[1:])
def test_split_networks_give_the_same(reports, size):
    for report in reports(size)[1]:
        assert len(report["errors"]) == (13 if size == 3 else 5)
        assert max(report["errors"].values()) <= 1e-5, report["errors"]


@pytest.mark.parametrize("size", SIZES[1:])
def test_ranks_of_a_split_network_skip_the_same_blocks(reports, size):
    for report in reports(size)[1]:
        saved, saved_split, error, saved_unlike = report["cached"]
        assert saved == saved_split > 0
        assert error <= 1e-5
        assert saved_unlike == 0  # one rank that would compute is enough


@pytest.mark.parametrize("size", SIZES[1:])
def test_as_few_messages_as_can_be(reports, size):
    """Two sums for each of two double blocks, one for each of three single blocks; gathers for modulation."""
    for report in reports(size)[1]:
        assert report["messages"] == {"all_sum": 2 * 2 + 3, "all_gather": 2 * 2 + 3 + 1}


@pytest.mark.parametrize("size", SIZES[1:])
def test_a_rank_has_its_part_in_memory_and_no_more(reports, size):
    for report in reports(size)[1]:
        for memory in report["memory"]:  # split, and gathered layer by layer
            assert memory["peak"] <= 1.15 * memory["total"] / size + memory["replicated"]


@pytest.mark.parametrize("size", SIZES[1:])
def test_layers_that_are_gathered_give_the_same_to_the_bit(reports, size):
    assert [report["fully_sharded"] for report in reports(size)[1]] == [[True] * 3] * size


@pytest.mark.parametrize("size", SIZES[1:])
def test_work_is_shared_out(reports, size):
    average = sum(range(size)) / size
    for report in reports(size)[1]:
        assert report["dealt"] == [[[10 * i + (i - 1) % size] * 2] * i for i in range(1, 6)]
        assert report["mean"] == [[[average] * 3] * 2, [1.0] * 4, "mlx.core.bfloat16"]


VERSION = "differs from rank 0 in its version of flux-mlx"
OR = "or make a picture for each rank"


@pytest.mark.parametrize("size", SIZES[1:])
def test_what_goes_wrong_on_one_rank_is_said_on_all(reports, size):
    last = size - 1
    for report in reports(size)[1]:
        said = {name: text.replace(platform.node(), "HOST") for name, text in report["faults"].items()}
        group = (
            f" cannot be split over {size} ranks: its inputs are quantized in groups of 64, and one would "
        )
        assert group in said.pop("group")
        assert said == {
            "on all ranks": f"on rank {last} (HOST): no such file",
            "map": f"on rank {last} (HOST): no such file",
            "agree": "rank 1 (HOST) differs from rank 0 in its size: 1, not 0",
            "agree on all": "",
            "version": f"rank 1 (HOST) {VERSION}: 0.0, not {__version__}",
            "heads": f"the model's 1 heads cannot be split over {size} ranks: start 1 at most, {OR}",
        }


# --- txt2image.py ---


def pictures(folder: Path, names: list[str]) -> dict[str, np.ndarray]:
    return {name: images.load(folder / "rank0" / name)[0] for name in names}


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))


MANY_FILES = [f"many.{i}.png" for i in range(6)]
FOLDER_FILES = [f"made/{name}.{i}.png" for name in "abc" for i in range(2)]


@pytest.mark.parametrize("size", SIZES[1:])
def test_shared_out_pictures_are_the_same_files(reports, size):
    alone, several = reports(1)[0], reports(size)[0]
    for name in MANY_FILES + FOLDER_FILES:
        assert (alone / "rank0" / name).read_bytes() == (several / "rank0" / name).read_bytes(), name
    first = pictures(alone, MANY_FILES)
    assert len({picture.tobytes() for picture in first.values()}) == 6


@pytest.mark.parametrize("size", SIZES[1:])
def test_split_models_make_the_same_pictures(reports, size):
    """Up to the rounding to 8 bits. The one picture is also split without being asked for."""
    names = ["one.png"] if size == 4 else ["split.0.png", "one.png"]
    alone, several = pictures(reports(1)[0], names), pictures(reports(size)[0], names)
    for name in names:
        difference = np.abs(alone[name].astype(int) - several[name])
        assert difference.max() <= 1
        assert difference.mean() < 0.01


@pytest.mark.parametrize("size", SIZES[1:])
def test_rank_0_alone_prints_and_writes(reports, size):
    folder, (first, *others) = reports(size)
    written = {path.split("/", 1)[0] for path in files(folder)}
    assert written == {"rank0"}
    split = [(2, "", "")] if size == 4 else [(0, "", "")]
    for report in others:
        ended = [tuple(end) for end in report["scripts"]]
        assert ended == [(0, "", ""), *split, (0, "", ""), (0, "", ""), *[(2, "", "")] * 4]
    ended = [tuple(end) for end in first["scripts"]]
    lines = dict(
        zip(("many", "split", "one", "folder", "bad", "missing", "other", "wrong"), ended, strict=True)
    )
    # Of all ranks: six pictures, two passes, four steps of five blocks, of which one saves four.
    saved = "step cache: 48 of 240 block evaluations saved\n"
    assert lines["many"] == (0, "\n".join(MANY_FILES) + "\n", saved)
    assert lines["one"] == (0, "one.png\n", "step cache: 0 of 10 block evaluations saved\n")
    assert lines["folder"][1].split() == FOLDER_FILES
    if size == 4:
        heads = "error: the model's 3 heads cannot be split over 4 ranks: start 3 at most"
        assert lines["split"][2] == f"{heads}, {OR}\n"
    assert lines["bad"][2].startswith("error: 'none' is neither a model")
    missing = f"error: on rank 1 ({platform.node()}): only0.safetensors"
    assert lines["missing"][2].startswith(missing)
    other = f"error: rank 1 ({platform.node()}) differs from rank 0 in its transformer: "
    assert lines["other"][2].startswith(other)
    for name in ("bad", "missing", "other", "wrong"):
        status, out, err = lines[name]
        assert (status, err.count("\n")) == (2, 1)
        assert out == "" or out.startswith("seed: ")


# --- Ranks that die ---


def test_a_rank_is_killed(tmp_path):
    script = [ROOT / "txt2image.py", "--model", "tiny", "--steps", 100000, "--force-shard", PROMPT]
    with by_hand(3, script, tmp_path) as ranks:
        assert ranks[0].stdout.readline().startswith("seed: ")
        time.sleep(0.5)
        ranks[2].send_signal(signal.SIGKILL)
        for rank in range(2):
            _, err = ranks[rank].communicate(timeout=TIMEOUT)
            assert ranks[rank].returncode == 2, err
            name = f"error: rank {rank} of 3 ({platform.node()}): another rank has ended or cannot be reached"
            assert name in err
            assert "Traceback" not in err
    assert files(tmp_path) == []


SILENT = """
import flux, sys, time
from flux.distributed.ranks import Ranks
ranks = Ranks()
if ranks.rank == 1:
    time.sleep(600)
ranks.barrier(patience=1)
"""


def test_a_rank_says_nothing(tmp_path):
    with by_hand(2, ["-c", SILENT], tmp_path) as ranks:
        _, err = ranks[0].communicate(timeout=TIMEOUT)
        assert ranks[0].returncode == 2
    assert err == f"error: rank 0 of 2 ({platform.node()}): no word from another rank in 1 s\n"


def test_shard_ranges():
    for total in (3, 5, 24, 24576):
        for size in (1, 2, 3, 4):
            shares = [shard_range(total, rank, size) for rank in range(size)]
            assert [i for own in shares for i in own] == list(range(total))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


# --- Ranks that do not come ---

WORKING = """
import flux, sys, time
from flux.arguments import run_program
def run(ranks):
    for _ in range(10**6):
        ranks.barrier(patience=4)
        time.sleep(0.02)
sys.exit(run_program(run))
"""


def test_a_rank_that_does_not_come(tmp_path, monkeypatch):
    """The first one waits for its neighbour in MLX's accept, the second in its attempts to connect."""
    monkeypatch.setenv("FLUX_MEETING_TIMEOUT", "1.5")
    with by_hand(3, ["-c", WORKING], tmp_path) as ranks:
        ranks[1].kill()
        for rank in (0, 2):
            out, err = ranks[rank].communicate(timeout=TIMEOUT)
            assert (ranks[rank].returncode, out) == (2, "")
            why = "the other ranks have not come in 1.5 s: check that all were started"
            assert err == f"error: rank {rank} ({platform.node()}): {why}\n"


COMING_ONLY = """
import mlx.core as mx, os, time
if os.environ["MLX_RANK"] == "1":
    mx.distributed.init()
    time.sleep(600)
"""


def test_a_rank_that_comes_and_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("FLUX_MEETING_TIMEOUT", "3")
    with by_hand(2, ["-c", COMING_ONLY + WORKING], tmp_path) as ranks:
        _, err = ranks[0].communicate(timeout=60)
        assert (ranks[0].returncode, err.count("\n")) == (2, 1)
    assert "rank 0 of 2" in err
    assert "no word from another rank in" in err


def test_a_bound_that_is_no_number(monkeypatch):
    for text in ("soon", "0", "-1", "nan", "inf"):
        monkeypatch.setenv("FLUX_MEETING_TIMEOUT", text)
        with pytest.raises(FluxError, match=f"FLUX_MEETING_TIMEOUT is '{text}'; it should be a"):
            Ranks()


MARKING = """
import os
def mark(stage):
    open(f"{stage}-{os.environ['MLX_RANK']}", "w").close()
mark("begun")
import flux, sys, time
from flux.arguments import run_program
mark("imported")
def run(ranks):
    mark("met")
    for number in range(10**6):
        ranks.barrier(patience=4)
        if number == 3:
            mark("working")
        time.sleep(0.01)
sys.exit(run_program(run))
"""
STAGES = ("", "begun", "imported", "met", "working")  # of a rank; "": it has only been started
SECOND = 0.3  # at most, to the other kill


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists() and process.poll() is None:
        time.sleep(0.01)


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_that_are_killed(tmp_path, monkeypatch, stage):
    """Two groups of three at each stage, two kills in each: twenty in all. The third rank ends by itself.

    Stages and not seconds, in which a slow machine has not even begun. The bound is in the line that the
    third one ends with; a test that waits for ever would be this one's failure.
    """
    monkeypatch.setenv("FLUX_MEETING_TIMEOUT", "2")
    chance = random.Random(STAGES.index(stage))
    left: list[tuple[int, subprocess.Popen]] = []
    with ExitStack() as stack:
        for number in range(2):
            folder = tmp_path / str(number)
            folder.mkdir()
            group = stack.enter_context(by_hand(3, ["-c", MARKING], folder))
            first, second, third = chance.sample(range(3), 3)
            if stage:
                wait_for(folder / f"{stage}-{first}", group[first])
            group[first].kill()
            time.sleep(chance.uniform(0, SECOND))
            group[second].kill()
            left.append((third, group[third]))
        for third, process in left:
            _, err = process.communicate(timeout=TIMEOUT)
            assert process.returncode == 2, err
            (line,) = [line for line in err.splitlines() if not line.startswith("[ring]")]  # MLX's
            assert line.startswith(f"error: rank {third} "), err
            ends = "have not come in 2 s|no word from another rank in|another rank has ended|cannot meet"
            assert re.search(ends, line), err
