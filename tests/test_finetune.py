"""Fine-tuning: stop and resume equal a straight run, watching disturbs nothing, faults have their lines."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from flux import adapters
from flux.distributed.ranks import Ranks
from flux.errors import FluxError
from flux.training.finetune import Result, Stop, Stopped, begin, finetune, fit, resume
from flux.training.finetune import run as runs
from flux.training.finetune.length import Length
from flux.training.finetune.options import QUANTIZE
from flux.training.report import Events, draw_loss, read_lines

from . import finetuning
from .finetuning import assert_same_run, events, go_on, options, run

ROOT = Path(__file__).parents[1]
EVERYTHING = {
    "accumulate": 2,
    "iterations": 12,
    "dropout": 0.3,
    "ema": 0.9,
    "train_clip": True,
    "grad_checkpoint": True,
    "progress_prompts": ("two green birds",),
    "progress_every": 4,
    "validate_every": 4,
    "save_every": 4,
    "save_every_epochs": 2,
    "data_options": {"validation_split": 0.25, "flip_aug": True, "caption_dropout_rate": 0.3},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return finetuning.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return finetuning.write_data(tmp_path_factory.mktemp("data") / "pictures")


def trained(made: Result) -> dict[str, np.ndarray]:
    return {name: np.array(a) for name, a in tree_flatten(made.built.network.trainable_parameters())}


# --- stop and resume ---


@pytest.fixture(scope="module")
def straight(model, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    run(options(model, data, folder, **EVERYTHING))
    return folder


def test_what_a_run_leaves_behind(straight):
    names = sorted(path.name for path in straight.iterdir())
    files = ["adapters-000002.safetensors", "adapters-000004.safetensors"]
    files += [f"adapters-step{step:08d}.safetensors" for step in (4, 8, 12)]
    files += [
        "cache",
        "events.jsonl",
        "final_adapters.safetensors",
        "loss.png",
        "options.json",
        "progress",
        "states",
    ]
    assert names == sorted(files)
    assert sorted(p.name for p in (straight / "progress").iterdir()) == [
        f"step{step:08d}.png" for step in (0, 4, 8, 12)
    ]
    assert sorted(p.name for p in (straight / "states").iterdir()) == ["00000010", "00000012"]
    lines = events(straight)
    updates = [line for line in lines if line["event"] == "update"]
    assert [line["iteration"] for line in updates] == [2, 4, 6, 8, 10, 12]
    assert [line["epoch"] for line in updates] == [1, 2, 2, 3, 4, 4]  # three pictures an epoch
    assert [line["iteration"] for line in lines if line["event"] == "validation"] == [0, 4, 8, 12]
    adapter = adapters.load(straight / "final_adapters.safetensors")
    assert adapter.parts() == ["flux", "clip"]
    facts = adapters.read_facts(adapter.metadata)
    assert (facts["base_model"], facts["steps"], len(facts["dataset_hash"])) == ("dev", "12", 64)
    assert set(adapter.ranks().values()) == {2}


class StopsInTheFourth(Stop):
    """Is asked to stop in the middle of the fourth update."""

    def between_batches(self, trainer):
        if trainer.step == 3:
            self.ask()
        super().between_batches(trainer)


def test_stop_and_resume_is_the_straight_run_to_the_bit(model, data, tmp_path):
    chosen = {**EVERYTHING, "optimizer": "prodigy", "schedule": "cosine", "warmup": 2}
    run(options(model, data, tmp_path / "a", **chosen))
    with pytest.raises(Stopped):
        run(options(model, data, tmp_path / "b", **chosen), StopsInTheFourth(Ranks(), quiet=True))
    assert max((tmp_path / "b/states").iterdir()).name == "00000006"
    go_on(tmp_path / "b")
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_more_iterations_go_on_as_if_they_had_been_asked_for(model, data, tmp_path):
    run(options(model, data, tmp_path / "a", iterations=6))
    run(options(model, data, tmp_path / "b", iterations=3))
    go_on(tmp_path / "b", iterations=6)
    assert_same_run(tmp_path / "a", tmp_path / "b")


KILLED_AT = """
import os, random, signal, sys, threading
from pathlib import Path
import flux
from flux.training.finetune import Options, begin, finetune, resume
from flux.training.finetune.watch import Watch

