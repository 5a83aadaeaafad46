"""NAG against the paper's formula in diffusers' FluxTransformer2DModel: two lanes, one a text; the picture of
the first is written into both before each attention, and after it what NAG makes of the two."""

import mlx.core as mx
import numpy as np
import pytest

from flux.models.nag import Nag, NagAttention, join_vectors
from flux.models.transformer import Flux, FluxParams
from tests.parity.test_transformer import DEV, SCHNELL, Inputs, make_inputs, make_ours, make_reference
from tests.parity.test_transformer import relative_error as error

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

TOLERANCE = 1e-5


def reference_processor(nag: Nag, text: int):
    """An attention processor for two lanes, positive and negative text; both leave with the same picture."""
    from diffusers.models.embeddings import apply_rotary_emb

    def lanes(attn, x, context):
        """q, k and v (2, L, H, D) with the first lane's picture in both."""
        heads = [(attn.to_q(x), attn.norm_q), (attn.to_k(x), attn.norm_k), (attn.to_v(x), lambda y: y)]
        found = [norm(y.unflatten(-1, (-1, attn.head_dim))) for y, norm in heads]
        if context is not None:
            added = (
                (attn.add_q_proj, attn.norm_added_q),
                (attn.add_k_proj, attn.norm_added_k),
                (attn.add_v_proj, lambda y: y),
            )
            of_text = [norm(layer(context).unflatten(-1, (-1, attn.head_dim))) for layer, norm in added]
            found = [torch.cat([t, y], dim=1) for t, y in zip(of_text, found, strict=True)]
        return [torch.cat([y[:, :text], y[:1, text:].expand(2, -1, -1, -1)], dim=1) for y in found]

    def guided(z):
        """The paper's equations, as written: phi = scale - 1, the norms' ratio R, min(R, tau) / R, alpha."""
        z_plus, z_minus = z[:1], z[1:]
        z_tilde = z_plus + (nag.scale - 1) * (z_plus - z_minus)
        ratio = z_tilde.norm(p=1, dim=-1, keepdim=True) / z_plus.norm(p=1, dim=-1, keepdim=True)
        z_hat = torch.minimum(ratio, torch.tensor(nag.tau)) / ratio * z_tilde
        return (nag.alpha * z_hat + (1 - nag.alpha) * z_plus).expand(2, -1, -1)

    def process(attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        q, k, v = lanes(attn, hidden_states, encoder_hidden_states)
        q, k = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (q, k))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        z = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        z = torch.cat([z[:, :text], guided(z[:, text:])], dim=1)
        if encoder_hidden_states is None:
            return z
        return attn.to_out[1](attn.to_out[0](z[:, text:])), attn.to_add_out(z[:, :text])

    class Processor:
        __call__ = staticmethod(process)

    return Processor()


def run_reference(model, nag: Nag, inputs: Inputs, negative: Inputs) -> np.ndarray:
    def lanes(a, b):
        return torch.tensor(np.concatenate([a, b]))

    model.set_attn_processor(reference_processor(nag, inputs.txt.shape[1]))
    with torch.no_grad():
        out = model(
            hidden_states=lanes(inputs.img, inputs.img),
            encoder_hidden_states=lanes(inputs.txt, negative.txt),
            pooled_projections=lanes(inputs.y, negative.y),
            timestep=lanes(inputs.timesteps, inputs.timesteps),
            img_ids=torch.tensor(inputs.img_ids[0]),
            txt_ids=torch.tensor(inputs.txt_ids[0]),
            guidance=None if inputs.guidance is None else lanes(inputs.guidance, inputs.guidance),
            return_dict=False,
        )[0]
    return out[:1].numpy()


def run_ours(flow: Flux, nag: Nag, inputs: Inputs, negative: Inputs) -> np.ndarray:
    lengths = (inputs.txt.shape[1], negative.txt.shape[1])
    guidance = None if inputs.guidance is None else mx.array(inputs.guidance)
    positive, other = (
        flow.modulation(mx.array(inputs.timesteps), mx.array(branch.y), guidance)[0]
        for branch in (inputs, negative)
    )
    txt_ids = mx.zeros((1, sum(lengths), 3))
    out = flow.denoise(
        mx.array(inputs.img),
        mx.concatenate([flow.embed_text(mx.array(branch.txt)) for branch in (inputs, negative)], axis=1),
        flow.positions(txt_ids, mx.array(inputs.img_ids)),
        join_vectors(positive, other, lengths, inputs.img.shape[1]),
        attend=NagAttention(nag, lengths, flow.over_heads),
    )
    return np.array(out)


def two_prompts(params: FluxParams, height: int, width: int, text: int) -> tuple[Inputs, Inputs]:
    inputs, negative = (make_inputs(params, 1, height, width, text) for _ in range(2))
    rng = np.random.default_rng(text)
    negative.txt = rng.standard_normal(negative.txt.shape).astype(np.float32)
    negative.y = rng.standard_normal(negative.y.shape).astype(np.float32)
    return inputs, negative


# tau 0.8 bounds nearly every token, 2.5 some, and 50 none.
NAGS = [Nag(5), Nag(3, tau=0.8, alpha=0.6), Nag(9, tau=50, alpha=0.25), Nag(2, alpha=1)]


@pytest.mark.parametrize("shape", [(4, 4, 7), (2, 6, 5), (5, 1, 12)])
@pytest.mark.parametrize("params", [DEV, SCHNELL], ids=["dev", "schnell"])
@pytest.mark.parametrize("nag", NAGS, ids=str)
def test_nag_is_the_papers(nag: Nag, params: FluxParams, shape: tuple[int, int, int]):
    model = make_reference(params)
    flow = make_ours(params, model)
    inputs, negative = two_prompts(params, *shape)
    expected = run_reference(model, nag, inputs, negative)
    assert error(run_ours(flow, nag, inputs, negative), expected) <= TOLERANCE
    plain = np.array(flow(**{name: a if a is None else mx.array(a) for name, a in vars(inputs).items()}))
    assert error(plain, expected) > 0.01
