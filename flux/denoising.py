"""From noise to a finished latent: what is the same in all steps, computed once, and the steps."""

from collections.abc import Iterator
from typing import NamedTuple

import mlx.core as mx

from flux import sampler
from flux.conditioning import PictureConditioning, TextConditioning
from flux.models.transformer import Flux, ModulationVectors
from flux.solvers import SOLVERS


class Conditioning(NamedTuple):
    """The prompt's conditioning, and with true guidance the negative prompt's; each of one text."""

    positive: TextConditioning
    negative: TextConditioning | None


class Branch(NamedTuple):
    """What one text brings to every step and does not depend on the latent; of a batch of 1."""

    text: mx.array  # (1, Lt, hidden)
    positions: mx.array  # rotary tables
    modulation: list[ModulationVectors]  # one a step


class Plan(NamedTuple):
    """All that `denoise` needs; `mx.eval` takes it."""

    x: mx.array | None  # (B, L, channels), the noise
    times: list[float]
    positive: Branch
    negative: Branch | None
    cfg_scale: float
    pictures: PictureConditioning
    solver: str  # of SOLVERS


def prepare_branch(
    flow: Flux,
    text: TextConditioning,
    pictures: PictureConditioning,
    latent_size: tuple[int, int],
    times: mx.array,
    guidance: float,
) -> Branch:
    """What a text brings to steps at these times, (T,), as the transformer is told them; lazily."""
    image_positions = sampler.image_positions(latent_size)
    if pictures.positions is not None:
        image_positions = mx.concatenate([image_positions, pictures.positions], axis=1)
    return Branch(
        flow.embed_text(text.t5),
        flow.positions(sampler.text_positions(text.t5.shape[1]), image_positions),
        flow.modulation(times, text.clip, mx.array([guidance])),
    )


def denoise(flow: Flux, plan: Plan) -> Iterator[mx.array]:
    """Yield the packed latent (B, L, channels), float32, after each step.

    With a negative prompt every step is two passes rather than one batch of two: this takes half the
    memory, and the prompts may differ in length.
    """
    noise, pictures = plan.x, plan.pictures
    if noise is None:
        raise ValueError("the plan was prepared without noise: plan._replace(x=noise)")

    def branch_velocity(branch: Branch, x: mx.array, step: int) -> mx.array:
        text = mx.broadcast_to(branch.text, (len(x), *branch.text.shape[1:]))
        v = flow.denoise(with_pictures(x, pictures), text, branch.positions, branch.modulation[step])
        return v[:, : x.shape[1]].astype(mx.float32)

    def velocity(x: mx.array, step: int) -> mx.array:
        v = branch_velocity(plan.positive, x, step)
        if plan.negative is None:
            return v
        return sampler.guide(v, branch_velocity(plan.negative, x, step), plan.cfg_scale)

    def project(x: mx.array, step: int) -> mx.array:
        return pictures.put_back(x, noise, plan.times, step)

    return SOLVERS[plan.solver](velocity, pictures.start(noise, plan.times[0]), plan.times, project)


def with_pictures(x: mx.array, pictures: PictureConditioning) -> mx.array:
    """The noisy latent (B, L, C) with what pictures put beside its channels and after its tokens."""
    if pictures.channels is not None:
        x = mx.concatenate([x, alike(pictures.channels, x)], axis=2)  # (B, L, C + C')
    if pictures.tokens is not None:
        x = mx.concatenate([x, alike(pictures.tokens, x)], axis=1)  # (B, L + Lr, C)
    return x


def alike(array: mx.array, x: mx.array) -> mx.array:
    """An array of a batch of 1 for the batch of x, in its type."""
    return mx.broadcast_to(array, (len(x), *array.shape[1:])).astype(x.dtype)
