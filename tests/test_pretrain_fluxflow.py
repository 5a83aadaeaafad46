"""FluxFlow's documented config files and commands, with miniature data: they run as they stand."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import yaml
from PIL import Image

from flux.errors import FluxError
from flux.models.transformer import FluxParams
from flux.tables import Faults
from flux.training.pretrain import __main__ as program
from flux.training.pretrain import fluxflow, generate, graphs, lpips
from flux.training.pretrain.batches import Batches, Shard
from flux.training.pretrain.config import Config, Data
from flux.training.pretrain.datasets import open_dataset
from flux.training.pretrain.fluxflow.sizes import networks
from flux.training.pretrain.run import Run
from flux.training.pretrain.validate import load
from flux.training.report import read_lines
from flux.training.schedules import Held, Linear, Plateau, ReduceOnPlateau
from flux.weights import checkpoints

from . import pretraining

ROOT = Path(__file__).parents[1]
SMALL = {  # what makes FLUX's networks small beside FluxFlow's own sizes
    "autoencoder": {"ch_mult": [1, 1, 1, 1], "num_res_blocks": 1},
    "transformer": {"depth": 1, "depth_single_blocks": 1},
    "clip": {"num_hidden_layers": 1},
    "t5": {"num_layers": 1},
}
MINIMAL = """
model: {vae_dim: 32, feature_maps_dim: 32, feature_maps_dim_disc: 8, text_embedding_dim: 128}
data:
  data_path: "images"
  captions_file: "captions.txt"
  img_size: 64
  channels: 3
  tokenizer_name: "distilbert-base-uncased"
training:
  n_epochs: 1
  batch_size: 2
  workers: 0
  lr: 0.0001
  use_fp16: false
  initial_clipping_norm: 1.0
  pipeline:
    steps:
      - name: "vae_test"
        n_epochs: 1
        train_vae: true
        train_spade: false
        train_diff: false
        gan_training: false
        use_lpips: false
        freeze: ["flow_processor", "text_encoder"]
        kl_beta: 0.0001
        kl_warmup_steps: 100
        kl_free_bits: 0.0
        optimization:
          optimizers: {vae: {type: "AdamW", lr: 0.0001, betas: [0.9, 0.999], weight_decay: 0.01}}
          schedulers: {vae: {type: "CosineAnnealingLR", eta_min_factor: 0.1}}
output:
  output_path: "outputs/test_pipeline"
  log_interval: 1
  checkpoint_save_interval: 10
  no_samples: true
  generate_diagrams: false
  test_image_address: []
  sample_captions: []
"""
CFG = """
model: {vae_dim: 128, feature_maps_dim: 128, feature_maps_dim_disc: 8, text_embedding_dim: 1024,
        pretrained_bert_model: null}
data: {data_path: images, captions_file: captions.txt, img_size: 1024, channels: 3,
       tokenizer_name: "distilbert-base-uncased"}
training:
  pipeline:
    steps:
      - {name: vae_no_spade, description: "reconstruction", n_epochs: 50, train_vae: true, train_spade: false,
         train_diff: false, gan_training: true, use_lpips: true, use_ema: false, batch_size: 2, workers: 1,
         lr: 0.0001, lr_min: 0.01, use_fp16: false, initial_clipping_norm: 1.0, kl_beta: 0.0001,
         lambda_adv: 0.5, lambda_lpips: 0.1}
      - {name: vae_spade_lpips, n_epochs: 50, train_vae: true, train_spade: true, train_diff: false,
         gan_training: true, use_lpips: true, use_ema: false, batch_size: 2, workers: 1,
         lr: 0.00005, lr_min: 0.01}
      - {name: flow_cfg, n_epochs: 100, train_vae: false, train_spade: false, train_diff: true,
         gan_training: false, use_lpips: false, use_ema: true, cfg_dropout_prob: 0.10, batch_size: 2,
         workers: 1, lr: 0.0001, lr_min: 0.01, freeze: [compressor, expander, discriminator]}
output:
  output_path: "outputs/flux_cfg"
  log_interval: 10
  checkpoint_save_interval: 50
  samples_per_checkpoint: 1
  no_samples: false
  sample_captions: ["a beautiful sunset over mountains"]
  sample_sizes: [256, 512, 1024]
  log_level: "INFO"
  log_file: "outputs/flux_cfg/training.log"
model_checkpoint: null
"""
STEPS = """
- name: "vae_warmup"
  description: "Warmup VAE without GAN"
  n_epochs: 2
  max_steps: 1
  train_vae: true
  gan_training: false
  freeze: [flow_processor, text_encoder]
