"""The commands and config files of the systems that these programs follow, as their documents have them.

Only what makes them large is changed, by a last word on the command line: the model, the length, the size.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import caption
import dreambooth
import txt2image
from flux import adapters
from flux.evaluation import __main__ as evaluation
from flux.training.report import read_lines

from ..datasets import two_concepts, write_pictures

PROGRAMS = {"dreambooth.py": dreambooth, "txt2image.py": txt2image, "caption.py": caption}
ROOT = Path(dreambooth.__file__).parent
RECIPE = ROOT / "flux/training/two_concepts.md"


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Types a command in the test's folder; its lines of stdout and stderr. It must end well."""
    monkeypatch.chdir(tmp_path)

    def call(command: str, *more: str) -> tuple[list[str], list[str]]:
        words = [*shlex.split(command.removeprefix("python ")), *more]
        program = PROGRAMS.get(words[0])
        if words[:2] == ["-m", "flux.evaluation"]:
            program, words = evaluation, words[1:]
        monkeypatch.setattr(sys, "argv", words)
        status = program.main()
        out, err = capsys.readouterr()
        assert status == 0, err
        return out.splitlines(), err.splitlines()

    return call


@pytest.fixture
def dog6(tmp_path, call) -> Path:
    """The five pictures and the train.jsonl of mlx-examples' walk-through."""
    folder = write_pictures(
        tmp_path / "path/to/dreambooth/dataset/dog6", {f"0{i}.jpg": (64, 64) for i in range(5)}
    )
    rows = [{"image": f"0{i}.jpg", "prompt": "A photo of sks dog"} for i in range(5)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


DREAMBOOTH = """python dreambooth.py \
    --progress-prompt 'A photo of an sks dog lying on the sand at a beach in Greece' \
    --progress-every 600 --iterations 1200 --learning-rate 0.0001 \
    --lora-rank 4 --grad-accumulate 8 \
    path/to/dreambooth/dataset/dog6"""
TXT2IMAGE = """python txt2image.py --model dev --save-raw --image-size {size} --n-images 1 \
    --adapter mlx_output/final_adapters.safetensors \
    --fuse-adapter \
    --no-t5-padding \
    'A photo of an sks dog lying on the sand at a beach in Greece'"""


def test_mlx_examples(call, dog6, tmp_path):
    """Its walk-through, typed twice: the second training keeps the first."""
    small = ("--model", "tiny", "--iterations", "8")
    for expected in (["mlx_output"], ["mlx_output", "mlx_output.1"]):
        out, _ = call(DREAMBOOTH, *small)
        assert out == ["mlx_output/final_adapters.safetensors"]
        assert sorted(path.name for path in tmp_path.glob("mlx_output*")) == expected
    for size, shape in (("512x512", (64, 64)), ("512x1024", (64, 128))):
        command = TXT2IMAGE.format(size=size)
        call(command, "--model", "tiny", "--steps", "1", "--image-size", "x".join(map(str, shape)))
        with Image.open(tmp_path / "out.0.png") as picture:
            assert (picture.height, picture.width) == shape
    options = json.loads((tmp_path / "mlx_output/options.json").read_text())
    assert (options["lora-rank"], options["grad-accumulate"]) == (4, 8)


# The options of the DGX Spark recipe's command, as sd-scripts takes them from a file.
SPARK = """
pretrained_model_name_or_path = "models/checkpoints/flux1-dev.safetensors"
clip_l = "models/text_encoders/clip_l.safetensors"
t5xxl = "models/text_encoders/t5xxl_fp16.safetensors"
ae = "models/vae/ae.safetensors"
dataset_config = "flux_data/data.toml"
output_dir = "models/loras/"
prior_loss_weight = 1.0
output_name = "flux_dreambooth"
save_model_as = "safetensors"
network_module = "networks.lora_flux"
network_dim = 256
network_alpha = 256
learning_rate = 1.0
optimizer_type = "Prodigy"
lr_scheduler = "cosine_with_restarts"
gradient_accumulation_steps = 4
gradient_checkpointing = true
sdpa = true
max_train_epochs = 100
save_every_n_epochs = 25
mixed_precision = "bf16"
guidance_scale = 1.0
timestep_sampling = "flux_shift"
model_prediction_type = "raw"
torch_compile = true
persistent_data_loader_workers = true
cache_latents = true
cache_latents_to_disk = true
cache_text_encoder_outputs = true
cache_text_encoder_outputs_to_disk = true
"""


SPARK_FILES = {  # and of the built-in model
    "models/checkpoints/flux1-dev.safetensors": "transformer/diffusion_pytorch_model.safetensors",
    "models/text_encoders/clip_l.safetensors": "text_encoder/model.safetensors",
    "models/text_encoders/t5xxl_fp16.safetensors": "text_encoder_2/model.safetensors",
    "models/vae/ae.safetensors": "vae/diffusion_pytorch_model.safetensors",
}


def small_two_concepts(shared: Path, folder: Path) -> None:
    """The set as its users have it, with its data.toml, whose one change is the size."""
    two_concepts(shared, folder)
    source = (folder / "flux_data").resolve()
    (folder / "flux_data").unlink()
    shutil.copytree(source, folder / "flux_data")
    toml = folder / "flux_data/data.toml"
    toml.write_text(toml.read_text().replace("resolution = 1024", "resolution = 64"))


def test_the_dgx_spark_recipe(call, tmp_path, shared):
    """Its data.toml and its options, with the model's parts as files where it has them."""
    small_two_concepts(shared, tmp_path)
    for name, part in SPARK_FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "flux/assets/tiny" / part, tmp_path / name)
    (tmp_path / "train.toml").write_text(SPARK)
    small = ("--lora-rank", "4", "--lora-alpha", "4", "--epochs", "1", "--save-every-epochs", "1")
    out, err = call("python dreambooth.py --options train.toml --model tiny --dtype float32", *small)
    assert out == ["models/loras/flux_dreambooth.safetensors"]
    assert not [line for line in err if "not used" in line]
    assert any("20 batches an epoch; 20 iterations, 5 updates, 1 epochs" in line for line in err)
    names = sorted(path.name for path in (tmp_path / "models/loras").glob("*.safetensors"))
    assert names == [f"flux_dreambooth{when}.safetensors" for when in ("-000001", "")]


