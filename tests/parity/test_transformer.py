"""The transformer against diffusers' FluxTransformer2DModel: same weights, same inputs, small sizes."""

import math
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from flux.models.layers import embedding_frequencies, sinusoidal_embedding
from flux.models.transformer import Flux, FluxParams
from flux.weights import keymaps

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

TOLERANCE = 5e-5  # relative error of one call in float32, from numerics.md

SMALL = {"out_channels": 16, "vec_in_dim": 24, "context_in_dim": 40}
DEV = FluxParams(
    **SMALL, in_channels=16, hidden_size=96, num_heads=3, depth=2, depth_single_blocks=3, axes_dim=(8, 12, 12)
)
SCHNELL = FluxParams(
    **SMALL,
    in_channels=16,
    hidden_size=128,
    num_heads=2,
    depth=1,
    depth_single_blocks=2,
    axes_dim=(16, 24, 24),
    guidance_embed=False,
)
FILL = FluxParams(
    **SMALL, in_channels=96, hidden_size=64, num_heads=4, depth=3, depth_single_blocks=1, axes_dim=(4, 6, 6)
)
KINDS = {"dev": DEV, "schnell": SCHNELL, "fill": FILL}


@dataclass
class Inputs:
    """One call's inputs as NumPy arrays, in the order and under the names of `Flux.__call__`."""

    img: np.ndarray
    img_ids: np.ndarray
    txt: np.ndarray
    txt_ids: np.ndarray
    timesteps: np.ndarray
    y: np.ndarray
    guidance: np.ndarray | None


def make_inputs(params: FluxParams, batch: int, height: int, width: int, text: int) -> Inputs:
    rng = np.random.default_rng(batch * 1000 + height * 100 + width)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    ids = np.zeros((height, width, 3), np.float32)
    ids[..., 1], ids[..., 2] = np.mgrid[:height, :width]
    return Inputs(
        img=normal(batch, height * width, params.in_channels),
        img_ids=ids.reshape(1, -1, 3),
        txt=normal(batch, text, params.context_in_dim),
        txt_ids=np.zeros((1, text, 3), np.float32),
        timesteps=rng.uniform(0.05, 1, batch).astype(np.float32),
        y=normal(batch, params.vec_in_dim),
        guidance=rng.uniform(1, 5, batch).astype(np.float32) if params.guidance_embed else None,
    )