- name: "vae_gan"
  n_epochs: 1
  max_steps: null
  train_vae: true
  gan_training: true
  adaptive_weights: true
  optimization:
    optimizers:
      vae: {type: "Lion", lr: 5e-6, betas: [0.9, 0.95], decoupled_weight_decay: true}
      discriminator: {type: "AdamW", lr: 5e-5, betas: [0.0, 0.9], amsgrad: true}
    schedulers:
      vae: null
      discriminator: {type: StepLR, step_size: 10, gamma: 0.5}
  transition_on: {mode: loss_threshold, metric: vae_loss, threshold: 0.0001, max_epochs: 50}
- name: "flow_cfg"
  n_epochs: 1
  train_vae: false
  train_diff: true
  cfg_dropout_prob: 0.10
  use_ema: true
  freeze: [compressor, expander, discriminator]
"""


@pytest.fixture(autouse=True, scope="module")
def no_compiler():
    """On a CPU every compiled kernel costs seconds of g++; what is computed is the same."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working folder with images/ and captions.txt, as FluxFlow wants them."""
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_data(folder: Path) -> None:
    pretraining.write_pictures(folder / "images", 8)
    (folder / "images/captions.tsv").rename(folder / "captions.txt")


def config(folder: Path, text: str | dict) -> Config:
    tables = yaml.safe_load(text) if isinstance(text, str) else text
    (folder / "c.yaml").write_text(yaml.safe_dump(tables))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load(folder / "c.yaml")


def pipeline(*steps: dict, **sections) -> dict:
    """FluxFlow's tables with these steps."""
    return {
        "model": {"vae_dim": 32, "feature_maps_dim": 32, "text_embedding_dim": 64, **SMALL},
        "data": {"data_path": "images", "captions_file": "captions.txt", "img_size": 16},
        "training": {"batch_size": 2, "workers": 0, "pipeline": {"steps": list(steps)}},
        "output": {"output_path": "outputs/flux", "log_interval": 1, "checkpoint_save_interval": 2},
        **sections,
    }


def faults(folder: Path, tables: dict) -> list[str]:
    with pytest.raises(FluxError) as error:
        config(folder, tables)
    return error.value.faults


