"""The config: every fault is named with its step, and what is admitted can be built."""

import dataclasses
import json
import sys
import textwrap
from pathlib import Path

import pytest

from flux.errors import FluxError
from flux.training.optimizers import CONFIGURED
from flux.training.pretrain import validate
from flux.training.pretrain.__main__ import main
from flux.training.pretrain.config import Step
from flux.training.schedules import SCHEDULERS

from . import pretraining

VAE = {"name": "vae", "train_vae": True, "max_steps": 3}
GAN = {**VAE, "name": "gan", "gan_training": True}
FLOW = {"name": "flow", "train_diff": True, "max_steps": 3}


def faults(folder: Path, *steps: dict, **sections: dict) -> str:
    with pytest.raises(FluxError) as error:
        pretraining.config(folder, *steps, **sections)
    return "\n".join(error.value.faults)


def without(step: dict, *names: str) -> dict:
    return {k: v for k, v in step.items() if k not in names}


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (without(VAE, "train_vae"), "no training mode"),
        ({**VAE, "freeze": ["encoder", "decoder"]}, "decoder, encoder: frozen, and trained by train_vae"),
        ({**VAE, "freeze": ["vae"]}, "frozen, and trained by train_vae"),
        ({**GAN, "name": "vae", "freeze": ["discriminator"]}, "discriminator: frozen, and trained by gan"),
        ({**FLOW, "name": "vae", "freeze": ["flow"]}, "flow: frozen, and trained by train_diff"),
        ({**VAE, "freeze": ["unet"]}, "'unet' must be one of encoder, decoder"),
        ({**VAE, "freeze": ["encoder"], "unfreeze": ["encoder"]}, "encoder: in freeze and in unfreeze"),
        ({**VAE, "unfreeze": ["flow"]}, "flow: in unfreeze, but no loss of this step reaches it"),
        ({**VAE, "train_text_encoders": True}, "train_text_encoders needs train_diff"),
        ({**GAN, "name": "vae", "train_vae": False, "use_lpips": True}, "use_lpips needs train_vae"),
        (without(VAE, "max_steps"), "no length: give n_epochs, max_steps or transition_on.max_epochs"),
        ({**VAE, "lr": 0}, "lr: 0 must be above 0"),
        ({**VAE, "lr": "fast"}, "lr: must be a number, not 'fast'"),
        ({**VAE, "batch_size": True}, "batch_size: must be a whole number, not True"),
        ({**VAE, "train_vae": "yes"}, "train_vae: must be true or false"),
        ({**VAE, "cfg_dropout_prob": 1.5}, "cfg_dropout_prob: 1.5 must be at most 1"),
        ({**VAE, "kl_bta": 1}, "unknown key 'kl_bta'; did you mean 'kl_beta'?"),
        ({**VAE, "dataset": "birds"}, "dataset 'birds' is not among the datasets"),
        ({**VAE, "transition_on": {"mode": "loss"}}, "mode: 'loss' must be one of epoch, loss_threshold"),
        ({**VAE, "transition_on": {"mode": "loss_threshold"}}, "transition_on: the metric is missing"),
        ({**VAE, "transition_on": {"mode": "loss_threshold"}}, "transition_on: the threshold is missing"),
        ({**VAE, "transition_on": {"metric": "kl"}}, "need the mode loss_threshold"),
        (
            {**VAE, "transition_on": {"mode": "loss_threshold", "metric": "lpips", "threshold": 1}},
            "transition_on.metric: this step has no metric 'lpips'",
        ),
        ({**VAE, "optimization": {"optimizers": {"vae": "Adan"}}}, "unknown type 'Adan'"),
        ({**VAE, "optimization": {"optimizers": {"unet": "Adam"}}}, "unknown name 'unet'"),
        ({**VAE, "optimization": {"optimizers": {"flow": "Adam"}}}, "flow: this step does not train it"),
        (
            {**VAE, "optimization": {"optimizers": {"vae": {"type": "SGD", "betas": [0.9, 0.9]}}}},
            "unknown key 'betas'",
        ),
        ({**VAE, "optimization": {"schedulers": {"vae": "steps"}}}, "unknown type 'steps'"),
        (
            {**VAE, "optimization": {"schedulers": {"vae": {"type": "reduce-on-plateau", "metric": "fid"}}}},
            "schedulers.vae.metric: this step has no metric 'fid'",
        ),
    ],
)
def test_a_fault_is_named_with_its_step(tmp_path, step, text):
    lines = faults(tmp_path, {**FLOW, "name": "before"}, step).splitlines()
    assert any(text in line and line.startswith('step "vae"') for line in lines), lines


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        ({"data": {"img_size": 30}}, "data.img_size: 30 is not a multiple of 4 pixels"),
        ({"data": {"reduced_min_sizes": [12, 10]}}, "data.reduced_min_sizes: 10 is not"),
        ({"data": {"data_path": "/nowhere"}}, "datasets.data: no folder /nowhere"),
        ({"data": {"data_path": None}}, "no data"),
        ({"output": {"checkpoint_save_interval": "soon"}}, "'soon' must be a number of steps or like"),
        ({"output": {"sample_sizes": [[16, 18]]}}, "output.sample_sizes: 18 is not"),
        ({"outputs": {}}, "unknown section 'outputs'; did you mean 'output'?"),
        ({"model": {"t5": {"dmodel": 3}}}, "model.t5: unknown key 'dmodel'; did you mean 'd_model'?"),
        ({"model": {"transformer": {"hidden_size": 33}}}, "model.transformer: hidden_size 33 is not"),
        ({"model": {"autoencoder": {"ch": 6}}}, "model.autoencoder: 6 channels cannot form 32 equal groups"),
        ({"data": {"captions_file": "none.tsv"}}, "datasets.data: "),
        (
            {"model": {"discriminator": {"channels": 9}}},
            "model.discriminator: 9 channels cannot form 32",
        ),
        ({"model": {"discriminator": {"layers": 5}}}, "5 layers of the discriminator need pictures of 32"),
        ({"model": {"t5": {"num_layers": 0}}}, "model.t5.num_layers: 0 must be at least 1"),
        ({"model": {"clip": {"hidden_act": "relu"}}}, "model.clip.hidden_act: 'relu' must be one of"),
        ({"datasets": {"a": {"type": "zip", "path": "x"}}}, "datasets.a: unknown type 'zip'"),
        ({"training": {"pipeline": {"steps": []}}}, "'steps' is empty"),
        ({"training": {"pipeline": {"steps": [VAE], "default": {}}}}, "unknown key 'default'"),
        ({"training": {"pipeline": {"steps": ["vae"]}}}, "step 1: must be a table of keys"),
    ],
)
def test_a_fault_outside_the_steps(tmp_path, sections, text):
    assert text in faults(tmp_path, VAE, GAN, FLOW, **sections)


