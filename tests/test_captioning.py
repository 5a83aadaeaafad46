"""The captioner's tasks, and its network in batches: what needs no reference."""

from dataclasses import replace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from flux.captioning.tasks import TASKS, find_task, region
from flux.errors import FluxError
from flux.models.florence2 import (
    Florence2,
    Florence2Params,
    GenerationParams,
    LanguageParams,
    VisionParams,
    generate,
)

PARAMS = Florence2Params(
    VisionParams(
        embed_dim=(8, 8, 8, 8), depths=(1, 1, 1, 1), num_heads=(2,) * 4, num_groups=(2,) * 4, window_size=4
    ),
    LanguageParams(60, 16, 1, 1, 2, 2, 16, 16, max_position_embeddings=20),
    max_position_embeddings=3,
)


@pytest.fixture(scope="module")
def model() -> Florence2:
    mx.random.seed(3)
    model = Florence2(PARAMS)
    weights = []
    for name, w in tree_flatten(model.parameters()):
        noise = mx.random.normal(w.shape)
        weights.append((name, 0.7 * noise if w.ndim > 1 else 0.1 * noise + name.endswith("norm.weight")))
    model.update(tree_unflatten(weights))
    return model


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_is_its_pictures_one_by_one(model, beams):
    """Prompts and answers of several lengths: pictures leave the batch at different times."""
    pixels = mx.random.normal((4, 64, 64, 3), key=mx.random.key(0))
    prompts = [[0, 5, 6, 2], [0, 2], [0, 7, 8, 9, 10, 2], [0, 11, 2]]
    tokens = mx.array([prompt + [1] * (6 - len(prompt)) for prompt in prompts])
    mask = mx.array([[i < len(prompt) for i in range(6)] for prompt in prompts])
    params = GenerationParams(beams, max_new_tokens=14)
    whole = generate(model, pixels, tokens, mask, params)
    end = whole[0][6]
    params = replace(params, eos_token_id=end, forced_eos_token_id=end)
    together = generate(model, pixels, tokens, mask, params)
    alone = [
        generate(model, pixels[i : i + 1], mx.array([prompt]), None, params)[0]
        for i, prompt in enumerate(prompts)
    ]
    assert together == alone
    assert len(set(map(tuple, whole))) == 4
    assert len(set(map(len, together))) > 1
    assert all(answer[0] == 0 and answer[-1] == end for answer in together)


def test_no_run_of_three_comes_twice(model):
    pixels = mx.random.normal((3, 32, 32, 3), key=mx.random.key(1))
    params = GenerationParams(1, max_new_tokens=18)
    for answer in generate(model, pixels, mx.array([[0, 2]] * 3), None, params):
        runs = list(zip(answer, answer[1:], answer[2:], strict=False))
        assert len(set(runs)) == len(runs)


def test_what_the_network_cannot_take(model):
    with pytest.raises(FluxError, match="a feature map of 4 x 1; the captioner knows 3 x 3 at most"):
        model.image_features(mx.zeros((1, 32, 128, 3)))
    with pytest.raises(FluxError, match="22 tokens in a sequence; the captioner reads and writes 20 at most"):
        model.encode(mx.zeros((1, 32, 32, 3)), mx.zeros((1, 20), dtype=mx.int32))
    with pytest.raises(FluxError, match="0 beams"):
        GenerationParams(num_beams=0)
    with pytest.raises(FluxError, match="answers of 1 tokens"):
        GenerationParams(max_new_tokens=1)


def test_what_a_task_needs():
    assert find_task("caption").ask() == "What does the image describe?"
    assert TASKS["region_to_ocr"].ask(" <loc_1> ") == "What text is in the region <loc_1>?"
    assert TASKS["prompt"].ask("Is it {red}?") == "Is it {red}?"
    with pytest.raises(FluxError, match="task <OD> takes no text, but got 'dog'"):
        TASKS["od"].ask("dog")
    with pytest.raises(FluxError, match="task <CAPTION_TO_PHRASE_GROUNDING> needs a text"):
        TASKS["phrase_grounding"].ask(" ")
    with pytest.raises(FluxError, match="unknown task 'captions'; known: caption, detailed, more_detailed"):
        find_task("captions")


def test_answers_by_example():
    size = (1000, 500)
    boxes = "</s><s>dog<loc_0><loc_0><loc_499><loc_999>it<loc_1><loc_2><loc_3><loc_4></s>"
    assert TASKS["od"].answer(boxes, size) == {
        "bboxes": [[0, 0, 499, 499], [1, 1, 3, 2]],
        "labels": ["dog", "it"],
    }
    assert TASKS["phrase_grounding"].answer(boxes, size)["labels"] == ["dog"]
    assert TASKS["caption"].answer("</s><s> a dog</s>", size) == "a dog"
    quad = "STOP" + "".join(f"<loc_{place}>" for place in (0, 0, 10, 0, 10, 20, 0, 20))
    assert TASKS["ocr_with_region"].answer(quad, size) == {
        "quad_boxes": [[0, 0, 10, 0, 10, 10, 0, 10]],
        "labels": ["STOP"],
    }
    assert region((0, 0, 500, 499), size) == "<loc_0><loc_0><loc_500><loc_998>"


def test_sixteen_bits(model):
    """The weights' type goes through; nothing in between leaves its range."""
    pixels, tokens = mx.random.normal((1, 64, 64, 3), key=mx.random.key(0)), mx.array([[0, 5, 2]])
    exact = model(pixels, tokens, tokens)
    half = Florence2(PARAMS)
    half.update(tree_map(lambda weight: weight.astype(mx.float16), model.parameters()))
    scores = half(pixels, tokens, tokens)
    assert scores.dtype == mx.float16
    assert mx.linalg.norm(scores - exact) <= 0.02 * mx.linalg.norm(exact)