def command(monkeypatch, module, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    run = module.main if hasattr(module, "main") else lambda: module.run_program(module.run)
    return run()


# --- files and commands, as they stand ---


def test_the_minimal_config_runs(folder, monkeypatch, capsys):
    (folder / "test_pipeline_minimal.yaml").write_text(MINIMAL)
    asked = ("--config", "test_pipeline_minimal.yaml")
    assert command(monkeypatch, program, *asked, "--validate-pipeline") == 0
    said = capsys.readouterr()
    assert said.out == "1. vae_test: trains decoder, encoder\n"
    assert "no effect here: data.tokenizer_name (" in said.err
    assert "generate_diagrams (graphs are drawn with every checkpoint)" in said.err
    assert command(monkeypatch, program, *asked, "--generate_diagrams") == 0
    said = capsys.readouterr()
    assert said.out == "outputs/test_pipeline/ae.safetensors\n"
    assert "PIPELINE STEP 1/1: vae_test\nDuration: 1 epoch, 4 updates\n" + "=" * 80 in said.err
    assert re.search(r"\[00:00:\d\d\] Step vae_test \(1/1\) \| Epoch 1/1 \| Batch 4/4 \| VAE ", said.err)
    assert list((folder / "outputs/test_pipeline/samples").iterdir()) == []
    (line, *_) = read_lines(folder / "outputs/test_pipeline/graph/training_metrics_vae_test.jsonl")
    assert line["metrics"]["norm"] > 0, "the norm is clipped"


def test_the_cfg_example_is_a_config(folder, monkeypatch):
    monkeypatch.setattr(lpips, "find", lambda *_: ("", ""))
    read = config(folder, CFG)
    first, second, flow = read.steps
    assert (first.lr_min, first.clip_norm, first.n_epochs, first.workers) == (0.01, 1.0, 50, 1)
    assert second.trained == {"encoder", "decoder", "spade", "discriminator"}
    assert flow.trained == {"flow", "clip", "t5"}, "its text encoder is trained unless it is frozen"
    assert (flow.cfg_dropout_prob, flow.use_ema) == (0.1, True)
    model = read.model
    assert (model.autoencoder.z_channels, model.autoencoder.ch, model.discriminator.channels) == (32, 128, 8)
    assert (model.transformer.hidden_size, model.transformer.axes_dim) == (128, (16, 56, 56))
    assert (model.t5.d_model, model.clip.hidden_size) == (1024, 1024)
    assert read.output.sample_sizes == (256, 512, 1024)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of three steps by the real program; its working folder."""
    folder = tmp_path_factory.mktemp("finished")
    write_data(folder)
    tables = pipeline(*yaml.safe_load(STEPS))
    tables["output"]["samples_per_checkpoint"] = 1
    tables["output"]["sample_captions"] = ["a picture"]
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(tables))
    made = subprocess.run(
        [sys.executable, "-m", "flux.training.pretrain", "--config", "pipeline.yaml"],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "MLX_DISABLE_COMPILE": "1", "PYTHONPATH": str(ROOT)},
        check=True,
    )
    (folder / "said.txt").write_text(made.stderr)
    return folder


def test_the_console_of_a_pipeline(finished):
    said = (finished / "said.txt").read_text()
    for words in (
        "PIPELINE STEP 1/3: vae_warmup\nDescription: Warmup VAE without GAN\nDuration: 2 epochs, 2 updates\n",
        "PIPELINE STEP 2/3: vae_gan\nDuration: 1 epoch, 4 updates, or until vae is at most 0.0001\n",
        'no effect here: step "vae_gan".adaptive_weights (losses have the weights that are given)',
        "optimizers.discriminator.amsgrad (MLX's AdamW has no such setting)",
        "Step vae_warmup (1/3) | Epoch 2/2 | Batch 1/1 | VAE ",
    ):
        assert words in said, words
    assert re.search(r"Batch 3/4 \| VAE \S+ \| KL \S+ \| G \S+ \| D \S+ \| \S+s/batch", said)


def test_samples_are_named_as_there(finished):
    names = sorted(path.name for path in (finished / "outputs/flux/samples").iterdir())
    kinds = {re.sub(r"_[0-9a-f]{6}", "_HASH", name) for name in names}
    whole = {f"vae_gan_002_001_HASH{s}.webp" for s in ("-original", "-nr_o", "_ns_o")}
    assert whole <= kinds
    assert {"vae_gan_002_001_00002_HASH-original.webp", "flow_cfg_003_001_HASH-flow.webp"} <= kinds
    shown = {
        s: np.array(Image.open(finished / "outputs/flux/samples" / name))
        for name in names
        for s in ("-original", "-nr_o", "_ns_o")
        if "_002_001_00002" in name and s in name
    }
    assert (shown["-nr_o"] != shown["_ns_o"]).any(), "one is drawn from the latents' distribution"


def test_graphs_are_drawn_again_from_the_metrics(finished, capsys):
    folder = finished / "outputs/flux/graph"
    names = {path.name for path in folder.iterdir() if path.suffix in (".png", ".txt")}
    for name in ("training_losses", "learning_rates", "batch_times", "training_overview"):
        assert {f"{name}{s}.png" for s in ("", "_vae_warmup", "_vae_gan", "_flow_cfg")} <= names
    assert {"kl_loss.png", "kl_loss_vae_gan.png", "training_summary.txt"} <= names
    before = (folder / "training_losses.png").read_bytes()
    for path in [*folder.glob("*.png"), *folder.glob("*.txt")]:
        path.unlink()
    assert graphs.run(None, [str(finished / "outputs/flux")]) == 0
    assert {Path(line).name for line in capsys.readouterr().out.splitlines()} == names
    assert (folder / "training_losses.png").read_bytes() == before
    with pytest.raises(FluxError, match="no training_metrics_STEP"):
        graphs.run(None, [str(finished)])


def test_the_generate_command(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    Path("prompts").mkdir()
    Path("prompts/sunset.txt").write_text("a beautiful sunset over mountains\n")
    asked = ("--text_prompts_path", "prompts/", "--ddim_steps", "2")

    def drawn(output: str, *more: str, checkpoint: str = "outputs/flux/final.safetensors") -> bytes:
        given = ("--model_checkpoint", checkpoint, *asked, "--output_path", output, *more)
        assert command(monkeypatch, generate, *given) == 0
        assert Image.open(f"{output}/sunset_gen.webp").size == (16, 16)
        return Path(output, "sunset_gen.webp").read_bytes()

    guided = drawn("a", "--use_cfg", "--guidance_scale", "5.0", "--vae_dim", "32")
    said = capsys.readouterr()
    assert said.out == "a/sunset_gen.webp\n"
    assert "outputs/flux/final.safetensors is not there: taking the model of the run outputs/flux" in said.err
    assert "--vae_dim has no effect: sizes are those of the model" in said.err
    plain = drawn("b", "--guidance_scale", "5.0", checkpoint="outputs/flux")
    assert "--guidance_scale 5 has no effect without --use_cfg" in capsys.readouterr().err
    assert plain != guided
    assert drawn("c", "--use_cfg", "--guidance_scale", "1", checkpoint="outputs/flux/model") == plain
    assert "--use_cfg has no effect at a --guidance_scale of 1" in capsys.readouterr().err
    nothing = ("--model_checkpoint", "outputs/none.safetensors", *asked)
    assert command(monkeypatch, generate, *nothing) == 2
    assert "outputs/none.safetensors" in capsys.readouterr().err


def test_a_run_begins_with_the_networks_of_another(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    flow = yaml.safe_load(STEPS)[2]
    checkpoint = {"model_checkpoint": "outputs/flux/flxflow_final.safetensors"}
    tables = pipeline({**flow, "max_steps": 1}, output={"output_path": "outputs/second"}, **checkpoint)
    second = Run(config(finished, tables))
    second.execute()
    assert "began with " in capsys.readouterr().err
    arrays = mx.load(str(max(Path("outputs/flux/checkpoints").iterdir()) / "state.safetensors"))
    name = "encoder.conv_in.weight"
    assert mx.array_equal(second.networks.ae.encoder.conv_in.weight, arrays[f"model.ae.{name}"])
    absent = {**tables, "model_checkpoint": "outputs/none/x.safetensors"}
    assert any("model_checkpoint: " in line and "no run" in line for line in faults(finished, absent))


def test_of_another_runs_networks_it_takes_those_that_fit(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    step = {"name": "a", "train_vae": True, "n_epochs": 1, "max_steps": 1}
    tables = pipeline(step, output={"output_path": "outputs/wider"}, model_checkpoint="outputs/flux")
    tables["model"] = {**tables["model"], "autoencoder": {**SMALL["autoencoder"], "z_channels": 4}}
    Run(config(finished, tables)).execute()
    assert re.search(
        r"began with \d+ of \d+ tensors of outputs/flux; random in part: ae\n", capsys.readouterr().err
    )
    tables["model"] = {"autoencoder": {"ch": 8, "ch_mult": [1, 2], "norm_groups": 4}}
    tables["output"] = {"output_path": "outputs/other"}
    made = Run(config(finished, tables), quiet=True)
    made.networks.ae.decoder = made.networks.ae.encoder = None
    with pytest.raises(FluxError, match="outputs/flux has no networks of these sizes"):
        made.execute()


# --- SPADE ---


def test_a_spade_decoder_can_be_used_and_txt2image_says_why_not(folder, monkeypatch):
    steps = [{**step, "train_spade": bool(step.get("train_vae"))} for step in yaml.safe_load(STEPS)]
    made = Run(config(folder, pipeline(*steps)), quiet=True)
    assert made.execute().name == "networks.safetensors"
    with pytest.raises(FluxError, match=r"SPADE.*python -m flux\.training\.pretrain\.generate"):
        checkpoints.find("outputs/flux")
    loaded = generate.load("outputs/flux")
    params = made.networks.ae.params
    assert (loaded.ae.params.scale_factor, loaded.ae.params.shift_factor) == (
        params.scale_factor,
        params.shift_factor,
    )
    z = mx.random.normal((1, 4, 4, 8), key=mx.random.key(0))
    assert mx.allclose(loaded.ae.decode(z), made.networks.ae.decode(z), atol=1e-5)
    *_, latent = loaded.generate_latents("a picture", latent_size=(2, 2), seed=1)
    assert loaded.decode(latent, (2, 2)).shape == (1, 16, 16, 3)


def test_what_has_no_model_says_so(folder):
    vae = yaml.safe_load(STEPS)[0]
    Run(config(folder, pipeline(vae)), quiet=True).execute()
    with pytest.raises(FluxError, match=r"an autoencoder alone, no step trained the flow"):
        checkpoints.find("outputs/flux")
    (folder / "outputs/flux/ae.safetensors").unlink()
    with pytest.raises(FluxError, match="its training has not finished: go on with the same command"):
        checkpoints.find("outputs/flux")


# --- keys ---


@pytest.mark.parametrize("width", [8, 32, 48, 64, 96, 128, 192, 320, 512, 768, 1024])
def test_its_sizes_are_those_of_networks_that_can_be(width):
    made = networks(width, width, 8, width)
    sizes = made["transformer"]
    sizes["axes_dim"] = tuple(sizes["axes_dim"])
    FluxParams(**{**sizes, "in_channels": width, "vec_in_dim": width, "context_in_dim": width})
    head = sizes["hidden_size"] // sizes["num_heads"]
    assert sum(sizes["axes_dim"]) == head <= 128
    assert all(axis > 0 and axis % 2 == 0 for axis in sizes["axes_dim"])
    assert made["autoencoder"]["ch"] % made["autoencoder"]["norm_groups"] == 0
    assert 4 * made["autoencoder"]["z_channels"] == width, "a token of 16x16 pixels has as many numbers"
    assert made["t5"]["num_heads"] * made["t5"]["d_kv"] == width
    assert width % made["clip"]["num_attention_heads"] == 0


def test_sizes_that_cannot_be_and_our_own_beside_them(folder):
    step = {"name": "a", "train_vae": True, "n_epochs": 1}
    tables = pipeline(step)
    tables["model"]["vae_dim"] = 30
    assert any("vae_dim: 30 must be a multiple of 4" in line for line in faults(folder, tables))
    tables["model"] |= {"vae_dim": 64, "autoencoder": {"z_channels": 4, "ch_mult": [1, 2]}}
    read = config(folder, tables).model.autoencoder
    assert (read.ch, read.z_channels, read.ch_mult) == (64, 4, (1, 2))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"train_diff_full": True}, {"train_diff": True}),
        ({"train_diff": False, "train_diff_full": True}, {"train_diff": True}),
        ({"train_diff": True, "train_diff_full": False}, {"train_diff": True}),
        ({"duration_epochs": 5}, {"n_epochs": 5}),
        (
            {"training_steps": 4, "initial_clipping_norm": 0.5},
            {"gradient_accumulation_steps": 4, "clip_norm": 0.5},
        ),
        (
            {"freeze": ["compressor", "expander", "D_img"]},
            {"freeze": ["encoder", "decoder", "discriminator"]},
        ),
        ({"freeze_vae": True, "freeze_flow": False}, {"freeze": ["vae"]}),
        ({"freeze_modules": {"flow_processor": True, "compressor": False}}, {"freeze": ["flow"]}),
        ({"unfreeze": ["flow_processor"]}, {"unfreeze": ["flow"]}),
        (
            {"train_vae": True, "gan_training": True, "train_reconstruction": False},
            {"train_vae": False, "gan_training": True},
        ),
        (
            {"stop_condition": {"loss_name": "loss_recon", "threshold": 0.01}},
            {"transition_on": {"mode": "loss_threshold", "metric": "vae", "threshold": 0.01}},
        ),
        (
            {
                "transition_criteria": {
                    "min_epochs": 2,
                    "max_epochs": 5,
                    "loss_threshold": 0.1,
                    "metric_name": "vae_loss",
                    "patience": 3,
                }
            },
            {"transition_on": {"mode": "loss_threshold", "metric": "vae", "threshold": 0.1, "max_epochs": 5}},
        ),
        (
            {"optimizers": {"flow_processor": {"optimizer_type": "AdamW", "lr": 1}}},
            {"optimization": {"optimizers": {"flow": {"type": "AdamW", "lr": 1}}}},
        ),
        (
            {"optimization": {"schedulers": {"vae": "CosineAnnealing"}}},
            {"optimization": {"schedulers": {"vae": {"type": "cosine", "min_factor": 0.1}}}},
        ),
        (
            {
                "optimization": {
                    "schedulers": {"vae": {"type": "ReduceLROnPlateau", "factor": 0.5, "patience": 2}}
                }
            },
            {
                "optimization": {
                    "schedulers": {
                        "vae": {"type": "reduce_on_plateau", "gamma": 0.5, "threshold": 1e-4, "patience": 2}
                    }
                }
            },
        ),
        (
            {"optimization": {"schedulers": {"vae": "ExponentialLR"}}},
            {"optimization": {"schedulers": {"vae": {"type": "exponential", "gamma": 0.95}}}},
        ),
        (
            {"optimization": {"schedulers": {"vae": {"type": "LinearLR", "total_iters": 5}}}},
            {"optimization": {"schedulers": {"vae": {"type": "linear", "end_factor": 0.1, "steps": 5}}}},
        ),
        (
            {
                "optimization": {
                    "schedulers": {"vae": {"type": "ConstantLR", "factor": 0.1, "total_iters": 5}}
                }
            },
            {"optimization": {"schedulers": {"vae": {"type": "held", "start_factor": 0.1, "steps": 5}}}},
        ),
        (
            {"optimization": {"schedulers": {"vae": {"type": "cosine", "warmup_steps": 5}}}},
            {"optimization": {"schedulers": {"vae": {"type": "cosine", "warmup_steps": 5}}}},
        ),
    ],
)
def test_keys_of_a_step(given, expected):
    found = Faults()
    tables, _ = fluxflow.translate({"training": {"pipeline": {"steps": [{"name": "a", **given}]}}}, found)
    assert tables["training"]["pipeline"]["steps"] == [{"name": "a", **expected}]
    assert found.lines == []


def test_our_own_files_stay_as_they_are():
    for path in (ROOT / "flux/training/pretrain").glob("*.yaml"):
        raw = yaml.safe_load(path.read_text())
        assert fluxflow.translate(raw, Faults()) == (raw, [])


def test_optimizers_and_schedulers_from_a_file_of_their_own(folder):
    chosen = {
        "optimizers": {
            "vae": {"type": "SGD", "lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}
        },
        "schedulers": {"vae": {"type": "StepLR", "step_size": 10000, "gamma": 0.5}},
    }
    Path("adam_warmup.json").write_text(json.dumps(chosen))
    step = {"name": "a", "train_vae": True, "n_epochs": 1, "optim_sched_config": "adam_warmup.json"}
    (read,) = config(folder, pipeline(step)).steps
    assert read.optimization.optimizers["vae"].nesterov
    assert read.optimization.schedulers["vae"].factor(10000, 10**6) == 0.5
    (read,) = config(folder, pipeline({**step, "optim_sched_config": None})).steps
    assert read.optimization.optimizers == {}


def test_data_sets_by_name_with_their_batch_sizes(folder):
    tables = pipeline(
        {"name": "a", "train_vae": True, "n_epochs": 1, "dataset": "low"},
        {"name": "b", "train_vae": True, "n_epochs": 1, "batch_size": 3},
        {
            "name": "c",
            "train_diff": True,
            "n_epochs": 1,
            "freeze": ["compressor", "expander", "text_encoder"],
        },
    )
    del tables["data"]["data_path"], tables["data"]["captions_file"]
    local = {"type": "local", "image_folder": "images", "captions_file": "captions.txt"}
    tables["training"]["pipeline"] |= {
        "datasets": {"low": {**local, "batch_size": 4, "workers": 1}, "high": {**local, "batch_size": 1}},
        "default_dataset": "high",
    }
    read = config(folder, tables)
    assert [read.dataset_of(step) for step in read.steps] == ["low", "high", "high"]
    assert [(step.batch_size, step.workers) for step in read.steps] == [(4, 1), (3, 0), (1, 0)]
    assert read.steps[2].trained == {"flow"}
    more = {
        "noise": {"type": "noise", "dimensions": [64, 64]},
        "hub": {"type": "webdataset", "webdataset_url": "hf://datasets/a/b/c/*.tar", "webdataset_token": "x"},
        "pipe": {"type": "webdataset", "webdataset_url": "pipe:cat x.tar"},
    }
    tables["training"]["pipeline"]["datasets"] |= more
    found = "\n".join(faults(folder, tables))
    assert "datasets.noise: type noise (random pictures) is not supported" in found
    assert "`hf download a/b --repo-type dataset --local-dir DIR`" in found
    assert "datasets.pipe: pipe:cat x.tar: shards of a command are not read" in found


def test_the_flat_form_with_shards(folder):
    tables = {
        "model": {
            "vae_dim": 32,
            "model_type": "bezier",
            "model_version": "0.7.0",
            "baseline_activation": "silu",
        },
        "data": {
            **{
                "data_path": None,
                "use_webdataset": True,
                "webdataset_url": "s/*.tar",
                "webdataset_token": None,
            },
            **{
                "webdataset_image_key": "png",
                "webdataset_label_key": "json",
                "webdataset_caption_key": "prompt",
            },
            **{
                "webdataset_size": 2000,
                "dataloader_max_retries": 5,
                "img_size": 64,
                "fixed_prompt_prefix": None,
            },
        },
        "training": {
            **{
                "n_epochs": 1,
                "batch_size": 1,
                "lr": 1e-5,
                "lr_min": 0.01,
                "training_steps": 1,
                "train_vae": True,
            },
            **{"preserve_lr": True, "train_diff_full": False, "output_path": "out"},
        },
        "optimization": {"optim_sched_config": None},
        "model_checkpoint": None,
    }
    found = Faults()
    read, notes = fluxflow.translate(tables, found)
    assert found.lines == []
    assert read["datasets"]["data"] == {
        "type": "webdataset",
        "path": "s/*.tar",
        "image_key": "png",
        "caption_key": "prompt",
    }
    said = "\n".join(notes)
    for name in (
        "model.model_type, model.model_version, model.baseline_activation (the networks are FLUX's)",
        "training.preserve_lr",
        "data.webdataset_size",
        "data.dataloader_max_retries",
        "data.webdataset_label_key",
    ):
        assert name in said, name
    assert "webdataset_token" not in said, "null is not given"
    assert read["output"]["output_path"] == "out"


def test_unknown_keys_are_named_with_the_nearest_of_both_kinds(folder):
    tables = pipeline({"name": "a", "train_vae": True, "n_epochs": 1, "initial_cliping_norm": 1, "kl_bta": 1})
    tables["model"]["vae_dimm"] = 32
    tables["data"]["chanels"] = 3
    tables["training"]["use_fp61"] = True
    tables["training"]["batchsize"] = 1
    tables["output"]["no_sample"] = True
    found = "\n".join(faults(folder, tables))
    for wrong, right in {
        "initial_cliping_norm": "initial_clipping_norm",
        "kl_bta": "kl_beta",
        "vae_dimm": "vae_dim",
        "chanels": "channels",
        "use_fp61": "use_fp16",
        "batchsize": "batch_size",
        "no_sample": "no_samples",
    }.items():
        assert f"unknown key {wrong!r}; did you mean {right!r}?" in found


def test_all_faults_in_one_go(folder, monkeypatch, tmp_path):
    """A freeze fault hides no LPIPS fault, nor does a wrong key in another section."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "none"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    step = {
        "name": "a",
        "train_vae": True,
        "n_epochs": 1,
        "use_lpips": True,
        "freeze": ["unet"],
        "lr": "fast",
    }
    other = {"name": "b", "train_vae": True, "n_epochs": 1, "freeze": ["compressor", "expander"]}
    tables = pipeline(step, other)
    tables["output"]["log_interval"] = 0
    tables["data"]["captions_file"] = "none.txt"
    found = faults(folder, tables)
    for words in (
        "'unet' must be one of",
        "lr: must be a number",
        "LPIPS's learned weights",
        "none.txt",
        'step "b": decoder, encoder: frozen, and trained by train_vae',
        "log_interval: 0",
    ):
        assert any(words in line for line in found), words
    assert len(found) == 6


