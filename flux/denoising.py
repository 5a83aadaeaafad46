"""From noise to a finished latent: what is the same in all steps, computed once, and the steps."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import mlx.core as mx

from flux import sampler
from flux.conditioning import ControlNets, PictureConditioning, TextConditioning
from flux.conditioning.controlnets import NO_CONTROLNETS, Control
from flux.conditioning.guides import BoundGuide
from flux.models.layers import Attend
from flux.models.nag import Nag, NagAttention, join_vectors
from flux.models.transformer import Flux, ModulationVectors, Residuals
from flux.solvers import SOLVERS
from flux.step_cache import StepCache


class Conditioning(NamedTuple):
    """The prompt's conditioning, and with true guidance the negative prompt's; each of one text."""

    positive: TextConditioning
    negative: TextConditioning | None


class Branch(NamedTuple):
    """What one text brings to every step and does not depend on the latent; of a batch of 1."""

    text: mx.array  # (1, Lt, hidden)
    positions: mx.array  # rotary tables
    modulation: list[ModulationVectors]  # one a step

    def step(self, i: int) -> "Told":
        """What the transformer is told in step i."""
        return Told(self.text, self.positions, self.modulation[i])


class Told(NamedTuple):
    """What the transformer is told in one step besides the latent; of a batch of 1."""

    text: mx.array
    positions: mx.array
    vectors: ModulationVectors
    attend: Attend | None = None  # in the place of the blocks' attention


class Plan(NamedTuple):
    """All that `denoise` needs; `mx.eval` takes it.

    cfg_end: the share of the steps, from the first, that have true guidance. nag: how attention is led away
    from the negative prompt. guide: leads by a loss. cache: skips blocks; of one picture.
    """

    x: mx.array | None  # (B, L, channels), the noise
    times: list[float]
    positive: Branch
    negative: Branch | None
    cfg_scale: float
    pictures: PictureConditioning
    solver: str  # of SOLVERS
    controls: tuple[Control, ...] = ()  # of each ControlNet
    cfg_end: float = 1.0
    nag: Nag | None = None
    guide: BoundGuide | None = None
    cache: StepCache | None = None


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


def denoise(flow: Flux, plan: Plan, controlnets: ControlNets = NO_CONTROLNETS) -> Iterator[mx.array]:
    """Yield the packed latent (B, L, channels), float32, after each step.

    With true guidance a step is two passes rather than one batch of two: this takes half the memory, and the
    prompts may differ in length. ControlNets are told the prompt alone, and what they add serves both passes,
    as in diffusers.
    """
    noise, pictures = plan.x, plan.pictures
    if noise is None:
        raise ValueError("the plan was prepared without noise: plan._replace(x=noise)")

    def pass_through(
        x: mx.array, told: Told, added: Residuals | None, step: int, branch: str = "positive"
    ) -> mx.array:
        text = mx.broadcast_to(told.text, (len(x), *told.text.shape[1:]))
        run = flow.denoise if plan.cache is None else cached(flow, plan.cache, plan, step, branch, x.shape[1])
        v = run(with_pictures(x, pictures), text, told.positions, told.vectors, added, told.attend)
        return v[:, : x.shape[1]].astype(mx.float32)

    def of_prompts(x: mx.array, step: int) -> mx.array:
        added = controlnets.residuals(plan.controls, flow.params, x, step)
        v = pass_through(x, prompts(flow, plan, step), added, step)
        if plan.negative is None or not has_true_guidance(plan, step):
            return v
        negative = pass_through(x, plan.negative.step(step), added, step, "negative")
        return sampler.guide(v, negative, plan.cfg_scale)

    def velocity(x: mx.array, step: int) -> mx.array:
        v = of_prompts(x, step)
        if plan.guide is None:
            return v
        return plan.guide.velocity(v, x, plan.times[step], step, len(plan.times) - 1)

    def project(x: mx.array, step: int) -> mx.array:
        return pictures.put_back(x, noise, plan.times, step)

    return SOLVERS[plan.solver](velocity, pictures.start(noise, plan.times[0]), plan.times, project)


def cached(
    flow: Flux, cache: StepCache, plan: Plan, step: int, branch: str, tokens: int
) -> Callable[..., mx.array]:
    """`Flux.denoise` by a cache, in a step and for the latent's first tokens.

    The last step is computed. Steps are compared where the same ControlNets act: the skipped blocks are those
    that they add to.
    """
    acting = tuple(step in control.modulation for control in plan.controls)
    last = step == len(plan.times) - 2
    return partial(cache.denoise, flow, (branch, acting), plan.times[step], tokens, last)


def has_true_guidance(plan: Plan, step: int) -> bool:
    """Whether a step, from 0, is guided by a pass of its own for the negative prompt."""
    return plan.cfg_scale != 1 and step < plan.cfg_end * (len(plan.times) - 1)


def prompts(flow: Flux, plan: Plan, step: int) -> Told:
    """What the transformer is told of the prompt in a step; with NAG, of both prompts.

    Made anew for each step: the vectors of every token take much memory.
    """
    positive, negative = plan.positive.step(step), plan.negative and plan.negative.step(step)
    if plan.nag is None or negative is None:
        return positive
    lengths = (positive.text.shape[1], negative.text.shape[1])
    text = mx.concatenate([positive.text, negative.text], axis=1)
    # Tables of positive text, negative text and picture: the last two stand together in the negative's.
    tables = mx.concatenate([positive.positions[..., : lengths[0], :], negative.positions], axis=-2)
    vectors = join_vectors(positive.vectors, negative.vectors, lengths, tables.shape[-2] - sum(lengths))
    return Told(text, tables, vectors, NagAttention(plan.nag, lengths, flow.over_heads))


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
