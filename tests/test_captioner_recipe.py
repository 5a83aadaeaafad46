"""The recipe of the built-in captioner: vocabulary, pictures, loss, export, evaluation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from flux.captioning.captioner import Captioner
from flux.captioning.tasks import TASKS
from flux.captioning.tokenizer import FLORENCE_TOKENS
from flux.errors import FluxError
from flux.models.florence2 import Florence2
from flux.recipes import emoji
from flux.recipes.captioner import evaluate, export, recipe
from flux.recipes.captioner.__main__ import ProbedTower, caption_loss, make_captioner, tower_loss
from flux.recipes.captioner.pictures import Pictures, augment, captioned, features, normalised, places
from flux.recipes.emoji import Composition
from flux.training.matmul_convolution import use_products

ROOT = Path(__file__).parents[1]
needs_font = pytest.mark.skipif(not emoji.FONT.is_file(), reason="needs the font Noto Color Emoji")
PROMPTS = [f"<s>{TASKS[task].ask()}</s>" for task in recipe.CAPTION_TASKS]
APPLE = Composition(("red apple",), "blue", "large", "centre")


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("captioner") / "tokenizer"
    recipe.load_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(vocabulary):
    return recipe.load_tokenizer(vocabulary)


# --- Vocabulary ---


def test_every_word_of_every_subject_is_one_token(tokenizer):
    for name in emoji.subjects():
        for text in emoji.captions(Composition((name,), "gray", "small", "top")):
            assert len(tokenizer.encode(text)) - 2 == len(tokenizer.WORDS.findall(text)), text
            assert tokenizer.decode(tokenizer.encode(text)) == f"<s>{text}</s>"


def test_it_encodes_any_text_and_has_florences_tokens(tokenizer):
    text = "Ein Äpfelchen, 3 € <loc_17>"
    assert tokenizer.decode(tokenizer.encode(text)) == f"<s>{text}</s>"
    assert set(FLORENCE_TOKENS) <= tokenizer.special.keys()
    assert sorted({**tokenizer.vocab, **tokenizer.special}.values()) == list(
        range(recipe.params(tokenizer).language.vocab_size)
    )


# --- Pictures ---


def test_the_tasks_say_ever_more():
    assert recipe.answers(APPLE) == [
        "a red apple on a blue background",
        "a large red apple in the centre of a blue background",
        "a blue background with a large red apple in the centre",
    ]


@needs_font
def test_batches_are_functions_of_the_step_and_hold_nothing_out(tokenizer, tmp_path):
    pictures = Pictures(30, 3, tmp_path / "run")
    for folder in ("run", "other"):  # read, and made again
        again = Pictures(30, 3, tmp_path / folder)
        assert np.array_equal(pictures.pixels, again.pixels)
        assert pictures.compositions == again.compositions
    assert not any(composition.held_out for composition in pictures.compositions)
    index = {name: i for i, name in enumerate(pictures.names)}
    shown = {pixels.tobytes(): c for pixels, c in zip(pictures.pixels, pictures.compositions, strict=True)}
    assert len(shown) == 30

    seen = set()
    kinds = (
        pictures.batches(40, seed=3),
        captioned(pictures.pixels, pictures.compositions, tokenizer, 40, seed=3),
    )
    for batch in kinds:
        first, again, other = batch(5), batch(5), batch(6)
        assert all(mx.array_equal(first[name], again[name]) for name in first)
        assert not any(mx.array_equal(first[name], other[name]) for name in first if name != "mask")
    batch = kinds[0](5)
    for picture, shares in zip(np.array(batch["pictures"]), np.array(batch["places"]), strict=True):
        assert np.array_equal(shares, places(shown[picture.tobytes()], index))
    batch = kinds[1](5)
    rows = zip(*(batch[name].tolist() for name in ("answers", "prompts", "mask")), strict=True)
    for picture, (answer, prompt, mask) in zip(np.array(batch["shown"]), rows, strict=True):
        composition = shown[picture.tobytes()]
        kept = tokenizer.decode(token for token, is_seen in zip(prompt, mask, strict=True) if is_seen)
        task = PROMPTS.index(kept)
        answer = tokenizer.decode(answer).replace("<pad>", "")
        assert answer == f"<s>{recipe.answers(composition)[task]}</s>"
        seen.add(task)
    assert seen == {0, 1, 2}


def test_features_are_of_normalised_pictures():
    pictures = np.random.default_rng(0).integers(0, 256, (70, 64, 64, 3), dtype=np.uint8)
    found = features(lambda pixels: pixels[:, ::16, ::16], pictures)
    pixels = (pictures / 255 - recipe.PICTURES.mean) / recipe.PICTURES.deviation
    assert np.allclose(found, pixels[:, ::16, ::16], atol=1e-5)


def test_places_that_subjects_cover():
    """The feature map has 4 x 4 places, of 16 pixels; a large subject's box has 48, a small one's 32."""
    index = {"red apple": 0, "owl": 1}
    edge, whole = [0.25, 0.5, 0.5, 0.25], [0.5, 1, 1, 0.5]
    shares = places(APPLE, index)  # its box is in the middle, 8 pixels from each edge
    assert shares[:, :, 0].tolist() == [edge, whole, whole, edge]
    assert not shares[:, :, 1].any()
    shares = places(Composition(("owl", "red apple"), "red", "small", "pair"), index)
    assert np.array_equal(shares[1:3], [[[0, 1, 0], [0, 1, 0], [1, 0, 0], [1, 0, 0]]] * 2)
    assert np.array_equal(shares[[0, 3]], np.full((2, 4, 3), [0, 0, 1]))


@needs_font
def test_damaged_pictures_are_still_the_pictures():
    picture, rng = emoji.Renderer()(APPLE), np.random.default_rng(0)
    made = [augment(picture, emoji.COLOURS["blue"], rng) for _ in range(60)]
    assert all(other.shape == (64, 64, 3) and other.dtype == np.uint8 for other in made)
    distances = [np.abs(other.astype(float) - picture).mean() for other in made]
    assert 0 < np.mean(distances) < max(distances) < 25
    assert 0.0 in distances  # some are as they were


# --- Training ---


def test_tower_loss_is_of_every_place():
    """By hand, from the network's own scores; and the products that training computes with change nothing."""
    mx.random.seed(0)
    model, rng = ProbedTower(recipe.VISION), np.random.default_rng(0)
    pictures = rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    shares = rng.dirichlet(np.ones(recipe.SUBJECTS + 1), (2, 4, 4)).astype(np.float32)
    pixels = ((pictures / 255 - recipe.PICTURES.mean) / recipe.PICTURES.deviation).astype(np.float32)
    scores = np.array(model(mx.array(pixels)), np.float64)
    expected = -(shares * (scores - np.log(np.exp(scores).sum(-1, keepdims=True)))).sum(-1).mean()
    use_products(model)
    batch = {"pictures": mx.array(pictures), "places": mx.array(shares)}
    assert tower_loss(model, batch, mx.random.key(0))[0].item() == pytest.approx(expected, rel=1e-5)


