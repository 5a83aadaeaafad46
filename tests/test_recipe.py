"""The recipe of the built-in model, whole, in miniature: trained by the pipeline, exported, drawn with."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from flux import FluxPipeline
from flux.generation import generate
from flux.recipes import emoji
from flux.recipes.tiny import recipe, scenes
from flux.requests import Request
from flux.training.pretrain.run import Run
from flux.training.pretrain.validate import load

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "flux/recipes/tiny/recipe.yaml"
needs_font = pytest.mark.skipif(not emoji.FONT.is_file(), reason="needs the font Noto Color Emoji")


@needs_font
def test_the_recipe_is_valid_and_sees_every_size(monkeypatch):
    monkeypatch.setattr(recipe, "SCENES", 300)
    config = load(RECIPE)
    assert [step.name for step in config.steps] == ["vae", "vae_whole", "flow"]
    assert set(config.data.buckets) == set(scenes.CANVASES)
    assert config.model.t5_length > 20


@needs_font
def test_a_miniature_is_trained_exported_and_drawn_with(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "SCENES", 120)
    tables = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    tables["model"]["autoencoder"] |= {"ch": 4, "ch_mult": [1, 1, 2, 2], "z_channels": 4, "norm_groups": 2}
    sizes = {"hidden_size": 16, "num_heads": 1, "depth": 1, "depth_single_blocks": 1, "axes_dim": [4, 6, 6]}
    tables["model"]["transformer"] |= sizes
    for step in tables["training"]["pipeline"]["steps"]:
        step |= {"max_steps": 2, "batch_size": 2, "compile": False}
    tables["output"] |= {"output_path": str(tmp_path / "run"), "samples_per_checkpoint": 1, "sample_steps": 1}
    tables["output"]["sample_sizes"] = [64, [128, 64]]
    (tmp_path / "c.json").write_text(json.dumps(tables))
    Run(load(tmp_path / "c.json"), quiet=True).execute()
    export = ["-m", "flux.recipes.tiny.export", "--run", tmp_path / "run", "--output", tmp_path / "tiny"]
    subprocess.run([sys.executable, *export], check=True, cwd=ROOT, capture_output=True)
    pipeline = FluxPipeline(str(tmp_path / "tiny"))
    assert (pipeline.spec.name, pipeline.spec.image_size) == ("tiny", (128, 128))
    assert pipeline.known_words is not None
    assert pipeline.known_words.sides == (64, 128)
    assert pipeline.known_words.of_prompt("Two puppies on a light blue background") is None
    (line,) = [pipeline.known_words.of_prompt("a pupy on Mars")]
    assert line is not None
    assert "dog face" in line
    (picture,) = generate(pipeline, [Request("a dog", image_size=(64, 128), steps=1)])
    assert picture.shape == (64, 128, 3)
    assert picture.dtype == np.uint8
