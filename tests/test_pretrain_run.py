"""The pipeline as a whole: steps, transitions, resuming after a kill, what is left behind."""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from flux.errors import FluxError
from flux.pipeline import FluxPipeline
from flux.training.pretrain.run import Run
from flux.training.pretrain.stage import Stage
from flux.training.pretrain.state import Progress
from flux.training.pretrain.validate import load
from flux.training.report import read_lines
from flux.training.schedules import Cosine, Exponential, Plateau, ReduceOnPlateau, Step

from . import pretraining

ROOT = Path(__file__).parents[1]
VAE = {"name": "vae", "n_epochs": 1, "train_vae": True, "kl_warmup_steps": 4}
GAN = {
    "name": "vae_gan",
    "max_steps": 5,
    "train_vae": True,
    "gan_training": True,
    "train_spade": True,
    "r1_interval": 3,
    "instance_noise_std": 0.1,
    "use_ema": True,
    "optimization": {
        "optimizers": {"vae": "Adam", "discriminator": {"type": "RMSprop", "lr": 5e-4}},
        "schedulers": {"vae": "cosine", "discriminator": {"type": "reduce_on_plateau", "patience": 0}},
    },
}
FLOW = {
    "name": "flow",
    "n_epochs": 1,
    "train_diff": True,
    "train_text_encoders": True,
    "use_ema": True,
    "optimization": {"optimizers": {"text_encoder": {"type": "SGD", "momentum": 0.9}}},
}


@pytest.fixture(autouse=True, scope="module")
def no_compiler():
    """On a CPU every compiled kernel costs seconds of g++; what is computed is the same."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def nothing(stage: Stage, progress: Progress) -> None:
    pass


def run(folder: Path, *steps: dict, resume: bool = False, hook=nothing, **sections) -> Run:
    made = Run(pretraining.config(folder, *steps, **sections), resume, quiet=True, hook=hook)
    made.execute()
    return made


def weights(networks) -> dict[str, bytes]:
    return {name: np.array(array).tobytes() for name, array in tree_flatten(networks.parameters())}


def metrics(folder: Path, step: str) -> list[dict]:
    """The lines of a step without what differs between two runs: times and sessions."""
    lines = list(read_lines(folder / "run" / "graph" / f"training_metrics_{step}.jsonl"))
    for line in lines:
        for name in ("timestamp", "session", "batch_time"):
            assert name in line
            del line[name]
    return lines


# --- kills ---


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> tuple[Path, Run]:
    """A run of three steps that nothing interrupts."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, run(folder, VAE, GAN, FLOW, **OFTEN)


OFTEN = {"output": {"checkpoint_save_interval": 2}}  # steps
TOTAL = 3 + 5 + 3


def test_stopped_again_and_again_it_is_the_straight_run(straight, tmp_path):
    """As a kill between two steps: what is in memory is lost, and the checkpoints are up to two steps old.

    Here samples are drawn, in the straight run not: they do not touch the training either.
    """
    output = {"samples_per_checkpoint": 1, **OFTEN["output"]}
    expected_folder, expected = straight
    sessions, limit = 0, 0

    def stop(stage: Stage, progress: Progress) -> None:
        if progress.global_step > limit:
            raise Stopped

    while True:
        sessions += 1
        limit += 3  # with a checkpoint every two steps: each session gets at least one farther
        try:
            resumed = run(tmp_path, VAE, GAN, FLOW, resume=True, hook=stop, output=output)
            break
        except Stopped:
            continue
    assert sessions > 3
    assert weights(resumed.networks) == weights(expected.networks)
    for step in ("vae", "vae_gan", "flow"):
        assert metrics(tmp_path, step) == metrics(expected_folder, step)
    found = [line["session"] for line in read_lines(tmp_path / "run/graph/training_metrics_flow.jsonl")]
    assert found == sorted(found)
    assert len(set(found)) > 1


def test_killed_at_ten_random_moments_it_is_the_straight_run_to_the_bit(straight, tmp_path):
    """kill -9 of the real program, at moments that know nothing of its steps: mostly in a step or a save."""
    path = pretraining.write(tmp_path, VAE, GAN, FLOW, training={"workers": 2}, **OFTEN)
    command = [sys.executable, "-m", "flux.training.pretrain", str(path), "--resume"]
    environment = {**os.environ, "MLX_DISABLE_COMPILE": "1", "PYTHONPATH": str(ROOT)}
    rng, kills, finished = random.Random(0), 0, False
    while not finished:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, cwd=tmp_path, text=True)
        if kills < 10:
            for _ in range(rng.randint(0, 2)):  # lines of progress; then a little more
                process.stderr.readline()
            time.sleep(rng.uniform(0, 0.3))
            finished = process.poll() is not None
            if not finished:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
        else:
            finished = True
        _, rest = process.communicate()
        assert "error" not in rest, rest
    assert process.returncode in (0, -9)
    assert kills >= 5  # so many at least hit it at work
    done = run(tmp_path, VAE, GAN, FLOW, resume=True, training={"workers": 2})
    assert done.progress.global_step == TOTAL
    assert weights(done.networks) == weights(straight[1].networks)
    for step in ("vae", "vae_gan", "flow"):
        assert metrics(tmp_path, step) == metrics(straight[0], step)