def test_both_ways_to_name_the_config_and_neither(folder, monkeypatch, capsys):
    assert command(monkeypatch, program) == 2
    assert command(monkeypatch, program, "a.yaml", "--config", "b.yaml") == 2
    assert capsys.readouterr().err.count("give one config: CONFIG or --config CONFIG") == 2


# --- what the keys do ---


@pytest.mark.parametrize(
    ("prefix", "prompt"),
    [
        ("style anime", "style anime. a cat"),
        ("an icon, ", "an icon, a cat"),
        ("photo,", "photo, a cat"),
        ("", "a cat"),
    ],
)
def test_a_prefix_is_a_sentence_of_its_own(prefix, prompt):
    assert Data(fixed_prompt_prefix=prefix).prompt("a cat") == prompt


def test_batches_that_are_accumulated_and_epochs_that_are_cut(folder):
    step = {"name": "a", "train_vae": True, "n_epochs": 3, "gradient_accumulation_steps": 2, "max_steps": 1}
    made = config(folder, pipeline(step))
    batches = Batches(made, 0, open_dataset(made.datasets["data"]), None, Shard())
    assert batches.epoch_length == 1  # of the two updates that 8 pictures make
    rows = [batches._rows(number).tolist() for number in range(6)]
    assert len({tuple(sorted(rows[2 * e] + rows[2 * e + 1])) for e in range(3)}) == 3, "each epoch anew"
    done = Run(made, quiet=True)
    done.execute()
    assert done.progress.global_step == 3
    one = {**step, "gradient_accumulation_steps": 5}
    with pytest.raises(FluxError, match="8 pictures cannot fill a batch of 10"):
        Run(config(folder, pipeline(one, output={"output_path": "other"})), quiet=True).execute()