# The config.yaml of a LoRA toolkit, with the names that it documents.
TOOLKIT = """
model_name: "black-forest-labs/FLUX.1-dev"
learning_rate: 1e-4
lr_scheduler: "constant"
lr_warmup_steps: 0
max_train_steps: 1000
gradient_accumulation_steps: 4
adam_beta1: 0.9
adam_beta2: 0.999
adam_weight_decay: 0.01
adam_epsilon: 1.0e-8
max_grad_norm: 1.0
mixed_precision: "bf16"
gradient_checkpointing: true
rank: 16
alpha: 16
logging_steps: 10
save_steps: 500
"""


def test_the_config_of_the_toolkit(call, dog6, tmp_path):
    """Its steps are updates. Its data set is an index.json."""
    (tmp_path / "config.yaml").write_text(TOOLKIT)
    (dog6 / "train.jsonl").unlink()
    rows = [{"image": f"0{i}.jpg", "prompt": "A photo of sks dog"} for i in range(5)]
    (dog6 / "index.json").write_text(json.dumps(rows))
    found = "path/to/dreambooth/dataset/dog6"
    small = ("--model", "tiny", "--iterations", "22", "--grad-accumulate", "1", "--lora-rank", "2")
    _, err = call(f"python dreambooth.py --options config.yaml --dtype float32 {found}", *small)
    shown = [line.split(" |")[0] for line in err if line.startswith("iteration")]
    assert shown == ["iteration 10/22", "iteration 20/22"]
    updates = [line for line in read_lines(tmp_path / "mlx_output/events.jsonl") if line["event"] == "update"]
    assert len(updates) == 22
    assert {line["rate"] for line in updates} == {np.float32(1e-4).item()}


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of a document's fenced blocks."""
    return re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)


def test_the_recipe_of_two_concepts(call, tmp_path, shared):
    """two_concepts.md from top to bottom, but for the model, the size, the rank and the epochs."""
    small_two_concepts(shared, tmp_path)
    (tmp_path / "flux_data/data.toml").unlink()
    said: list[str] = []
    for language, content in blocks(RECIPE.read_text()):
        small = content.replace("model: dev", "model: tiny").replace("--model dev", "--model tiny")
        small = small.replace("resolution = 1024", "resolution = 64").replace("256", "4")
        small = small.replace("epochs: 100", "epochs: 1").replace(
            "save-every-epochs: 25", "save-every-epochs: 1"
        )
        small = re.sub("--steps [0-9]+", "--steps 1", small)
        if language in ("toml", "yaml"):
            (tmp_path / small.split("\n")[0].removeprefix("# ")).write_text(small)
            continue
        for command in small.strip().split("\n"):
            if command.startswith("python"):
                out, err = call(command)
                said += [*out, *err]
            else:
                subprocess.run(shlex.split(command), cwd=tmp_path, check=True)
    assert "20 steps an epoch" in said
    assert any("20 iterations, 5 updates, 1 epochs" in line for line in said)
    with Image.open(tmp_path / "grid.png") as grid, Image.open(tmp_path / "both.png") as both:
        assert grid.width > both.width
    adapter = adapters.load(tmp_path / "ComfyUI/models/loras/flux_dreambooth.safetensors")
    assert adapter.format == "kohya"