def test_all_faults_at_once_and_a_name_twice(tmp_path):
    found = faults(tmp_path, VAE, {**VAE, "freeze": ["vae"]}, {**FLOW, "lambda_adv": -1})
    assert 'step "flow".lambda_adv: -1 must be at least 0' in found
    found = faults(tmp_path, VAE, {**VAE, "freeze": ["vae"]})
    assert 'step "vae": another step has this name' in found
    assert "frozen, and trained" in found


def test_every_optimizer_and_scheduler_that_is_admitted_can_be_built(tmp_path):
    for name in CONFIGURED:
        for scheduler in SCHEDULERS:
            step = {**VAE, "optimization": {"optimizers": {"vae": name}, "schedulers": {"vae": scheduler}}}
            (read,) = pretraining.config(tmp_path, step).steps
            assert (
                type(read.optimization.optimizers["vae"].build(0.1)).__name__.removesuffix("AndAdamW") == name
            )
            assert 0 <= read.optimization.schedulers["vae"].factor(1, 10) <= 1
    for betas in ([0.9, 1.0], [-0.1, 0.9], [0.9]):  # what MLX's Adam would refuse
        bad = {**VAE, "optimization": {"optimizers": {"vae": {"type": "Adam", "betas": betas}}}}
        assert "betas" in faults(tmp_path, bad)


def test_a_step_looks_its_keys_up_in_the_defaults_and_in_training(tmp_path):
    training = {
        "batch_size": 2,
        "kl_beta": 0.5,
        "pipeline": {"defaults": {"kl_beta": 0.25, "lr": 0.5}, "steps": [VAE, {**GAN, "lr": 0.125}]},
    }
    first, second = pretraining.config(tmp_path, training=training).steps
    assert (first.batch_size, first.kl_beta, first.lr) == (2, 0.25, 0.5)
    assert (second.batch_size, second.kl_beta, second.lr) == (2, 0.25, 0.125)
    assert first.r1_interval == 16