def test_all_batches_of_an_update_have_the_penalty_and_the_weight_of_that_update(folder):
    step = {"name": "a", "train_vae": True, "gan_training": True, "n_epochs": 3, "r1_interval": 3}
    step |= {"gradient_accumulation_steps": 2, "batch_size": 1, "kl_warmup_steps": 100}
    made = config(folder, pipeline(step))
    batches = Batches(made, 0, open_dataset(made.datasets["data"]), None, Shard())
    found = [batches(number) for number in range(8)]
    assert [batch["r1"] for batch in found] == [True] * 2 + [False] * 4 + [True] * 2
    assert len({batch["beta"].item() for batch in found}) == 4


def test_a_gan_alone_does_not_reconstruct(folder):
    """With SPADE too, as documented there."""
    step = {"name": "a", "train_vae": False, "gan_training": True, "train_spade": True, "n_epochs": 1}
    Run(config(folder, pipeline(step)), quiet=True).execute()
    (line, *_) = read_lines(folder / "outputs/flux/graph/training_metrics_a.jsonl")
    assert "vae" not in line["metrics"]
    assert {"kl", "generator", "discriminator"} <= set(line["metrics"])
    assert any(
        "use_lpips needs train_vae" in fault
        for fault in faults(folder, pipeline({**step, "use_lpips": True}))
    )