def make_reference(params: FluxParams, dtype=torch.float32):
    """diffusers' model with random weights: biases far from 0 and norms' weights far from 1."""
    torch.manual_seed(params.hidden_size)
    model = diffusers.FluxTransformer2DModel(
        in_channels=params.in_channels,
        out_channels=params.out_channels,
        num_layers=params.depth,
        num_single_layers=params.depth_single_blocks,
        attention_head_dim=params.hidden_size // params.num_heads,
        num_attention_heads=params.num_heads,
        joint_attention_dim=params.context_in_dim,
        pooled_projection_dim=params.vec_in_dim,
        guidance_embeds=params.guidance_embed,
        axes_dims_rope=params.axes_dim,
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(0, 0.3)
            elif p.ndim == 1:
                p.normal_(1, 0.3)
    return model.to(dtype).eval()


def make_ours(params: FluxParams, reference, dtype: mx.Dtype = mx.float32) -> Flux:
    state = {name: mx.array(p.detach().float().numpy()) for name, p in reference.named_parameters()}
    weights = keymaps.from_diffusers(keymaps.TRANSFORMER, state)
    flow = Flux(params)
    flow.load_weights([(name, w.astype(dtype)) for name, w in weights.items()], strict=True)
    return flow


def run_reference(model, inputs: Inputs) -> np.ndarray:
    dtype = model.x_embedder.weight.dtype
    with torch.no_grad():
        out = model(
            hidden_states=torch.tensor(inputs.img).to(dtype),
            encoder_hidden_states=torch.tensor(inputs.txt).to(dtype),
            pooled_projections=torch.tensor(inputs.y).to(dtype),
            timestep=torch.tensor(inputs.timesteps),
            img_ids=torch.tensor(inputs.img_ids[0]),
            txt_ids=torch.tensor(inputs.txt_ids[0]),
            guidance=None if inputs.guidance is None else torch.tensor(inputs.guidance),
            return_dict=False,
        )[0]
    return out.float().numpy()


def run_ours(flow: Flux, inputs: Inputs) -> np.ndarray:
    arrays = {name: None if a is None else mx.array(a) for name, a in vars(inputs).items()}
    return np.array(flow(**arrays).astype(mx.float32))


def relative_error(ours: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


@pytest.mark.parametrize("shape", [(1, 4, 4, 7), (3, 2, 6, 5), (2, 5, 1, 12)])
@pytest.mark.parametrize("kind", KINDS)
def test_float32(kind: str, shape: tuple[int, int, int, int]):
    params = KINDS[kind]
    reference = make_reference(params)
    inputs = make_inputs(params, *shape)
    ours = run_ours(make_ours(params, reference), inputs)
    assert ours.shape == (shape[0], shape[1] * shape[2], params.out_channels)
    assert relative_error(ours, run_reference(reference, inputs)) <= TOLERANCE


def test_norms_of_small_activations():
    """Where the mean square is near 1e-6, the norms' epsilon decides: 1e-5 in place of 1e-6 is far off."""
    reference = make_reference(SCHNELL)
    with torch.no_grad():
        for name, p in reference.named_parameters():
            if (
                any(part in name for part in ("embedder.", "to_q", "to_k", "add_q", "add_k"))
                and "time_" not in name
            ):
                p.mul_(3e-3)
    inputs = make_inputs(SCHNELL, 2, 4, 4, 7)
    ours = run_ours(make_ours(SCHNELL, reference), inputs)
    assert relative_error(ours, run_reference(reference, inputs)) <= TOLERANCE


def test_positions_of_a_large_picture():
    """Positions up to 255 (4096 pixels) and a first axis of 1, as for Kontext's reference pictures."""
    reference = make_reference(DEV)
    inputs = make_inputs(DEV, 2, 4, 4, 6)
    inputs.img_ids = inputs.img_ids * 85 + np.array([1, 0, 0], np.float32)
    ours = run_ours(make_ours(DEV, reference), inputs)
    assert relative_error(ours, run_reference(reference, inputs)) <= TOLERANCE


def rounding_case() -> Inputs:
    """Times and guidance that bfloat16 moves far: 713 -> 712, 3500 -> 3504."""
    inputs = make_inputs(DEV, 2, 4, 4, 7)
    inputs.timesteps = np.array([0.713, 0.289], np.float32)
    inputs.guidance = np.array([3.5, 2.7], np.float32)
    return inputs


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_16_bit_weights_round_time_and_guidance_as_the_reference_in_bfloat16(dtype: mx.Dtype):
    reference = make_reference(DEV, torch.bfloat16)
    inputs = rounding_case()
    expected = run_reference(reference, inputs)
    flow = make_ours(DEV, reference, dtype)
    assert all(p.dtype == dtype for _, p in tree_flatten(flow.parameters()))
    assert relative_error(run_ours(flow, inputs), expected) < 0.01  # two bfloat16 programs differ by 0.005
    flow.round_embeddings = False
    assert relative_error(run_ours(flow, inputs), expected) > 0.03


def test_float16_weights_can_round_as_the_reference_in_float16():
    """By default they keep bfloat16's rounding, which is another function of time and guidance."""
    reference = make_reference(DEV, torch.float16)
    inputs = rounding_case()
    expected = run_reference(reference, inputs)
    flow = make_ours(DEV, reference, mx.float16)
    assert relative_error(run_ours(flow, inputs), expected) > 0.03
    flow.time_dtype = flow.guidance_dtype = mx.float16
    assert relative_error(run_ours(flow, inputs), expected) < 0.002


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.5, 30.0, 60.0])
def test_float32_at_any_guidance(guidance: float):
    """The sines of 1000 times the guidance magnify the last bit of their frequencies: 1e-4 at 30."""
    reference = make_reference(DEV)
    inputs = make_inputs(DEV, 2, 4, 4, 7)
    inputs.guidance[:] = guidance
    ours = run_ours(make_ours(DEV, reference), inputs)
    assert relative_error(ours, run_reference(reference, inputs)) <= 1e-6


def test_frequencies_of_time_and_guidance_are_the_references_to_the_bit():
    expected = diffusers.models.embeddings.get_timestep_embedding(
        torch.ones(1), 256, flip_sin_to_cos=True, downscale_freq_shift=0, max_period=10000
    )
    frequencies = torch.exp(-math.log(10000) * torch.arange(0, 128, dtype=torch.float32) / 128)
    ours = embedding_frequencies(256, 10000.0)
    assert np.array_equal(np.array(ours), frequencies.numpy())
    np.testing.assert_allclose(np.array(sinusoidal_embedding(mx.ones(1))), expected.numpy(), atol=2e-7)


@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.bfloat16, 0.01), (mx.float16, 0.001)])
def test_16_bit_weights_without_rounding_are_near_float32(dtype: mx.Dtype, tolerance: float):
    reference = make_reference(DEV, torch.bfloat16)
    inputs = rounding_case()
    flow = make_ours(DEV, reference, dtype)
    flow.round_embeddings = False
    # The reference keeps the weights' bfloat16 values and computes in float32.
    assert relative_error(run_ours(flow, inputs), run_reference(reference.float(), inputs)) < tolerance
