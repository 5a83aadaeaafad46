"""The CLIP text encoder against transformers' CLIPTextModel: same random weights, same tokens."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from flux.errors import FluxError
from flux.models.clip import CLIPTextModel, CLIPTextParams
from flux.weights import prefixes

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5  # relative error in float32, from numerics.md
EOS = 95  # not the highest id, so that "the highest id" and "the end token" are different places


def make_pair(hidden=48, heads=4, layers=3, intermediate=72, act="quick_gelu", eos=EOS):
    """transformers' model with random weights, biases and norms too, and ours with the same."""
    torch.manual_seed(hidden + layers)
    config = transformers.CLIPTextConfig(
        vocab_size=99, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=77, hidden_act=act,
        bos_token_id=94, eos_token_id=eos, pad_token_id=EOS,
    )  # fmt: skip
    reference = transformers.CLIPTextModel(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(0, 0.3)
    ours = CLIPTextModel(
        CLIPTextParams(
            hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=heads, vocab_size=99, hidden_act=act,
        )
    )  # fmt: skip
    weights = {f"text_model.{name}": mx.array(w.numpy()) for name, w in reference.state_dict().items()}
    ours.load_weights(list(weights.items()))
    return ours, reference


def make_tokens(batch: int, length: int) -> np.ndarray:
    """Random tokens without EOS, but for one row end and, where there is room, an earlier one."""
    rng = np.random.default_rng(batch * 100 + length)
    tokens = rng.integers(0, 99, (batch, length))
    tokens[tokens == EOS] = 98
    for row in tokens:
        row[rng.integers(length // 2, length) :] = EOS
    return tokens


def run_both(ours, reference, tokens):
    with torch.no_grad():
        expected = reference(torch.tensor(tokens), output_hidden_states=True)
    return ours(mx.array(tokens), reference.config.eos_token_id), expected


def error(a: mx.array, b) -> float:
    a, b = np.array(a.astype(mx.float32)), b.float().numpy()
    assert a.shape == b.shape
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize(("batch", "length"), [(1, 77), (3, 20), (4, 1)])
@pytest.mark.parametrize("shape", [(48, 4, 3, 72), (64, 1, 1, 40)])
def test_same_as_transformers(shape, batch, length, act):
    ours, reference = make_pair(*shape, act=act)
    got, expected = run_both(ours, reference, make_tokens(batch, length))
    assert error(got.last_hidden_state, expected.last_hidden_state) <= TOLERANCE
    assert error(got.pooled_output, expected.pooler_output) <= TOLERANCE
    assert len(got.hidden_states) == len(expected.hidden_states) == shape[2] + 1
    for mine, theirs in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert error(mine, theirs) <= TOLERANCE


def test_pooled_at_the_first_end_token():
    ours, reference = make_pair()
    tokens = make_tokens(3, 12)
    tokens[0, 2] = tokens[1, 5] = tokens[1, 7] = EOS
    tokens[2][tokens[2] == EOS] = 1  # a text without any: transformers takes its first token
    got, expected = run_both(ours, reference, tokens)
    assert error(got.pooled_output, expected.pooler_output) <= TOLERANCE
    for row, end in enumerate([2, 5, 0]):
        assert mx.array_equal(got.pooled_output[row], got.last_hidden_state[row, end])


def test_old_configs_say_end_token_2():
    ours, reference = make_pair(eos=2)
    tokens = make_tokens(3, 12)
    tokens[:, 1] = 2
    tokens[0, 4] = tokens[0, 6] = 98
    got, expected = run_both(ours, reference, tokens)
    assert error(got.pooled_output, expected.pooler_output) <= TOLERANCE
    assert mx.array_equal(got.pooled_output[0], got.last_hidden_state[0, int(tokens[0].argmax())])


@pytest.mark.parametrize(("ours_type", "theirs_type"), [(mx.bfloat16, "bfloat16"), (mx.float16, "float16")])
def test_16_bit_types_round_no_worse_than_transformers(ours_type, theirs_type):
    ours, reference = make_pair()
    tokens = make_tokens(3, 40)
    with torch.no_grad():
        exact = reference(torch.tensor(tokens)).last_hidden_state
        theirs = reference.to(getattr(torch, theirs_type))(torch.tensor(tokens)).last_hidden_state
    ours.set_dtype(ours_type)
    got = ours(mx.array(tokens), EOS).last_hidden_state
    assert got.dtype == ours_type
    rounding = float((theirs.float() - exact).norm() / exact.norm())
    assert error(got, exact) <= 1.5 * rounding
    assert error(got, theirs) <= 2 * rounding


def test_names_and_shapes_of_clip_l():
    """All tensors of the real checkpoint; nothing is allocated."""
    expected = json.loads((Path(__file__).parents[1] / "reference" / "clip_l.transformers.json").read_text())
    before = mx.get_active_memory()
    parameters = dict(tree_flatten(CLIPTextModel(CLIPTextParams()).parameters()))
    assert {name: list(w.shape) for name, w in parameters.items()} == expected
    assert mx.get_active_memory() - before < 1_000_000


def test_files_that_transformers_saves(tmp_path):
    """transformers 5 writes the names without `text_model.`, unlike the real checkpoint."""
    ours, reference = make_pair()
    reference.save_pretrained(tmp_path)
    saved = prefixes.bare_names_of("clip", mx.load(str(tmp_path / "model.safetensors")))
    assert sorted(saved.values()) == sorted(name for name, _ in tree_flatten(ours.parameters()))


def test_unknown_activation():
    with pytest.raises(FluxError, match="'relu'"):
        CLIPTextModel(CLIPTextParams(hidden_act="relu"))