def test_accumulated_batches_make_the_update_of_a_whole_one(folder):
    """With a sum in the place of the mean the gradient's norm would be four times as great."""
    base = {"name": "a", "train_vae": True, "n_epochs": 1, "clip_norm": 1e-3}
    norms = []
    for name, sizes in (("one", (8, 1)), ("four", (2, 4))):
        step = {**base, "batch_size": sizes[0], "gradient_accumulation_steps": sizes[1]}
        output = {"output_path": name, "log_interval": 1}
        Run(config(folder, pipeline(step, output=output)), quiet=True).execute()
        (line,) = read_lines(folder / name / "graph/training_metrics_a.jsonl")
        norms.append(line["metrics"]["norm"])
    assert norms[1] < 1.5 * norms[0], "the latents' noise makes them differ"


def test_defaults_hold_where_they_can(folder):
    steps = yaml.safe_load(STEPS)
    del steps[1]["optimization"]
    tables = pipeline(*steps)
    tables["training"]["pipeline"]["defaults"] = {
        "freeze": ["text_encoder"],
        "optimization": {"optimizers": {"vae": {"type": "AdamW", "lr": 0.0001}}},
    }
    steps[2].pop("freeze")
    steps[2]["unfreeze"] = ["text_encoder"]
    first, second, flow = config(folder, tables).steps
    assert set(first.optimization.optimizers) == set(second.optimization.optimizers) == {"vae"}
    assert flow.optimization.optimizers == {}
    assert flow.trained == {"flow", "clip", "t5"}