def test_sigterm_saves_a_state_that_goes_on_to_the_same_result(straight, tmp_path):
    path = pretraining.write(tmp_path, VAE, GAN, FLOW, output={"checkpoint_save_interval": 1000})
    command = [sys.executable, "-m", "flux.training.pretrain", str(path), "--resume"]
    environment = {**os.environ, "MLX_DISABLE_COMPILE": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, cwd=tmp_path, text=True)
    said = ""
    while "Batch" not in said:  # after the step's heading
        said = process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=100)
    assert process.returncode == 130, rest
    assert "stopping: saving the state\n" in rest
    assert rest.endswith("stopped; go on with the same command and --resume\n")
    (state,) = (tmp_path / "run/checkpoints").iterdir()
    assert "Batch 1/3" in said
    assert int(state.name[:9]) < TOTAL
    done = run(tmp_path, VAE, GAN, FLOW, resume=True, output={"checkpoint_save_interval": 1000})
    assert weights(done.networks) == weights(straight[1].networks)
    for step in ("vae", "vae_gan", "flow"):
        assert metrics(tmp_path, step) == metrics(straight[0], step)


def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(straight, tmp_path):
    shutil.copytree(straight[0], tmp_path / "copy")
    checkpoints = tmp_path / "copy/run/checkpoints"
    newest = max(checkpoints.iterdir()) / "state.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    # The data stand where the first run had them: the folder is part of the config.
    tables = pretraining.tables(straight[0], VAE, GAN, FLOW, **OFTEN)
    tables["output"]["output_path"] = str(tmp_path / "copy/run")
    (tmp_path / "config.json").write_text(json.dumps(tables))
    with pytest.warns(UserWarning, match=r"000000011-003 is damaged: .*going on from .*000000010-002"):
        made = Run(load(tmp_path / "config.json"), resume=True, quiet=True)
    made.execute()
    assert weights(made.networks) == weights(straight[1].networks)
    for path in checkpoints.iterdir():
        (path / "progress.json").write_text("[]")
    with pytest.raises(FluxError, match="every state is damaged"):
        Run(load(tmp_path / "config.json"), resume=True, quiet=True)


def test_a_loss_that_is_no_number_ends_the_run_by_name(tmp_path):
    with pytest.raises(FluxError, match=r'the loss is .* in step "vae", epoch 1, batch \d: try a lower lr'):
        run(tmp_path, {**VAE, "n_epochs": 3, "lr": 1e30})
    assert not (tmp_path / "run/ae.safetensors").exists()


def test_a_finished_run_is_not_overwritten_and_another_config_is_refused(straight):
    folder, _ = straight
    with pytest.raises(FluxError, match="holds a run: go on with --resume"):
        run(folder, VAE, GAN, FLOW)
    with pytest.raises(FluxError, match="is of a run with another steps"):
        run(folder, {**VAE, "lr": 0.5}, GAN, FLOW, resume=True)
    with pytest.raises(FluxError, match="is of a run with another data"):
        run(folder, VAE, GAN, FLOW, resume=True, data={"img_size": 8})


def test_steps_that_have_not_begun_may_become_others(tmp_path):
    def stop(stage: Stage, progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, VAE, FLOW, hook=stop, output={"checkpoint_save_interval": 1})
    with pytest.raises(FluxError, match="is of a run with another steps"):
        run(tmp_path, {**VAE, "lr": 0.5}, FLOW, resume=True)
    made = run(tmp_path, VAE, {**FLOW, "lr": 1e-4}, {**FLOW, "name": "more", "lr": 1e-4}, resume=True)
    assert made.progress.index == 3


# --- what is left behind ---


