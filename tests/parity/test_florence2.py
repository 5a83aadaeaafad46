"""The captioner against transformers' Florence-2: the same random weights, the same pictures and prompts."""

from collections import Counter
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from flux.captioning.captioner import Captioner
from flux.captioning.tasks import TASKS
from flux.models.florence2 import GenerationParams, generate
from flux.preprocessing import PictureParams, prepare
from tests import florence2_reference as reference

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
TOLERANCE = 1e-5
PROMPTS = ["<CAPTION>", "<DETAILED_CAPTION>", "What is it?", "<OD>", "<MORE_DETAILED_CAPTION>"]


@pytest.fixture(scope="module")
def processor():
    return reference.processor(reference.tokenizer())


@pytest.fixture(scope="module")
def theirs(processor):
    torch.set_num_threads(1)
    return reference.network(len(processor.tokenizer))


@pytest.fixture(scope="module")
def folder(theirs, processor, tmp_path_factory) -> Path:
    return reference.save(tmp_path_factory.mktemp("florence2"), theirs, processor)


@pytest.fixture(scope="module")
def ours(folder) -> Captioner:
    return Captioner.from_folder(folder, mx.float32)


def assert_close(ours: mx.array, theirs) -> None:
    ours, theirs = np.array(ours), theirs.detach().numpy()
    assert ours.shape == theirs.shape
    assert np.linalg.norm(ours - theirs) <= TOLERANCE * np.linalg.norm(theirs)


@pytest.mark.parametrize("size", [(96, 64), (50, 97), (128, 33), (224, 224)])
def test_picture_features(theirs, ours, size):
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = theirs.model.get_image_features(pixels)
    pixels = mx.array(pixels.permute(0, 2, 3, 1).numpy())
    assert_close(ours.model.vision_tower(pixels), features.last_hidden_state.permute(0, 2, 3, 1))
    assert_close(ours.model.image_features(pixels), features.pooler_output)