def test_schedulers():
    assert [Linear(1.0, 0.5).factor(step, 5) for step in (0, 2, 4)] == [1.0, 0.75, 0.5]
    assert [Linear(0.0, 1.0, 2).factor(step, 9) for step in (0, 1, 2, 8)] == [0.0, 0.5, 1.0, 1.0]
    assert [Held(0.1, 2).factor(step, 9) for step in (0, 1, 2)] == [0.1, 0.1, 1.0]
    assert Held(0.1).factor(8, 9) == 0.1
    plateau = ReduceOnPlateau(patience=0, threshold=0.1).after_epoch(Plateau(), 1.0)
    assert plateau == Plateau(1.0, 0, 1.0)
    assert ReduceOnPlateau(patience=0, threshold=0.1).after_epoch(plateau, 0.95).factor == 0.5
    assert ReduceOnPlateau(patience=0, threshold=0.1).after_epoch(plateau, 0.85).factor == 1.0


def test_a_rate_falls_to_lr_min_without_a_scheduler(folder):
    step = {"name": "a", "train_vae": True, "n_epochs": 1, "lr": 0.001, "lr_min": 0.01}
    Run(config(folder, pipeline(step)), quiet=True).execute()
    lines = read_lines(folder / "outputs/flux/graph/training_metrics_a.jsonl")
    rates = [line["learning_rates"]["vae"] for line in lines]
    assert (rates[0], rates[-1]) == pytest.approx((1e-3, 1e-5))
    assert rates == sorted(rates, reverse=True)


