"""dreambooth.py on 1 to 4 ranks, each with a disk of its own: the same adapter, and what if one fails."""

import json
import platform
import shutil
import signal
import subprocess
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flux import images
from flux.training.report import read_lines

from .. import finetuning
from ..datasets import write_pictures
from . import finetune_program
from .launch import ROOT, TIMEOUT, by_hand, run_program

SIZES = (1, 2, 3, 4)
HOST = platform.node()
BATCHES, UPDATES = 12, 3  # batches an update, of all ranks
TRAIN = ("data", "--model", "model", "--resolution", 64, "--batch-size", 2, "--buckets", "--flip")
TRAIN += ("--random-crop", "--repeats", 3, "--caption-dropout", 0.3, "--validation-split", 0.2, "--ema", 0.9)
TRAIN += ("--lora-rank", 2, "--lora-dropout", 0.2, "--learning-rate", "1e-2", "--progress-prompt", "a dog")
# What only some ranks have, or have otherwise, and where there is a run already.
BAD = ("--model", "model", "--output-dir", "bad", "--resolution", 64)
FAULTS = {
    "missing": ("data", *BAD, "--ae", "only0.safetensors"),
    "other": ("data", *BAD, "--transformer", "own.safetensors"),
    "data": ("other", *BAD),
    "begun": ("data", *BAD[:2], "--output-dir", "begun"),
    "wrong": ("data", *BAD, "--lora-rank", 0),
}