def test_encoder_and_scores(theirs, ours, processor):
    images = reference.pictures(3)
    texts = ["<CAPTION>", "<DETAILED_CAPTION>", "?"]  # of three lengths: the shorter ones are padded
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
    answers = torch.randint(4, 400, (3, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        out = theirs(**inputs, decoder_input_ids=answers)

    model, answers = ours.model, mx.array(answers.numpy())
    pixels = mx.array(inputs["pixel_values"].permute(0, 2, 3, 1).numpy())
    skipped = processor.num_image_tokens
    tokens = mx.array(inputs["input_ids"][:, skipped:].numpy())
    mask = mx.array(inputs["attention_mask"][:, skipped:].numpy())
    assert not mask.all()
    assert_close(model.encode(pixels, tokens, mask)[0], out.encoder_last_hidden_state)
    assert_close(model(pixels, tokens, answers, mask), out.logits)

    # A token, then three, then the rest: the cache must not show.
    language = model.language_model
    cache = language.cache(*model.encode(pixels, tokens, mask))
    steps = [language.decode(answers[:, a:b], cache) for a, b in ((0, 1), (1, 4), (4, 9))]
    assert_close(language.logits(mx.concatenate(steps, axis=1)), out.logits)


def their_answers(theirs, inputs, end: int = 2, **settings) -> list[list[int]]:
    """Without the decoder's start token and the padding."""
    ends = {"eos_token_id": end, "forced_eos_token_id": end}
    rows = theirs.generate(**inputs, do_sample=False, **(ends | settings)).tolist()
    return [row[1 : row.index(end, 1) + 1] if end in row[1:] else row[1:] for row in rows]


@pytest.fixture(scope="module")
def common_token(theirs, processor) -> int:
    """A token frequent in the middle of answers: taken for the end token, it ends some of them early."""
    inputs = processor(text=["<CAPTION>"] * 10, images=reference.pictures(10), return_tensors="pt")
    rows = their_answers(theirs, inputs, num_beams=3, max_new_tokens=16)
    return Counter(token for row in rows for token in set(row[4:-1])).most_common(1)[0][0]


@pytest.mark.parametrize("beams", [1, 3])
def test_fifty_pictures(theirs, ours, processor, common_token, beams):
    images, answers = reference.pictures(50), []
    tokens, mask = ours.tokenizer(processor._construct_prompts(PROMPTS))
    assert not mask.all()
    for start in range(0, 50, 5):
        batch = images[start : start + 5]
        end = common_token if start % 2 else 2
        inputs = processor(text=PROMPTS, images=batch, padding=True, return_tensors="pt")
        expected = their_answers(theirs, inputs, end, num_beams=beams, max_new_tokens=16)
        params = GenerationParams(beams, max_new_tokens=16, eos_token_id=end, forced_eos_token_id=end)
        pixels = prepare(batch, ours.pictures)
        answers += generate(ours.model, pixels, tokens, mask, params)
        assert answers[start:] == expected
    lengths = set(map(len, answers))
    assert min(lengths) < 16 == max(lengths)  # some end by themselves, some are cut
    assert len(set(map(tuple, answers))) > 25


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3, "early_stopping": False},
        {"num_beams": 4, "early_stopping": False, "length_penalty": 0.2},
        {"num_beams": 2, "length_penalty": 2.0},
        {"num_beams": 3, "length_penalty": -1.0},
        {"num_beams": 3, "no_repeat_ngram_size": 0},
        {"num_beams": 1, "no_repeat_ngram_size": 2},
        {"num_beams": 3, "forced_bos_token_id": None, "forced_eos_token_id": None},
    ],
)
def test_settings(theirs, ours, processor, common_token, settings):
    images = reference.pictures(8)
    inputs = processor(text=["<CAPTION>"] * 8, images=images, return_tensors="pt")
    expected = their_answers(theirs, inputs, common_token, max_new_tokens=17, **settings)
    tokens, mask = ours.tokenizer([TASKS["caption"].ask()] * 8)
    ends = {"eos_token_id": common_token, "forced_eos_token_id": common_token}
    params = GenerationParams(max_new_tokens=17, **(ends | settings))
    answers = generate(ours.model, prepare(images, ours.pictures), tokens, mask, params)
    assert answers == expected


def test_pixels_are_the_reference_processor_s(processor):
    params = PictureParams(reference.HEIGHT, reference.WIDTH)
    images = reference.pictures(6)
    images += [images[1].convert("L"), images[2].convert("RGBA"), images[4].convert("P")]
    images += [Image.new("RGB", (1, 1), "red"), images[5].resize((reference.WIDTH, reference.HEIGHT))]
    expected = processor.image_processor(images, return_tensors="np")["pixel_values"]
    assert np.array_equal(np.array(prepare(images, params)), expected.transpose(0, 2, 3, 1))


def test_real_pictures_end_to_end(theirs, ours, processor, shared):
    paths = sorted(path for path in (shared / "data").rglob("*") if path.suffix in (".jpg", ".jpeg", ".png"))
    assert len(paths) == 18
    ours.generation = GenerationParams(max_new_tokens=12)
    names = ("caption", "od", "ocr_with_region")
    for start in range(0, 18, 6):
        task = TASKS[names[start // 6]]
        images = [Image.open(path).convert("RGB") for path in paths[start : start + 6]]
        inputs = processor(text=[task.token] * 6, images=images, return_tensors="pt")
        rows = theirs.generate(**inputs, do_sample=False, max_new_tokens=12)
        texts = processor.batch_decode(rows, skip_special_tokens=False)
        expected = [
            processor.post_process_generation(
                text=text.replace("<pad>", ""), task=task.token, image_size=image.size
            )[task.token]
            for text, image in zip(texts, images, strict=True)
        ]
        assert ours.answers(images, task) == expected