def test_the_flat_form_is_one_step(tmp_path):
    made = pretraining.tables(tmp_path)
    pretraining.write_pictures(tmp_path / "data")
    made["training"] = {"n_epochs": 2, "batch_size": 3, "lr": 1e-3, "train_vae": True, "workers": 1}
    path = tmp_path / "flat.json"
    path.write_text(json.dumps(made))
    config = validate.load(path)
    (step,) = config.steps
    assert (step.n_epochs, step.batch_size, step.train_vae, step.workers) == (2, 3, True, 1)
    assert config.dataset_of(step) == "data"


TOML = """
[data]
data_path = "{data}"
captions_file = "captions.tsv"
img_size = 16
[model.autoencoder]
ch = 8
ch_mult = [1, 2]
norm_groups = 4
[[training.pipeline.steps]]
name = "vae"
train_vae = true
max_steps = 3
lr = 1e-4
[output]
output_path = "out"
"""
YAML = """
data: {{data_path: {data}, captions_file: captions.tsv, img_size: 16}}
model: {{autoencoder: {{ch: 8, ch_mult: [1, 2], norm_groups: 4}}}}
training:
  pipeline:
    steps:
      - {{name: vae, train_vae: true, max_steps: 3, lr: 1e-4}}  # YAML takes this rate for a string
output: {{output_path: out}}
"""


def test_yaml_and_toml_say_the_same(tmp_path):
    pretraining.write_pictures(tmp_path / "data")
    read = []
    for suffix, text in ((".yaml", YAML), (".toml", TOML)):
        path = tmp_path / f"config{suffix}"
        path.write_text(text.format(data=tmp_path / "data"), encoding="utf-8")
        read.append(validate.load(path))
    assert read[0] == read[1]
    assert read[0].steps[0].lr == 1e-4


def test_toml_without_tomllib_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tomllib", None)
    monkeypatch.setitem(sys.modules, "tomli", None)
    path = tmp_path / "config.toml"
    path.write_text("")
    with pytest.raises(FluxError, match=r"TOML needs Python 3\.11"):
        validate.load(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "a: [1", "a.yaml: "),
        ("a.json", "{", "a.json: "),
        ("a.yaml", "- 1", "must hold a table of keys, not a list"),
        ("a.ini", "", "suffix of a file of options must be one of"),
        ("absent/a.yaml", None, "cannot be read: No such file"),
    ],
)
def test_a_file_that_is_no_config(tmp_path, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(FluxError, match=message) as error:
        validate.load(path)
    assert "\n" not in str(error.value)


def test_every_key_of_the_specification_is_a_field():
    named = """name n_epochs max_steps description dataset train_vae gan_training use_lpips train_spade
    train_diff train_text_encoders use_ema cfg_dropout_prob freeze unfreeze batch_size lr kl_beta
    kl_warmup_steps kl_free_bits lambda_adv lambda_lpips mse_weight r1_interval r1_gamma instance_noise_std
    optimization transition_on"""
    fields = {f.name: f.default for f in dataclasses.fields(Step)}
    assert set(named.split()) <= set(fields)
    said = {
        "kl_beta": 1e-4,
        "kl_warmup_steps": 5000,
        "kl_free_bits": 0,
        "lambda_adv": 0.5,
        "lambda_lpips": 0.1,
    }
    said |= {"mse_weight": 0.1, "r1_interval": 16, "r1_gamma": 5, "ema_decay": 0.9999}
    assert {name: fields[name] for name in said} == said


def test_the_command_prints_every_fault_and_ends_with_2(tmp_path, monkeypatch, capsys):
    path = pretraining.write(tmp_path, {**VAE, "lr": -1}, {**FLOW, "dataset": "birds"})
    monkeypatch.setattr(sys, "argv", ["pretrain", str(path), "--validate-pipeline"])
    assert main() == 2
    assert 'error: step "vae".lr: -1 must be above 0\n' in capsys.readouterr().err
    path = pretraining.write(tmp_path, VAE, GAN, {**FLOW, "train_text_encoders": True, "freeze": ["t5"]})
    assert main() == 0
    expected = """\
    1. vae: trains decoder, encoder
    2. gan: trains decoder, discriminator, encoder
    3. flow: trains clip, flow
       latents: about 2.5e-05 GB on disk
    """
    assert capsys.readouterr().out == textwrap.dedent(expected)
    assert not (tmp_path / "run").exists()


def test_the_example_is_a_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pretraining.write_pictures(tmp_path / "emoji")
    config = validate.load(Path(validate.__file__).with_name("example.yaml"))
    assert [step.name for step in config.steps] == ["vae", "vae_gan", "flow"]