def test_metrics_plots_and_checkpoints(straight):
    folder = straight[0] / "run"
    lines = metrics(straight[0], "vae_gan")
    assert [line["global_step"] for line in lines] == list(range(4, 9))
    assert [(line["epoch"], line["batch"]) for line in lines] == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)]
    assert all(set(line["learning_rates"]) == {"vae", "discriminator"} for line in lines)
    rates = [line["learning_rates"]["vae"] for line in lines]
    assert rates == pytest.approx([1e-3 * Cosine().factor(step, 5) for step in range(5)])
    assert [("r1" in line["metrics"]) for line in lines] == [True, False, False, True, False]
    for name in ("training_losses", "kl_loss", "learning_rates", "batch_times", "training_overview"):
        for suffix in ("", "_vae", "_vae_gan", "_flow"):
            if (name, suffix) != ("kl_loss", "_flow"):
                picture = np.array(Image.open(folder / "graph" / f"{name}{suffix}.png"))
                assert len(np.unique(picture[..., 0])) > 10, name
    summary = (folder / "graph" / "training_summary.txt").read_text()
    assert "vae_gan: to epoch 2, global step 8" in summary
    assert "vae_gan" not in (folder / "graph" / "training_summary_vae.txt").read_text()
    assert "discriminator" in summary
    assert len(list((folder / "checkpoints").iterdir())) == 2  # keep_checkpoints


def test_samples_and_a_model_that_the_pipeline_loads(tmp_path):
    output = {
        **OFTEN["output"],
        "samples_per_checkpoint": 2,
        "sample_sizes": [16, [32, 16]],
        "sample_captions": ["one", "two"],
    }
    run(tmp_path, {**VAE, "n_epochs": 1}, {**FLOW, "n_epochs": 1}, output=output)
    names = sorted(path.name for path in (tmp_path / "run/samples").iterdir())
    pattern = re.compile(
        r"(vae_001|flow_002)_001(?:_(\d{5}))?_([0-9a-f]{6})(-original|-nr_o|_ns_o|-flow)\.webp"
    )
    found = [pattern.fullmatch(name) for name in names]
    assert all(found)
    shown = Counter((each[1], each[2], each[4]) for each in found)
    vae = {("vae_001", batch, s): 4 for batch in ("00002", None) for s in ("-original", "-nr_o", "_ns_o")}
    assert shown == {**vae, ("flow_002", "00002", "-flow"): 4, ("flow_002", None, "-flow"): 4}
    assert len({each[3] for each in found}) == 8  # two pictures and two captions, in two sizes
    sizes = Counter(Image.open(tmp_path / "run/samples" / name).size for name in names)
    assert sizes == {(16, 16): 16, (32, 16): 16}
    pipeline = FluxPipeline(str(tmp_path / "run/model"))
    assert pipeline.spec.cfg_scale == 3.0
    assert pipeline.ae.params.scale_factor != 1.0
    *_, latent = pipeline.generate_latents("a picture", latent_size=(8, 8), seed=1)
    assert pipeline.decode(latent, (8, 8)).shape == (1, 16, 16, 3)


# --- transitions and what passes from step to step ---


def test_a_step_ends_when_its_metric_falls_below_the_threshold(tmp_path):
    threshold = {"mode": "loss_threshold", "metric": "mse", "threshold": 100.0, "max_epochs": 5}
    first = {k: v for k, v in VAE.items() if k != "n_epochs"}
    done = run(
        tmp_path / "soon", {**first, "transition_on": threshold}, {**VAE, "name": "next", "n_epochs": 1}
    )
    assert done.progress.global_step == 3 + 3
    never = {**first, "transition_on": {**threshold, "threshold": 0.0, "max_epochs": 2}, "batch_size": 12}
    assert run(tmp_path / "never", never).progress.global_step == 2


def test_the_threshold_is_compared_with_the_epochs_mean(tmp_path):
    lines = []
    step = {**VAE, "n_epochs": 3}
    run(tmp_path / "a", step)
    lines = metrics(tmp_path / "a", "vae")
    means = [np.mean([line["metrics"]["mse"] for line in lines[3 * e : 3 * e + 3]]) for e in range(3)]
    assert means[1] < means[0]
    between = float(means[0] + means[1]) / 2
    transition = {"mode": "loss_threshold", "metric": "mse", "threshold": between, "max_epochs": 3}
    step = {k: v for k, v in VAE.items() if k != "n_epochs"}
    assert run(tmp_path / "b", {**step, "transition_on": transition}).progress.global_step == 6


def test_nothing_of_a_step_leaks_into_the_next(tmp_path):
    """Frozen parts, optimizers, averages and schedules of the first step leave no trace in the second."""
    seen: dict[str, dict] = {}

    def look(stage: Stage, progress: Progress) -> None:
        names = {name for name, _ in tree_flatten(stage.trainer.model.trainable_parameters())}
        state = dict(tree_flatten(stage.trainer.optimizer.state))
        seen.setdefault(
            stage.step.name,
            {"parts": {".".join(n.split(".")[:2]) for n in names}, "state": state, "ema": stage.trainer.ema},
        )

    first = {**GAN, "train_spade": False, "freeze": ["encoder"]}
    second = {**VAE, "name": "whole", "n_epochs": 1}
    done = run(tmp_path, first, second, hook=look)
    assert "ae.encoder" not in seen["vae_gan"]["parts"]
    assert seen["whole"]["parts"] == {"ae.encoder", "ae.decoder"}
    assert seen["whole"]["ema"] is None
    assert seen["whole"]["state"]["states.0.step"].item() <= 3
    assert done.progress.plateaus == {}
    assert "discriminator.out.weight" in dict(tree_flatten(done.networks.parameters()))


