"""Pretraining by two processes: the same networks in both, resumed to the bit, and one process's losses."""

import json
from pathlib import Path

import mlx.core as mx
import pytest

from flux.training.report import read_lines

from .. import pretraining
from .launch import TIMEOUT, by_hand
from .pretrain_program import execute

VAE = {"name": "vae", "n_epochs": 1, "train_vae": True, "gan_training": True, "kl_warmup_steps": 2}
FLOW = {"name": "flow", "n_epochs": 2, "train_diff": True, "use_ema": True, "cfg_dropout_prob": 0.5}


def losses(folder: Path) -> list[dict[str, float]]:
    graph = folder / "run/graph"
    return [
        line["metrics"]
        for step in ("vae", "flow")
        for line in read_lines(graph / f"training_metrics_{step}.jsonl")
    ]


def steps(batch_size: int, **changes) -> list[dict]:
    return [{**step, "batch_size": batch_size, **changes} for step in (VAE, FLOW)]


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    often = {"output": {"checkpoint_save_interval": 2}}
    pretraining.write(folder / "straight", *steps(3), **often)
    pretraining.write(folder / "resumed", *steps(3), **often)
    pretraining.write(folder / "shared", *one_group(3))
    with by_hand(2, ["-m", "tests.distributed.pretrain_program", folder], folder) as ranks:
        errors = [rank.communicate(timeout=TIMEOUT)[1] for rank in ranks]
    assert (folder / "found1.json").is_file(), errors
    return folder


def one_group(batch_size: int) -> list[dict]:
    """Steps whose optimizer does not blow differences of rounding up, and whose captions all stay."""
    vae, flow = steps(batch_size, optimization={"optimizers": {}}, cfg_dropout_prob=0)
    vae["optimization"] = {"optimizers": {"vae": "SGD", "discriminator": "SGD"}}
    flow["optimization"] = {"optimizers": {"flow": "SGD"}}
    return [vae, flow]


def test_both_ranks_have_the_same_networks_and_resume_to_the_bit(done):
    found = [json.loads((done / f"found{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    assert found[0]["resumed"] == found[0]["straight"]
    assert losses(done / "resumed") == losses(done / "straight")
    assert len(losses(done / "straight")) == 2 + 4


def test_two_ranks_have_the_losses_of_one_process_with_the_whole_batch(done, tmp_path):
    """Their random numbers are their own, so here there are none."""
    mx.disable_compile()
    try:
        execute(pretraining.write(tmp_path, *one_group(6)), random=False)
    finally:
        mx.enable_compile()
    alone, shared = losses(tmp_path), losses(done / "shared")
    assert len(alone) == len(shared) == 2 + 4
    for one, two in zip(alone, shared, strict=True):
        assert two == pytest.approx(one, rel=2e-5)
    assert alone[0]["vae"] != pytest.approx(alone[1]["vae"], rel=1e-3)  # it moves
