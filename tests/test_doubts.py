"""What a fine-tuning says before it begins, or at its end, of what will not come out as it was asked for."""

import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from flux.training.finetune import begin, doubts, finetune

from . import finetuning
from .datasets import write_pictures
from .finetuning import options

OFF = {"learning_rate": 1e-3}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return finetuning.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return finetuning.write_data(tmp_path_factory.mktemp("data") / "pictures")


def said(model: str, data: str, folder: Path, **changes) -> list[str]:
    """The warnings of a run of an update or few."""
    shutil.rmtree(folder, ignore_errors=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        finetune(begin(options(model, data, folder, **{"iterations": 1, **OFF, **changes})), quiet=True)
    return [str(each.message) for each in caught]


def test_a_usual_run_has_no_doubts(model, data, tmp_path):
    assert said(model, data, tmp_path / "run") == []
    usual = {"schedule": "cosine_with_restarts", "restarts": 2, "iterations": 4, "save_every": 2, "warmup": 2}
    usual |= {
        "loss": "huber",
        "delta": 0.2,
        "time_sampling": "logit_normal",
        "time_mean": 0.5,
        "guidance": 3.5,
    }
    assert said(model, data, tmp_path / "run", **usual, trigger="sks dog") == []


DOUBTS = [
    ({"optimizer": "prodigy", "learning_rate": 1e-4}, "0.0001 with prodigy trains next to nothing"),
    ({"optimizer": "prodigy", "learning_rate": 1.0}, "prodigy has found no step size in so few updates"),
    ({"learning_rate": 1.0}, "1 with adamw is far too high"),
    ({"restarts": 2}, "--restarts has no effect: it needs --lr-schedule cosine_with_restarts"),
    ({"delta": 0.2}, "--huber-delta has no effect"),
    ({"time_mean": 0.2}, "--time-mean has no effect"),
    ({"time_scale": 0.2, "time_sampling": "uniform"}, "--time-scale has no effect"),
    ({"prior_weight": 0.2}, "--prior-weight has no effect: it needs regularisation pictures"),
    ({"validate_every": 2}, "--validate-every has no effect: it needs pictures that are held out"),
    ({"progress_every": 2}, "--progress-every has no effect: it needs --progress-prompt"),
    ({"adam_beta1": 0.5, "optimizer": "adafactor"}, "--adam-beta1 has no effect"),
    ({"data_options": {"keep_tokens": 2}}, "--keep-tokens has no effect: it needs --shuffle-caption"),
    ({"data_options": {"mask_floor": 0.2}}, "--mask-floor has no effect: it needs pictures with masks"),
    ({"accumulate": 2, "iterations": 3}, "4 iterations in the place of 3"),
    ({"warmup": 3, "iterations": 4}, "--warmup 3 is more than half of the 4 updates"),
    ({"save_every": 2}, "--save-every 2 is beyond the run's 1 iterations"),
    ({"save_every_epochs": 2}, "--save-every-epochs 2 is beyond the run's 1"),
    (
        {"targets": "transformer_blocks.0.attn.to_q"},
        "attn.to_q are parts of fused layers, which are trained whole",
    ),
    ({"trigger": "tok"}, "the trigger 'tok' is in no caption"),
    ({"data_options": {"validation_split": 0.1}}, "validation_split 0.1 of 4 pictures holds none out"),
    (
        {"warmup": 1, "iterations": 2, "learning_rate": 1e-45},
        "every update was 0: the adapter changes nothing",
    ),
]


@pytest.mark.parametrize(("changes", "words"), DOUBTS, ids=[words for _, words in DOUBTS])
def test_doubts(model, data, tmp_path, changes, words):
    lines = said(model, data, tmp_path / "run", **changes)
    assert [line for line in lines if words in line], lines


def test_a_trigger_that_a_tokenizer_cuts_off():
    """By words of which a tokenizer here reads five; CLIP's end is in lower case and has spaces."""

    def truncated(text: str) -> str:
        return " ".join(text.lower().replace(",", " ,").split()[5:])

    tokenizers = {"CLIP": SimpleNamespace(max_length=5, truncated=truncated)}
    early = "sks dog, one two three four five"
    late = "One, two three, four five SKS dog"
    split = "one two three four sks dog"
    assert doubts.of_trigger("sks dog", [early], tokenizers) == []
    found = doubts.of_trigger("sks dog", [early, late, split], tokenizers)
    assert len(found) == 1
    assert "after the 5 tokens that CLIP reads in 2 of 3 captions" in found[0]
    assert doubts.of_trigger(None, [late], tokenizers) == []


def test_the_disk_that_a_cache_takes(monkeypatch, tmp_path):
    plan = SimpleNamespace(variants=lambda: [1, 2])
    folder = tmp_path / "not/yet/there"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10e9))
    assert doubts.of_cache(plan, int(5e9), 7, folder) == []
    found = "the cache takes about 6.0 GB (2 pictures, 7 captions): --cache-dir puts it elsewhere"
    assert doubts.of_cache(plan, int(6e9), 7, folder) == [found]
    assert "and the disk has 10.0 GB" in doubts.of_cache(plan, int(11e9), 7, folder)[0]


def test_a_run_says_that_a_loss_is_zero(model, tmp_path):
    """Regularisation pictures of weight 0 leave nothing to learn in their batches."""
    write_pictures(tmp_path / "set/img/1_sks dog", {"a.png": (64, 64)})
    write_pictures(tmp_path / "set/reg/1_dog", {"b.png": (64, 64)})
    lines = said(model, str(tmp_path / "set"), tmp_path / "run", iterations=2, prior_weight=0.0)
    assert [line for line in lines if "has a loss of exactly 0" in line], lines


def test_updates_that_cannot_move_anything():
    lines: list[str] = []
    callback = doubts.Unmoved(lines.append)
    steps = [({"loss": 1.0, "norm": 1.0}, 1), ({"loss": 1.0}, 2), ({"loss": 1.0, "norm": 0.0}, 3)]
    for metrics, step in [*steps, ({"loss": 0.0, "norm": 0.0}, 4), ({"loss": 0.0, "norm": 0.0}, 5)]:
        callback.after_step(SimpleNamespace(step=step), metrics)
    assert [line[:8] for line in lines] == ["update 3", "update 4"]
    assert "a gradient of exactly 0" in lines[0]
    assert "a loss of exactly 0" in lines[1]