folder, files, delay = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
TOUCHES = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove"}
left = None  # so many files of the run to go

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def watch(event, arguments):  # Python tells every file that it opens, makes, renames and removes
    global left
    if left is None or event not in TOUCHES or (event == "open" and folder.name not in str(arguments[0])):
        return
    left -= 1
    if left == 0:
        threading.Timer(delay, kill).start() if delay else kill()

def begins(self, done):
    global left
    left = files or None

sys.addaudithook(watch)
Watch._say_what_begins = begins
if (folder / "states").is_dir() and any(p.name[0] != "." for p in (folder / "states").iterdir()):
    start = resume(folder, {})
else:
    start = begin(Options.from_table(OPTIONS))
finetune(start, quiet=True)
"""


def test_killed_at_ten_moments_it_is_the_straight_run(model, data, tmp_path):
    """kill -9 at a random file that it touches while it trains and saves, and some random time later."""
    chosen = EVERYTHING | {"iterations": 24, "progress_every": 12, "validate_every": 12, "save_every": 2}
    run(options(model, data, tmp_path / "straight", **chosen))
    table = options(model, data, tmp_path / "killed_run", **chosen).as_table()
    script = tmp_path / "killed.py"
    script.write_text(KILLED_AT.replace("OPTIONS", repr(table)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLX_DISABLE_COMPILE": "1"}
    rng = random.Random(1)
    moments = [(rng.randint(1, 18), i % 2 * rng.uniform(0, 0.03)) for i in range(10)]
    for files, delay in [*moments, (0, 0)]:
        command = [sys.executable, str(script), str(tmp_path / "killed_run"), str(files), str(delay)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == (-9 if files else 0), done.stderr
    assert_same_run(tmp_path / "straight", tmp_path / "killed_run")


# --- what must not disturb it ---


def test_watching_does_not_change_the_training(model, data, tmp_path):
    common = {"dropout": 0.3, "data_options": {"validation_split": 0.25}}
    watched = {"progress_prompts": ("a dog",), "progress_every": 2, "validate_every": 1}
    one = run(options(model, data, tmp_path / "a", **common, **watched))
    other = run(options(model, data, tmp_path / "b", **common, validate_every=1000))
    a, b = trained(one), trained(other)
    assert all(a[name].tobytes() == b[name].tobytes() for name in a | b)
    pictures = sorted((tmp_path / "a/progress").iterdir())
    assert len(pictures) == 4
    assert pictures[0].read_bytes() != pictures[-1].read_bytes()  # the adapter shows


def test_the_validation_loss_is_of_fixed_noise(model, data, tmp_path):
    """Whatever the run's seed: at the start, where the adapter does nothing, it is the same to the bit."""
    split = {"validation_split": 0.25}
    for name, seed in (("a", 1), ("b", 2)):
        run(options(model, data, tmp_path / name, seed=seed, data_options=split))
    a, b = (
        [line["loss"] for line in events(tmp_path / n) if line["event"] == "validation"] for n in ("a", "b")
    )
    assert a[0] == b[0]
    assert a[1] != b[1]


def test_only_the_adapter_moves_and_quantized_weights_too_can_be_trained(model, data, tmp_path):
    before = run(options(model, data, tmp_path / "a", iterations=1))
    for i, how in enumerate(("8", "4", "mxfp4")):
        made = run(options(model, data, tmp_path / str(i), quantize=how, rank=4))
        names = set(dict(tree_flatten(made.built.network.trainable_parameters())))
        assert all(".shares.0." in name for name in names)
        base = made.built.network.flow.double_blocks[0].img_attn.qkv.base
        assert (base.bits, base.mode) == QUANTIZE[how]
        ups = [a for name, a in trained(made).items() if name.endswith(".up")]
        assert ups
        assert all(np.abs(up).max() > 0 for up in ups)
    assert trained(before).keys() == trained(made).keys()


# --- faults ---


def tamper(monkeypatch, change) -> None:
    """Lets change(number, arrays) have a look at every batch."""
    make = runs.batches

    def tampered(*arguments):
        batch = make(*arguments)
        return lambda number: change(number, batch(number))

    monkeypatch.setattr(runs, "batches", tampered)


def test_a_loss_that_is_no_number_ends_the_run_and_the_last_state_stays(model, data, tmp_path, monkeypatch):
    nan = float("nan")
    with monkeypatch.context() as patch:
        tamper(patch, lambda number, a: a | {"mean": a["mean"] * (nan if number == 3 else 1.0)})
        with pytest.raises(FluxError, match=r"the loss is nan.* at iteration 4: .*00000003"):
            run(options(model, data, tmp_path / "run"))
    assert not (tmp_path / "run/final_adapters.safetensors").exists()
    assert len(events(tmp_path / "run")) == 3
    go_on(tmp_path / "run")
    run(options(model, data, tmp_path / "straight"))
    assert_same_run(tmp_path / "straight", tmp_path / "run")


