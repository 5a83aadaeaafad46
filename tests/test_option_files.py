"""Options in files: the command line's names and those of other trainers, checked, and kept beside a run."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml

from flux.errors import FluxError
from flux.training.finetune import Options, option_files
from flux.training.finetune.arguments import build_parser, given_options, to_options

# In the manner of toolkits that have taken over diffusers' names.
TOOLKIT = """
model_name: "black-forest-labs/FLUX.1-dev"
dataset_path: "data"
resolution: 512
train_batch_size: 2
lora_rank: 32
lora_alpha: 16
target_modules: ["to_q", "to_k"]
learning_rate: 1e-4
lr_scheduler: "cosine"
lr_warmup_steps: 10
max_train_steps: 500
gradient_accumulation_steps: 4
adam_beta1: 0.9
adam_beta2: 0.99
adam_weight_decay: 0.02
adam_epsilon: 1e-7
max_grad_norm: 0.5
mixed_precision: "bf16"
gradient_checkpointing: true
logging_steps: 10
save_steps: 100
report_to: "tensorboard"
cache_latents: true
seed: 42
hub_model_id: null
"""
TOOLKIT_OPTIONS = Options(
    model="black-forest-labs/FLUX.1-dev",
    data="data",
    data_options={"resolution": (512, 512), "batch_size": 2},
    rank=32,
    alpha=16.0,
    targets="to_q,to_k",
    learning_rate=1e-4,
    schedule="cosine",
    warmup=10,
    iterations=2000,
    accumulate=4,
    adam_beta1=0.9,
    adam_beta2=0.99,
    weight_decay=0.02,
    adam_epsilon=1e-7,
    clip_norm=0.5,
    dtype="bfloat16",
    grad_checkpoint=True,
    log_every=40,
    save_every=400,
    seed=42,
)


def read(folder: Path, text: str, *words: str, suffix: str = ".yaml") -> Options:
    (folder / f"run{suffix}").write_text(text)
    return Options(**to_options(given_options(["--options", str(folder / f"run{suffix}"), *words])))


@pytest.mark.filterwarnings("error")
def test_the_names_of_a_toolkit(tmp_path):
    """Steps there are updates; none of it is left out, so nothing is said."""
    assert read(tmp_path, TOOLKIT) == TOOLKIT_OPTIONS


@pytest.mark.filterwarnings("error")
def test_tables_toml_and_json(tmp_path):
    table = yaml.safe_load(TOOLKIT)
    del table["hub_model_id"]
    sections = {"model": {}, "lora": {}, "training": {}}
    for number, (key, value) in enumerate(table.items()):
        sections[("model", "lora", "training")[number % 3]][key] = value
    assert read(tmp_path, json.dumps(sections), suffix=".json") == TOOLKIT_OPTIONS
    lines = [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    assert read(tmp_path, "[training]\n" + "\n".join(lines), suffix=".toml") == TOOLKIT_OPTIONS


def test_every_long_option_is_a_key(tmp_path):
    """With hyphens or underscores, for some value at least."""
    not_options = {"--help", "--version", "--options", "--check-data", "--resume"}
    for action in build_parser()._actions:
        name = action.option_strings[-1] if action.option_strings else "--data"
        if name not in not_options:
            for key in (name[2:], name[2:].replace("-", "_")):
                assert action.dest in taken(tmp_path, key, action.choices or ()), key


def taken(folder: Path, key: str, choices: Iterable[str]) -> list[str]:
    """The options that a key gives, by the first value that it takes."""
    for value in (*choices, True, 32, 0.5, "x", "64x64", "8"):
        (folder / "run.json").write_text(json.dumps({key: value}))
        try:
            return list(given_options(["--options", str(folder / "run.json")]))
        except FluxError:
            continue
    return []


def test_the_command_line_goes_first(tmp_path):
    found = read(tmp_path, TOOLKIT, "--lora-rank", "4", "--grad-accumulate", "2")
    assert (found.rank, found.accumulate, found.iterations, found.save_every) == (4, 2, 1000, 200)
    found = read(tmp_path, TOOLKIT, "--epochs", "3", "--save-every", "5")
    assert (found.epochs, found.iterations, found.save_every) == (3, None, 5)
    found = read(tmp_path, TOOLKIT, "--config", "data.toml", "--resolution", "64")
    assert found.data == "data.toml"
    assert found.data_options == {"resolution": (64, 64), "batch_size": 2}


FAULTS = [
    ("learning_rte: 1e-4", "unknown option 'learning_rte'; did you mean 'learning-rate'"),
    ("max_trainsteps: 5", "unknown option 'max_trainsteps'; did you mean 'max_train_steps'"),
    ("zzz: 5", "unknown option 'zzz'$"),
    ("max_grad_norm: much", "max_grad_norm: must be a number, not 'much'"),
    ("lora_rank: 2.5", "lora_rank: must be a whole number, not 2.5"),
    ("lora_rank: 0", "lora_rank: 0 must be at least 1"),
    ("gradient_checkpointing: 1", "gradient_checkpointing: must be true or false, not 1"),
    ("max_train_steps: 0", "max_train_steps: .*0 must be at least 1"),
    ("lr_scheduler: polynomial", "lr_scheduler: 'polynomial' must be one of constant, linear"),
    ("resolution: wide", "resolution: must be HEIGHTxWIDTH"),
    ("ae: 3", "ae: must be a text"),
    ("rank: 4\nlora_rank: 8", "lora-rank is given twice"),
    ("save_steps: 8\nsave_every: 4", "save_every: save-every is given twice"),
    ("- a", "must hold a table"),
    ("zzz: 5\nlora_rank: 0", "zzz.*; .*lora_rank: 0 must be"),
]


@pytest.mark.parametrize(("text", "words"), FAULTS)
def test_faults_are_named_all_at_once(tmp_path, text, words):
    with pytest.raises(FluxError, match=words):
        read(tmp_path, text, "data")


NOTES = [
    ("use_8bit_adam: true", "use_8bit_adam is not used: 8-bit states"),
    ("optimizer: adamw8bit", "optimizer: 8-bit states"),
    ("min_snr_gamma: 5", "min_snr_gamma is not used: a weight of models that predict noise"),
    ("save_precision: bf16", "save_precision is not used: the numbers of the saved file"),
    ("resume_from_checkpoint: latest", r"resume_from_checkpoint is not used: .*here --resume DIR"),
]


@pytest.mark.parametrize(("text", "words"), NOTES)
def test_what_there_is_nothing_for_is_said(tmp_path, text, words):
    with pytest.warns(UserWarning, match=words):
        found = read(tmp_path, text, "data")
    assert found == Options(data="data", data_options={})


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("quantize: true", {"quantize": "4"}),
        ("quantize: 8", {"quantize": "8"}),
        ("quantize: false", {}),
        ("weighting_scheme: none", {"time_sampling": "uniform"}),
        ("loss_type: l2", {"loss": "mse"}),
        ("optimizer_type: Prodigy\nlr: 1", {"optimizer": "prodigy", "learning_rate": 1.0}),
        ("adapter: [a.safetensors, 'b:0.5']", {"adapters": (("a.safetensors", 1.0), ("b", 0.5))}),
        ("validation_prompt: a dog", {"progress_prompts": ("a dog",)}),
        ("use_8bit_adam: false\nreport_to: wandb", {}),
    ],
)
@pytest.mark.filterwarnings("error")
def test_values_of_other_trainers(tmp_path, text, options):
    assert read(tmp_path, text, "data") == Options(data="data", **options)


def test_what_is_kept_is_read_again(tmp_path):
    """The file of a run's folder gives the run's options."""
    made = Options(
        data="data",
        data_options={"resolution": (64, 32), "flip_aug": True, "class_tokens": "x", "validation_seed": 3},
        output_dir=str(tmp_path / "run"),
        files={"ae": "ae.safetensors"},
        adapters=(("a.safetensors", 0.5), ("owner/b:c", 1.0)),
        progress_prompts=("one", "two, three"),
        epochs=2,
        quantize="8",
        adam_beta1=0.5,
        dora=True,
    ).resolved()
    option_files.save(made)
    again = Options(**to_options(given_options(["--options", str(tmp_path / "run/options.json")])))
    assert again == made
    assert again.resolved() == made
