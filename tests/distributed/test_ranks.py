"""Several ranks on one machine, over the ring backend, as mlx.launch starts them and by hand."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import txt2image
from flux import distributed, images
from flux.distributed import share
from tests import tiny_pipeline

ROOT = Path(__file__).parents[2]
LAUNCH = Path(sys.executable).parent / "mlx.launch"
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
SPLIT = ("--model", "tiny", "--steps", "2", "--force-shard", *COMMON, "--output", "split.png", PROMPT)
ONE = (
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
    PROMPT,
)
FOLDER = (
    "--model",
    "model",
    "--steps",
    "2",
    "--prompts",
    "prompts",
    "--n-images",
    "2",
    *COMMON,
    "--output",
    "made",
)
BAD = ("--model", "none", PROMPT)
MISSING = ("--model", "model", "--ae", "only0.safetensors", PROMPT)  # rank 0 alone has the file
OTHER = ("--model", "model", "--transformer", "own.safetensors", PROMPT)  # rank 1 has another
HELP = ("--nonsense", PROMPT)
COMMANDS = (MANY, SPLIT, ONE, FOLDER, BAD, MISSING, OTHER, HELP)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_pipeline.write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def reports(tmp_path_factory, model):
    """Folder and every rank's report of the program, by the number of ranks, each started once."""
    made: dict[int, tuple[Path, list[dict]]] = {}

    def report(size: int) -> tuple[Path, list[dict]]:
        if size not in made:
            folder = tmp_path_factory.mktemp(f"ranks{size}")
            for rank in range(size):
                prepare(folder / f"rank{rank}", rank, model)
            program = [sys.executable, "-m", "tests.distributed.program", str(folder), json.dumps(COMMANDS)]
            launch = [LAUNCH, "-n", str(size), "--backend", "ring", "--"] if size > 1 else []
            options = {"env": environment(), "stdin": subprocess.DEVNULL, "timeout": 300, "text": True}
            done = subprocess.run([*launch, *program], capture_output=True, **options)
            paths = [folder / f"report{rank}.json" for rank in range(size)]
            assert all(path.exists() for path in paths), done.stdout + done.stderr
            made[size] = folder, [json.loads(path.read_text()) for path in paths]
        return made[size]

    return report


def prepare(folder: Path, rank: int, model: Path) -> None:
    """What a rank's machine has; prompts are on rank 0 alone."""
    folder.mkdir()
    (folder / "model").symlink_to(model)
    own = tiny_pipeline.tiny.tensors_of(model / "transformer")
    own["x_embedder.bias"] = own["x_embedder.bias"] + (rank == 1)
    tiny_pipeline.tiny.save_tensors(folder / "own.safetensors", own)
    if rank == 0:
        shutil.copy(next((model / "vae").glob("*.safetensors")), folder / "only0.safetensors")
        (folder / "prompts.txt").write_text(f"{PROMPT}\ntwo green birds\n")
        (folder / "prompts").mkdir()
        for name in "abc":
            (folder / f"prompts/{name}.txt").write_text(f"{PROMPT} {name}\n")