def test_caption_loss_is_of_the_next_token_and_not_of_padding(tokenizer):
    mx.random.seed(0)
    model = make_captioner(tokenizer)
    prompts, mask = tokenizer([TASKS["caption"].ask(), TASKS["detailed"].ask()])
    rows = [tokenizer.encode(text) for text in ("a red apple", "an owl on a red background")]
    answers = np.full((2, recipe.ANSWER_LENGTH), tokenizer.pad_token_id, np.int32)
    for answer, row in zip(answers, rows, strict=True):
        answer[: len(row)] = row
    pictures = (255 * mx.random.uniform(shape=(2, 64, 64, 3))).astype(mx.uint8)
    pixels = normalised(pictures)
    losses = []
    for i, row in enumerate(rows):
        own = slice(i, i + 1)
        scores = model(pixels[own], prompts[own], mx.array([[2, *row[:-1]]]), mask[own])[0]
        log_probs = np.array(scores - mx.logsumexp(scores, axis=-1, keepdims=True))
        losses += [-log_probs[place, token] for place, token in enumerate(row)]
    batch = {"prompts": prompts, "mask": mask, "answers": mx.array(answers)}
    for shown in (pictures, model.vision_tower(pixels)):
        loss, _ = caption_loss(model, batch | {"shown": shown}, mx.random.key(0), tokenizer.pad_token_id)
        assert loss.item() == pytest.approx(np.mean(losses), rel=1e-5)