def test_a_step_hands_on_its_average(tmp_path):
    averages = []

    def look(stage: Stage, progress: Progress) -> None:
        averages.append({n: np.array(a) for n, a in tree_flatten(stage.trainer.ema.state["average"])})

    done = run(tmp_path, {**VAE, "use_ema": True, "ema_decay": 0.5}, hook=look)
    final = dict(tree_flatten(done.networks.parameters()))
    assert averages[-1].keys() == final.keys()
    assert all(np.array_equal(average, np.array(final[name])) for name, average in averages[-1].items())


def test_latents_are_measured_after_the_autoencoder_and_not_again(tmp_path):
    scales = {}

    def look(stage: Stage, progress: Progress) -> None:
        scales[stage.step.name] = (progress.scale, progress.shift)

    pretraining.write_pictures(tmp_path / "other", 6)
    other = {"type": "local", "path": str(tmp_path / "other"), "captions_file": "captions.tsv"}
    steps = [
        {**VAE, "dataset": "data"},
        {**FLOW, "dataset": "data"},
        {**FLOW, "name": "flow2", "dataset": "other"},  # whose own mean would be another
    ]
    done = run(tmp_path, *steps, hook=look, datasets={"other": other})
    assert scales["vae"] == (1.0, 0.0)
    assert scales["flow"] == scales["flow2"]
    params = done.networks.ae.params
    z = done.networks.ae.encode(mx.random.uniform(-1, 1, (2, 16, 16, 3)))
    assert (params.scale_factor, params.shift_factor) == scales["flow"]
    assert 0.1 < mx.std(z).item() < 10


# --- schedules ---


def test_schedules():
    assert [Cosine(warmup_steps=2).factor(s, 12) for s in (0, 1, 2, 11)] == pytest.approx(
        [1 / 3, 2 / 3, 1, 0]
    )
    assert Cosine(min_factor=0.1).factor(9, 10) == pytest.approx(0.1)
    assert [Step(3, 0.5).factor(s, 10) for s in (0, 2, 3, 6)] == [1, 1, 0.5, 0.25]
    assert Exponential(0.5).factor(3, 10) == 0.125


def test_reduce_on_plateau():
    scheduler, plateau, factors = ReduceOnPlateau(gamma=0.5, patience=1, min_factor=0.3), Plateau(), []
    for value in (5.0, 4.0, 4.0, 4.0, 3.0, 3.0, 3.0, 3.0, 3.0):
        plateau = scheduler.after_epoch(plateau, value)
        factors.append(plateau.factor)
    assert factors == [1, 1, 1, 0.5, 0.5, 0.5, 0.3, 0.3, 0.3]


def test_a_plateau_lowers_the_rate_that_the_optimizer_uses(tmp_path):
    # The weight of the KL term does not change: a plateau from the second epoch on.
    schedule = {"vae": {"type": "reduce_on_plateau", "metric": "beta", "patience": 0, "gamma": 0.25}}
    step = {**VAE, "n_epochs": 3, "kl_warmup_steps": 0, "optimization": {"schedulers": schedule}}
    used = []
    run(tmp_path, step, hook=lambda stage, _: used.append(stage.trainer.optimizer.learning_rate.item()))
    assert used == pytest.approx([1e-3] * 6 + [0.25e-3] * 3)
    logged = [line["learning_rates"]["vae"] for line in metrics(tmp_path, "vae")]
    assert logged == pytest.approx(used)


def test_progress_as_json_is_itself_again():
    progress = Progress(index=2, begun=True, global_step=9, session=3, scale=0.5, shift=-1.5, measured=True)
    progress.epoch.add({"loss": 0.1, "r1": 3.0})
    progress.epoch.add({"loss": 0.2})
    progress.window.add({"loss": 1 / 3})
    progress.plateaus["vae"] = Plateau(math.inf, 1, 0.25)
    again = Progress.from_json(json.loads(json.dumps(asdict(progress))))
    assert again == progress
    assert again.epoch.take() == {"loss": pytest.approx(0.15), "r1": 3.0}


def test_all_damaged_pictures_are_named_before_a_run_begins(tmp_path):
    """A resumed run has seen them; what is damaged since then is met at its batch."""
    config = pretraining.config(tmp_path, VAE)
    for name in ("3.png", "7.png"):
        path = tmp_path / "data" / name
        path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(FluxError, match=r"2 picture\(s\) cannot be used: .*3\.png.*; .*7\.png") as error:
        Run(config, quiet=True)
    assert "\n" not in str(error.value)
