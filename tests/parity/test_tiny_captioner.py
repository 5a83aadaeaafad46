"""The built-in captioner's folder is a real checkpoint: transformers reads it and says the same."""

import re
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_map
from PIL import Image

from flux.captioning.captioner import Captioner
from flux.captioning.tasks import TASKS
from flux.models.florence2 import Florence2
from flux.recipes import emoji
from flux.recipes.captioner import evaluate, export, recipe
from flux.weights.registry import TINY_CAPTIONER_FOLDER

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("captioner")
    network = Florence2(recipe.params(recipe.load_tokenizer(folder / "tokenizer")))
    mx.random.seed(0)
    network.update(tree_map(lambda w: w + 0.1 * mx.random.normal(w.shape), network.parameters()))
    export.save(folder / "random", network, folder / "tokenizer")
    return folder / "random"


def pictures() -> list[Image.Image]:
    """Renderings, some of them in other sizes, and one without any emoji."""
    if not emoji.FONT.is_file():
        pytest.skip("needs the font Noto Color Emoji")
    images = evaluate.renderings([*evaluate.held_out_singles(6), *evaluate.held_out_pairs(2)])
    images[1] = images[1].resize((150, 90))
    return [*images, Image.linear_gradient("L")]


@pytest.mark.parametrize("which", ["random", "built-in"])
def test_transformers_says_the_same(which, request):
    if which == "built-in" and not TINY_CAPTIONER_FOLDER.is_dir():
        pytest.skip("the built-in captioner is not there yet")
    folder = TINY_CAPTIONER_FOLDER if which == "built-in" else request.getfixturevalue("random_weights")
    ours = Captioner.from_folder(folder, mx.float32)
    theirs = transformers.Florence2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    processor = transformers.Florence2Processor(
        transformers.CLIPImageProcessorPil.from_pretrained(folder),
        transformers.AutoTokenizer.from_pretrained(folder),
    )
    images = pictures()
    for task in recipe.CAPTION_TASKS:
        inputs = processor(text=[TASKS[task].token] * len(images), images=images, return_tensors="pt")
        rows = theirs.eval().generate(**inputs)
        expected = processor.tokenizer.batch_decode(rows)  # tokens of places are special, and are compared
        said = ours.answers(images, TASKS[task])
        assert said == [re.sub("</?s>|<pad>", "", text).strip() for text in expected]
        assert len(set(said)) > 3