@needs_font
def test_training_resumes_exports_and_is_read(tmp_path):
    """As programs, two steps of it: the parts fit together."""
    environment = {**os.environ, "MLX_DISABLE_COMPILE": "1", "PYTHONPATH": str(ROOT)}

    def call(*words: object) -> str:
        command = [sys.executable, "-m", *map(str, words)]
        run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
        assert run.returncode == 0, run.stderr
        return run.stdout

    program, state = "flux.recipes.captioner", "captioner.safetensors"
    options = ("--run", tmp_path / "run", "--batch", 2, "--pictures", 4, "--pool", 2)
    call(program, *options, "--tower-steps", 2, "--language-steps", 1, "--steps", 1)
    call(program, *options, "--tower-steps", 2, "--language-steps", 2, "--steps", 2)
    call(f"{program}.export", "--run", tmp_path / "run", "--output", tmp_path / "out")
    captioner = Captioner.from_folder(tmp_path / "out", mx.float32)
    trained, metadata = mx.load(str(tmp_path / "run" / state), return_metadata=True)
    assert metadata["step"] == "2"
    name = "vision_tower.convs.1.conv.weight"
    exported, last = captioner.model.vision_tower.convs[1].conv.weight, trained[f"model.{name}"]
    assert mx.array_equal(exported, last.astype(mx.float16).astype(mx.float32))
    first, language = (mx.load(str(tmp_path / "run" / f"{n}.safetensors")) for n in ("tower", "language"))
    assert mx.array_equal(first["model.tower.convs.1.conv.weight"], language[f"model.{name}"])
    assert not mx.array_equal(language[f"model.{name}"], last)
    assert captioner.pictures == recipe.PICTURES
    assert captioner.generation == recipe.GENERATION
    out = tmp_path / "figures.json"
    call(f"{program}.evaluate", "--captioner", tmp_path / "out", "--count", 2, "--output", out)
    assert json.loads(out.read_text())["true renderings"]["all"].startswith("0.0% (0 of 2;")


def test_export_replaces_nothing(vocabulary, tokenizer, tmp_path):
    network = Florence2(recipe.params(tokenizer))
    with pytest.raises(FluxError, match="is there already"):
        export.save(tmp_path, network, vocabulary)
    (tmp_path / "file").touch()
    with pytest.raises(FluxError, match=r"file/x: cannot be written"):
        export.save(tmp_path / "file" / "x", network, vocabulary)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# --- Evaluation ---


def test_captions_that_agree_in_some_things():
    others = {
        "subject": Composition(("banana",), "blue", "large", "centre"),
        "background": Composition(("red apple",), "red", "large", "centre"),
        "place": Composition(("red apple",), "blue", "large", "left"),
        "size": Composition(("red apple",), "blue", "small", "centre"),
    }
    for wrong, said in others.items():
        for caption in emoji.captions(said):
            shares = evaluate.agreement([caption], [APPLE])
            missed = {name for name, share in shares.items() if not share.right}
            both = {"subject and background"} if wrong in ("subject", "background") else set()
            assert missed == {wrong, "all", *both}
    pair = Composition(("owl", "key"), "red", "small", "pair")
    swapped = Composition(("key", "owl"), "red", "small", "pair")
    assert evaluate.agreement(emoji.captions(swapped), [pair, pair])["subject"].right == 0
    assert evaluate.agreement(["a fine day"], [APPLE])["background"].right == 0


@needs_font
def test_a_captioner_that_knows_is_right_and_one_that_is_late_is_not():
    """A stub that looks pictures up among the renderings; the damaged ones are for the other tests."""
    shown = evaluate.held_out_singles(30) + evaluate.held_out_pairs(10)
    assert all(composition.held_out for composition in shown)
    known = {
        image.tobytes(): emoji.captions(composition)[-1]
        for image, composition in zip(evaluate.renderings(shown), shown, strict=True)
    }

    def say(images: list[Image.Image]) -> list[str]:
        return [known.get(image.tobytes(), "") for image in images]

    shares = evaluate.agreement(say(evaluate.renderings(shown)), shown)
    assert {share.right for share in shares.values()} == {40}
    late = evaluate.agreement(say(evaluate.renderings(shown)), shown[1:] + shown[:1])
    assert late["all"].right == 0
    assert late["subject"].right <= 2


@needs_font
@pytest.mark.parametrize("honest", [True, False])
def test_read_back(honest, monkeypatch):
    """Every rendering on a background is known: what the generator draws is what is read."""

    def draw(generator, prompts):
        """What a generator draws of a prompt is the true rendering, or of another subject."""
        shown = [emoji.parse(prompt) for prompt in prompts]
        if not honest:
            shown = [Composition(("key",), one.colour, one.size, one.place) for one in shown]
        return np.stack([emoji.Renderer()(one) for one in shown]), 0.0

    monkeypatch.setattr(evaluate, "draw", draw)

    def say(images: list[Image.Image]) -> list[str]:
        render = emoji.Renderer()
        known = {render(c).tobytes(): emoji.captions(c)[0] for c in emoji.compositions(True)}
        return [known.get(image.tobytes(), "a key on a red background") for image in images]

    shares, rows = evaluate.read_back(say, None, 12)
    assert shares["all"].right == (12 if honest else 0)
    assert len(rows) == 12
    assert rows[0].keys() == {"prompt", "caption"}