def test_features_that_vanish_while_it_trains(model, data, tmp_path, monkeypatch):
    def vanishing(number, arrays):
        if number == 2:
            shutil.rmtree(tmp_path / "run/cache")
        return arrays

    with monkeypatch.context() as patch:
        tamper(patch, vanishing)
        with pytest.raises(FluxError, match=r"the cache lost .* --resume makes them anew"):
            run(options(model, data, tmp_path / "run"))
    go_on(tmp_path / "run")
    run(options(model, data, tmp_path / "straight"))
    assert_same_run(tmp_path / "straight", tmp_path / "run")


def test_a_full_disk(model, data, tmp_path):
    """A limit on the size of files stands for it: the states that there were stay, nothing of a new one."""
    run(options(model, data, tmp_path / "run", iterations=2))
    code = (
        "import resource, flux\nfrom flux.training.finetune import finetune, resume\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        f"finetune(resume({str(tmp_path / 'run')!r}, {{'iterations': 4}}), quiet=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "FluxError" in done.stderr
    assert "00000003: the state cannot be written" in done.stderr
    assert sorted(p.name for p in (tmp_path / "run/states").iterdir()) == ["00000001", "00000002"]
    go_on(tmp_path / "run", iterations=4)
    run(options(model, data, tmp_path / "straight", iterations=4))
    assert_same_run(tmp_path / "straight", tmp_path / "run")


def test_a_data_set_that_is_gone_or_changed(model, tmp_path):
    data = finetuning.write_data(tmp_path / "pictures")
    run(options(model, data, tmp_path / "run", iterations=2))
    (tmp_path / "pictures/1.txt").write_text("something else")
    with pytest.raises(FluxError, match="pictures is not the one that this run was begun with"):
        go_on(tmp_path / "run", iterations=4)
    moved = finetuning.write_data(tmp_path / "moved")
    go_on(tmp_path / "run", iterations=4, data=moved)
    shutil.rmtree(moved)
    with pytest.raises(FluxError, match="moved: is not a folder"):
        go_on(tmp_path / "run", iterations=6)


def test_a_damaged_state_is_named_and_the_run_goes_on_from_the_one_before(model, data, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    table = tmp_path / "run/states/00000012/progress.json"
    table.write_text(table.read_text().replace('"rank": 2', '"rank": 3'))
    (tmp_path / "run/events.jsonl").open("ab").write(b"\xff\xfe\n")
    with pytest.warns(UserWarning, match=r"00000012 is damaged: progress\.json .*going on from .*00000010"):
        go_on(tmp_path / "run")
    assert_same_run(straight, tmp_path / "run")
    for name in ("00000010", "00000012"):
        (tmp_path / "run/states" / name / "state.safetensors").write_bytes(b"")
    with pytest.raises(FluxError, match=r"every state is damaged: .*00000012.*00000010"):
        resume(tmp_path / "run", {})


def test_a_state_with_an_option_that_there_is_not_is_named(model, data, tmp_path):
    run(options(model, data, tmp_path / "run", iterations=1, keep_states=1))
    (table,) = (tmp_path / "run/states").glob("*/progress.json")
    content = json.loads(table.read_text())
    del content["checksums"]  # as an earlier version wrote it
    content["options"]["colour"] = "red"
    table.write_text(json.dumps(content))
    with pytest.raises(FluxError, match=r"is damaged: .*'colour'"):
        resume(tmp_path / "run", {})


def test_options_that_contradict_a_resumed_run_are_refused_by_name(model, data, tmp_path):
    run(options(model, data, tmp_path / "run", iterations=2))
    same = {"learning_rate": 1e-2, "data": data, "model": model, "data_options": {"resolution": (64, 64)}}
    resume(tmp_path / "run", {**same, "progress_every": 7, "format": "kohya"})
    changes = [
        ({"rank": 4}, r"--lora-rank 4 \(the run has 2\)"),
        ({"learning_rate": 0.5, "model": "schnell"}, r"--learning-rate 0\.5 .*--model schnell"),
        ({"data_options": {"flip_aug": True}}, "--data-options flip_aug True"),
    ]
    for change, message in changes:
        with pytest.raises(FluxError, match=message):
            resume(tmp_path / "run", change)
    run(options(model, data, tmp_path / "cosine", iterations=2, schedule="cosine"))
    with pytest.raises(FluxError, match="schedule cosine depends on the run's length"):
        resume(tmp_path / "cosine", {"iterations": 3})


def test_an_unfinished_run_is_not_overwritten_and_a_folder_without_one_not_resumed(model, data, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(Stopped):
        run(options(model, data, folder, iterations=10, accumulate=2), StopsInTheFourth(Ranks(), quiet=True))
    with pytest.raises(FluxError, match=r"run holds a run .* --resume"):
        run(options(model, data, folder))
    with pytest.raises(FluxError, match="no state of a run to go on from"):
        resume(tmp_path / "nothing", {})
    go_on(folder)
    run(options(model, data, folder, iterations=1))  # now it is finished, and kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.1"]


def test_a_finished_run_is_kept_under_another_name(model, data, tmp_path, capsys):
    """With all that it has but the cache, which the new run goes on with."""
    folder = tmp_path / "run"
    run(options(model, data, folder, iterations=1))
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    (tmp_path / "run.1").mkdir()
    finetune(begin(options(model, data, folder, iterations=2)))
    assert f"{folder} held a finished run, which is now {folder}.2" in capsys.readouterr().err
    kept = tmp_path / "run.2"
    assert {path.name: path.read_bytes() for path in kept.iterdir() if path.is_file()} == before
    assert (kept / "states").is_dir()
    assert not (kept / "cache").exists()
    assert (folder / "cache").is_dir()
    assert len([line for line in events(folder) if line["event"] == "update"]) == 2
    go_on(kept, iterations=3)
    assert (kept / "cache").is_dir(), "encoded anew"
    shutil.rmtree(folder / "states")
    run(options(model, data, folder, iterations=1))
    assert (tmp_path / "run.3/final_adapters.safetensors").is_file(), "also one without its states"


def test_a_finished_run_that_the_new_one_needs_is_not_moved(model, data, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    run(options(model, data, folder, iterations=1))
    (folder / "final_adapters.safetensors").rename(folder / "hidden")
    with pytest.raises(FluxError, match="run holds a run"):
        run(options(model, data, folder))
    (folder / "hidden").rename(folder / "final_adapters.safetensors")
    begun = ((str(folder / "final_adapters.safetensors"), 1.0),)
    with pytest.raises(FluxError, match=r"final_adapters\.safetensors is in .*: give another --output-dir"):
        run(options(model, data, folder, adapters=begun))
    monkeypatch.chdir(folder)
    with pytest.raises(FluxError, match="the working folder is in"):
        run(options(model, data, folder))
    assert list(tmp_path.iterdir()) == [folder]


def test_a_run_that_is_to_be_longer_is_not_finished(model, data, tmp_path):
    """Though its adapter from before is there."""
    folder = tmp_path / "run"
    run(options(model, data, folder, iterations=4, accumulate=2))
    with pytest.raises(Stopped):
        finetune(resume(folder, {"iterations": 10}), stop=StopsInTheFourth(Ranks(), quiet=True))
    assert (folder / "final_adapters.safetensors").is_file()
    with pytest.raises(FluxError, match="run holds a run"):
        run(options(model, data, folder))


def test_the_optimizer_is_made_as_the_options_say(model, data, tmp_path):
    chosen = options(model, data, tmp_path, adam_beta1=0.5, adam_beta2=0.75, adam_epsilon=1e-3)
    made = runs.make_optimizer(chosen.resolved(), 10)
    assert (list(made.betas), made.eps, made.weight_decay) == ([0.5, 0.75], 1e-3, 0.01)


def test_bad_data_leaves_a_finished_run_where_it_is(model, data, tmp_path):
    folder = tmp_path / "run"
    run(options(model, data, folder, iterations=1))
    with pytest.raises(FluxError, match="no layer"):
        run(options(model, data, folder, targets="nothing"))
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "--lora-rank 0"),
        ({"quantize": "5"}, "--quantize '5' must be one of 8, 4, mxfp4"),
        ({"rank": 0, "loss": "l3"}, "--lora-rank 0 must be at least 1; --loss 'l3' must be one of"),
        ({"learning_rate": -1.0}, "--learning-rate -1"),
        ({"dropout": 1.0}, r"--lora-dropout 1\.0"),
        ({"iterations": 3, "epochs": 2}, "iterations or epochs"),
        ({"seed": 2**32}, "--seed"),
        ({"progress_prompts": (" ",)}, "progress prompt is empty"),
        ({"fuse_adapters": True}, "needs an adapter"),
    ],
)
def test_options_that_cannot_be(change, message):
    with pytest.raises(FluxError, match=message):
        options("tiny", "data", Path("run"), **change)


# --- parts ---


def test_length():
    length = Length(1200, 8, 20)
    assert (length.updates, length.epochs) == (150, 60)
    assert [u for u in range(1, 151) if length.due(600, u)] == [75, 150]
    assert [length.epoch_due(25, u) for u in (62, 63, 125)] == [0, 25, 50]  # 62.5 updates are 25 epochs
    assert Length.of(options("m", "d", Path("o"), iterations=10, accumulate=4), 5, 1).iterations == 12
    four = Length.of(options("m", "d", Path("o"), iterations=None, epochs=3, accumulate=2), 20, 4)
    assert (four.iterations, four.updates, four.epochs) == (16, 8, 4)  # 15 batches on each of four ranks


def test_events_are_neither_doubled_nor_torn(tmp_path):
    path = tmp_path / "events.jsonl"
    for update in (1, 2, 3):
        Events(path, "update", 9).write({"event": "update", "update": update})
    with path.open("a") as file:
        file.write('{"event": "upd')
    Events(path, "update", 2).write({"event": "update", "update": 3, "again": True})
    assert [line["update"] for line in read_lines(path)] == [1, 2, 3]
    assert "again" in list(read_lines(path))[-1]


def test_the_loss_plot(tmp_path):
    events = Events(tmp_path / "events.jsonl", "update", 9)
    for i in range(50):
        events.write({"event": "update", "iteration": i + 1, "loss": 1 / (i + 1), "rate": 0.1})
    draw_loss(events.path, tmp_path / "without.png")
    events.write({"event": "validation", "iteration": 50, "loss": 0.5})
    draw_loss(events.path, tmp_path / "with.png")
    assert (tmp_path / "without.png").read_bytes() != (tmp_path / "with.png").read_bytes()


def test_advice_where_it_does_not_fit():
    from flux.models.transformer import FluxParams

    shape = {"image_size": (1024, 1024), "batch": 1, "text_tokens": 512, "element_size": 2}
    asked = options("dev", "data", Path("run"), rank=16)
    line, advice = fit.describe(asked, FluxParams(), shape, 2**37)
    assert line.startswith("memory: about ")
    assert not advice
    _, advice = fit.describe(asked, FluxParams(), shape, 16 * 2**30)
    assert "with --grad-checkpoint --quantize 4 about" in advice
    _, advice = fit.describe(asked, FluxParams(), shape, 2**30)
    assert "will not fit, and even" in advice


def test_data_parallel_ranks_take_the_plans_batches_in_turn(model, data, tmp_path):
    """Which pictures, captions and keys: rank r of n has the batches r, r + n, ... of one machine."""
    chosen = options(model, data, tmp_path / "run", iterations=1, dropout=0.1)
    made = run(chosen)

    def batch(rank: int, size: int, number: int):
        ranks = SimpleNamespace(rank=rank, size=size)
        return runs.batches(chosen, made.prepared.plan, made.encoded.features, ranks)(number)

    for rank in range(2):
        for number in range(4):
            own, same = batch(rank, 2, number), batch(0, 1, 2 * number + rank)
            assert own.keys() == same.keys()
            assert all(mx.array_equal(own[name], same[name]) for name in own)


def test_the_same_training_on_another_number_of_ranks():
    alone = options("dev", "data", Path("run"), iterations=1200, accumulate=8, save_every=100)
    four = alone.shared_out(1, 4)
    assert (four.iterations, four.accumulate, four.save_every) == (300, 2, 25)
    assert four.shared_out(4, 1).iterations == 1200
    by_epochs = options("dev", "data", Path("run"), iterations=None, epochs=7, accumulate=6)
    for ranks in (1, 2, 3, 6):  # an update is rounded up alike
        assert Length.of(by_epochs.shared_out(1, ranks), 20, ranks).updates == 24
    with pytest.raises(FluxError, match="takes 8 batches, which 3 ranks cannot share out evenly"):
        alone.shared_out(1, 3)
    with pytest.raises(FluxError, match="--shard-base does not go with --dora"):
        options("dev", "data", Path("run"), shard_base=True, dora=True)
