"""The T5 encoder against transformers' T5EncoderModel: same random weights, same tokens."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from flux.models.t5 import T5Encoder, T5Params, relative_position_bucket
from flux.weights import prefixes

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.models.t5.modeling_t5 import T5Attention  # noqa: E402  (after importorskip)

TOLERANCE = 1e-5  # relative error in float32, from numerics.md

SMALL = T5Params(vocab_size=99, d_model=40, d_kv=12, d_ff=56, num_layers=3, num_heads=4)
ODD = T5Params(
    vocab_size=50, d_model=24, d_kv=8, d_ff=40, num_layers=1, num_heads=6,
    relative_attention_num_buckets=12, relative_attention_max_distance=20, layer_norm_epsilon=1e-2,
)  # fmt: skip


def make_pair(params: T5Params):
    """transformers' model with random weights, norms too, and ours with the same."""
    torch.manual_seed(params.d_model)
    config = transformers.T5Config(
        **vars(params), feed_forward_proj="gated-gelu", tie_word_embeddings=False, is_encoder_decoder=False
    )
    reference = transformers.T5EncoderModel(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(0, 0.3)
    ours = T5Encoder(params)
    weights = {name: mx.array(w.numpy()) for name, w in reference.state_dict().items()}
    del weights["encoder.embed_tokens.weight"]
    ours.load_weights(list(weights.items()))
    return ours, reference


def make_tokens(params: T5Params, batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(batch * 1000 + length).integers(0, params.vocab_size, (batch, length))


def run_reference(reference, tokens):
    with torch.no_grad():
        return reference(torch.tensor(tokens)).last_hidden_state


def error(a: mx.array, b) -> float:
    a, b = np.array(a.astype(mx.float32)), b.float().numpy()
    assert a.shape == b.shape
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 17), (2, 300)])
@pytest.mark.parametrize("params", [SMALL, ODD], ids=["small", "odd"])
def test_same_as_transformers(params, batch, length):
    ours, reference = make_pair(params)
    tokens = make_tokens(params, batch, length)
    assert error(ours(mx.array(tokens)), run_reference(reference, tokens)) <= TOLERANCE


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (12, 20), (8, 64), (64, 1000)])
def test_relative_position_buckets(buckets, distance):
    distances = range(-1500, 1501)
    expected = T5Attention._relative_position_bucket(
        torch.tensor(distances), bidirectional=True, num_buckets=buckets, max_distance=distance
    )
    assert [relative_position_bucket(d, buckets, distance) for d in distances] == expected.tolist()


@pytest.mark.parametrize(("ours_type", "theirs_type"), [(mx.bfloat16, "bfloat16"), (mx.float16, "float16")])
def test_16_bit_types_round_no_worse_than_transformers(ours_type, theirs_type):
    ours, reference = make_pair(SMALL)
    tokens = make_tokens(SMALL, 3, 60)
    exact = run_reference(reference, tokens)
    theirs = run_reference(reference.to(getattr(torch, theirs_type)), tokens)
    ours.set_dtype(ours_type)
    got = ours(mx.array(tokens))
    assert got.dtype == ours_type
    rounding = float((theirs.float() - exact).norm() / exact.norm())
    assert error(got, exact) <= 1.5 * rounding
    assert error(got, theirs) <= 2 * rounding


@pytest.mark.parametrize(
    "grown", ["SelfAttention.o", "DenseReluDense.wi_0", "DenseReluDense.wi_1", "DenseReluDense.wo"]
)
def test_float16_does_not_overflow(grown):
    """Activations beyond 65504, in the residual stream or within the gated layer, stay finite."""
    ours, _ = make_pair(SMALL)
    weights = dict(tree_flatten(ours.parameters()))
    large = {name: w * (60000 / mx.abs(w).max()) for name, w in weights.items() if grown in name}
    norms = {name: w * 30 for name, w in weights.items() if "layer_norm" in name}
    assert large
    ours.load_weights(list((weights | norms | large).items()))
    ours.encoder.final_layer_norm.weight = mx.ones(SMALL.d_model)
    ours.set_dtype(mx.float16)
    assert mx.isfinite(ours(mx.array(make_tokens(SMALL, 2, 30)))).all()


def test_names_and_shapes_of_t5_xxl():
    """All tensors of the real checkpoint, which holds the table of tokens twice; nothing is allocated."""
    expected = json.loads((Path(__file__).parents[1] / "reference" / "t5xxl.transformers.json").read_text())
    assert expected.pop("encoder.embed_tokens.weight") == expected["shared.weight"]
    before = mx.get_active_memory()
    parameters = dict(tree_flatten(T5Encoder(T5Params()).parameters()))
    assert {name: list(w.shape) for name, w in parameters.items()} == expected
    assert mx.get_active_memory() - before < 1_000_000


def test_files_that_transformers_saves(tmp_path):
    ours, reference = make_pair(SMALL)
    reference.save_pretrained(tmp_path)
    saved = prefixes.bare_names_of("t5", mx.load(str(tmp_path / "model.safetensors")))
    assert sorted(saved.values()) == sorted(name for name, _ in tree_flatten(ours.parameters()))