def test_own_pictures_are_reconstructed_in_samples(folder):
    Image.new("RGB", (40, 40), (250, 0, 0)).save("template.png")
    step = {"name": "a", "train_vae": True, "n_epochs": 1}
    output = {"output_path": "out", "samples_per_checkpoint": 1, "test_image_address": ["template.png"]}
    Run(config(folder, pipeline(step, output=output)), quiet=True).execute()
    (original,) = Path("out/samples").glob("*-original.webp")
    assert np.abs(np.array(Image.open(original)).mean(axis=(0, 1)) - (250, 0, 0)).max() < 8
    output["test_image_address"] = ["absent.png"]
    assert "output.test_image_address: no file absent.png" in faults(folder, pipeline(step, output=output))


# --- LPIPS ---


def test_lpips_finds_its_weights_by_name_or_says_how_to_get_them(tmp_path, monkeypatch):
    cache, package = tmp_path / "torch/hub/checkpoints", tmp_path / "site/lpips"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    with pytest.raises(FluxError, match="pip install --no-deps lpips") as error:
        lpips.find()
    assert "\n" not in str(error.value)
    (package / "weights/v0.1").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('not imported')")
    linear = package / "weights/v0.1/vgg.pth"
    linear.write_bytes(b"")
    importlib.invalidate_caches()
    assert lpips.find() == ("hf://timm/vgg16.tv_in1k/model.safetensors", str(linear))
    cache.mkdir(parents=True)
    (cache / "vgg16-397923af.pth").write_bytes(b"")
    assert lpips.find() == (str(cache / "vgg16-397923af.pth"), str(linear))
    with pytest.raises(FluxError, match="LPIPS: no file /nowhere"):
        lpips.find(vgg="/nowhere")


# --- signals ---


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_state(folder, kind):
    step = {"name": "a", "train_vae": True, "n_epochs": 50}
    (folder / "c.yaml").write_text(yaml.safe_dump(pipeline(step)))
    process = subprocess.Popen(
        [sys.executable, "-m", "flux.training.pretrain", "--config", "c.yaml"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "MLX_DISABLE_COMPILE": "1", "PYTHONPATH": str(ROOT)},
    )
    while "Batch" not in process.stderr.readline():
        pass
    process.send_signal(kind)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.endswith("stopped; go on with the same command and --resume\n"), textwrap.shorten(said, 500)
    assert list((folder / "outputs/flux/checkpoints").iterdir())