def commands(size: int) -> list[list[str]]:
    def counted(updates: int) -> tuple[object, ...]:
        return ("--iterations", updates * BATCHES // size)

    train = (*TRAIN, "--grad-accumulate", BATCHES // size)
    if size == 1:
        made = [(*train, *counted(UPDATES), "--output-dir", "run")]
        made += [(*train, *counted(UPDATES - 1), "--output-dir", "half")]
    else:
        made = [("--resume", "half", *counted(UPDATES), *(("--shard-base",) if size < 4 else ()))]
        made += [(*train, *counted(UPDATES), "--output-dir", "run"), *FAULTS.values()]
    return [list(map(str, command)) for command in made]


def prepare(folder: Path, rank: int, model: Path) -> None:
    """A rank's disk. Rank 1's transformer has other weights; rank 0 alone has only0.safetensors."""
    sizes = {f"{i}.png": (80, 64) if i else (64, 64) for i in range(5)}
    for name in ("data", "other"):
        write_pictures(folder / name, sizes)
        for i in range(5):
            (folder / name / f"{i}.txt").write_text(f"picture {i}, of an sks dog")
    (folder / "model").symlink_to(model)
    own = mx.load(str(next((model / "transformer").glob("*.safetensors"))))
    own["x_embedder.bias"] = own["x_embedder.bias"] + (rank == 1)
    mx.save_safetensors(str(folder / "own.safetensors"), own)
    if rank == 1:
        (folder / "other/2.txt").write_text("another caption")
    if rank == 0:
        shutil.copy(next((model / "vae").glob("*.safetensors")), folder / "only0.safetensors")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return Path(finetuning.write_model(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="module")
def reports(tmp_path_factory, model):
    """Folder and every rank's report, by the number of ranks, each started once."""
    made: dict[int, tuple[Path, list[list]]] = {}

    def report(size: int) -> tuple[Path, list[list]]:
        if size not in made:
            folder = tmp_path_factory.mktemp(f"ranks{size}")
            for rank in range(size):
                prepare(folder / f"rank{rank}", rank, model)
            if size > 1:
                alone = report(1)[0] / "rank0"
                shutil.copytree(alone / "half", folder / "rank0/half")
                shutil.copytree(alone / "half/states", folder / "rank0/begun/states")  # without its adapter
            program = ["-m", finetune_program.__name__, folder, json.dumps(commands(size))]
            run_program(size, program, folder)
            paths = [folder / f"report{rank}.json" for rank in range(size)]
            made[size] = folder, [json.loads(path.read_text()) for path in paths]
        return made[size]

    return report


def error(a: Path, b: Path) -> float:
    """The largest relative difference of two files' tensors."""
    one, other = mx.load(str(a)), mx.load(str(b))
    assert one.keys() == other.keys()
    return max((mx.linalg.norm(one[k] - other[k]) / mx.linalg.norm(other[k])).item() for k in one)


def losses(run: Path) -> list[float]:
    """Of the updates, and of the validation at the end."""
    lines = list(read_lines(run / "events.jsonl"))
    return [line["loss"] for line in lines if line["event"] == "update"] + [lines[-1]["loss"]]


@pytest.mark.parametrize("size", SIZES[1:])
def test_the_same_adapter_from_any_number_of_ranks(reports, size):
    alone, several = (reports(n)[0] / "rank0/run" for n in (1, size))
    assert losses(several) == pytest.approx(losses(alone), rel=2e-5)
    assert error(several / "final_adapters.safetensors", alone / "final_adapters.safetensors") < 1e-5
    first, last = (sorted(run.glob("progress/*.png"))[-1] for run in (alone, several))
    assert np.abs(images.load(first)[0].astype(int) - images.load(last)[0]).max() <= 1


@pytest.mark.parametrize("size", SIZES[1:])
def test_resumed_by_another_number_of_ranks(reports, size):
    """Two and three of them with the base shared out among them, too."""
    alone, half = reports(1)[0] / "rank0/run", reports(size)[0] / "rank0/half"
    assert losses(half) == pytest.approx(losses(alone), rel=2e-5)
    assert error(half / "final_adapters.safetensors", alone / "final_adapters.safetensors") < 1e-5
    states = sorted(path.name for path in (half / "states").iterdir())
    assert states == [f"{n * BATCHES:08d}" for n in (UPDATES - 1, UPDATES)]


@pytest.mark.parametrize("size", SIZES[1:])
def test_everything_is_encoded_once_and_rank_0_alone_writes_the_rest(reports, size):
    (alone,), several = reports(1)[1], reports(size)[1]
    # What was resumed came with a cache, on rank 0 alone: nothing of it is encoded again.
    assert [ended[0][3:] for ended in several] == [[0, 0]] * size
    for column in (3, 4):
        own = [ended[1][column] for ended in several]
        assert sum(own) == alone[0][column]
        assert max(own) - min(own) <= 1
    folder = reports(size)[0]
    for name in ("half", "run"):
        caches = [
            {path.name: path.read_bytes() for path in folder.glob(f"rank{rank}/{name}/cache/*/*")}
            for rank in range(size)
        ]
        assert len(caches[0]) > 10
        assert all(cache == caches[0] for cache in caches)
        for rank in range(1, size):
            assert [path.name for path in (folder / f"rank{rank}" / name).iterdir()] == ["cache"]


@pytest.mark.parametrize("size", SIZES[1:])
def test_each_ends_alike_and_rank_0_alone_says_why(reports, size):
    folder, (first, *others) = reports(size)
    assert [ended[:2] for ended in first[:2]] == [
        [0, f"{name}/final_adapters.safetensors\n"] for name in ("half", "run")
    ]
    for report in others:
        assert [ended[:3] for ended in report] == [[0, "", ""]] * 2 + [[2, "", ""]] * len(FAULTS)
    said = {name: ended[2].splitlines()[-1] for name, ended in zip(FAULTS, first[2:], strict=True)}
    assert [ended[0] for ended in first[2:]] == [2] * len(FAULTS)
    assert said["missing"].startswith(f"error: on rank 1 ({HOST}): only0.safetensors")
    assert said["other"].startswith(f"error: rank 1 ({HOST}) differs from rank 0 in its transformer: ")
    assert said["data"].startswith(f"error: rank 1 ({HOST}) differs from rank 0 in its data set: ")
    assert said["begun"].startswith("error: begun holds a run")
    assert said["wrong"].startswith("error: argument --lora-rank")
    assert not list(folder.glob("rank*/bad"))


def wait_for(rank: subprocess.Popen, beginning: str) -> None:
    """Until the rank has said so on its standard error."""
    said = []
    while not (said and said[-1].startswith(beginning)):
        said.append(rank.stderr.readline())
        assert said[-1], said


def wait_for_file(path: Path) -> None:
    end = time.monotonic() + TIMEOUT
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_interrupted_and_killed(tmp_path, model):
    """Ctrl-C at one stops both, with a state; when one is killed the other ends, and no state is torn."""
    data = finetuning.write_data(tmp_path / "data")
    script = [ROOT / "dreambooth.py", data, "--model", model, "--resolution", 64, "--lora-rank", 2]
    script += ["--iterations", 20000, "--state-every", 20]
    with by_hand(2, script, tmp_path) as ranks:
        wait_for(ranks[0], "memory: about")
        wait_for_file(tmp_path / "mlx_output/events.jsonl")
        ranks[1].send_signal(signal.SIGINT)
        said = [rank.communicate(timeout=100)[1] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [130, 130], said
    assert said[0].endswith("stopped; go on with: python dreambooth.py --resume mlx_output\n")
    before = int(max(path.name for path in (tmp_path / "mlx_output/states").iterdir()))
    assert before % 2 == 0
    with by_hand(2, [ROOT / "dreambooth.py", "--resume", "mlx_output"], tmp_path) as ranks:
        wait_for(ranks[0], f"going on from iteration {before // 2}")
        wait_for_file(tmp_path / f"mlx_output/states/{(before // 40 + 1) * 40:08d}")
        ranks[1].send_signal(signal.SIGKILL)
        _, err = ranks[0].communicate(timeout=100)
    assert ranks[0].returncode == 2
    assert f"error: rank 0 of 2 ({HOST}): another rank has ended or cannot be reached" in err
    assert "Traceback" not in err
    names = [path.name for path in (tmp_path / "mlx_output/states").iterdir()]
    assert all(name.isdigit() for name in names)
    assert not list((tmp_path / "mlx_output").glob("*.safetensors"))
