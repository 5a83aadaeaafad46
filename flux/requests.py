"""What is asked for: pictures of a prompt, with all that is said of them; and that filled in for a model."""

import warnings
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from flux import sampler
from flux.conditioning import ControlInput, Edit, Guide, Picture, variants
from flux.conditioning.guides import Loss, as_guide
from flux.conditioning.redux import check_strength, count_tokens
from flux.errors import FluxError
from flux.jsonfiles import shown
from flux.models.nag import Nag
from flux.solvers import SOLVERS
from flux.step_cache import check_threshold

if TYPE_CHECKING:
    from flux.pipeline import FluxPipeline

# What is encoded of texts: the prompt, the negative prompt if it counts, and a text for CLIP alone.
TextKey = tuple[str, str | None, str | None]


@dataclass(frozen=True)
class Request:
    """One picture for each seed, all of the same prompt and settings; the model's settings where None.

    image_size: (height, width) in pixels. guidance: FLUX's, an input of the network. cfg_scale: true
    classifier-free guidance, away from `negative_prompt` (empty where None); 1 has no effect. schedule: how
    times are laid, see `sampler.timesteps`. clip_prompt: what CLIP reads, where it is not the prompt.
    cfg_end: the share of the steps, from the first, that have true guidance; the others take half the time.
    nag: leads attention away from `negative_prompt`, besides or in place of true guidance.
    guide: a loss that leads the pictures; a function alone is one on latents.
    solver: of `flux.solvers.SOLVERS`. edit: a picture that is changed; `image_size` is then what it is
    fitted to, see `Edit.canvas`.
    references: pictures that Kontext changes; the first one has the size that is made where there is none.
    control: what Canny and Depth follow, a picture of edges or of depth; it is cut to the size that is made.
    control_edges: it is a photo, whose edges are meant.
    controlnets: one for each of the pipeline's, in their order.
    redux: pictures that FLUX.1 Redux reads beside the prompt, each with its strength, above 0 to 1; they do
    not count for the negative prompt. redux_blend: they are mixed into one, instead of one after the other.
    cache: the threshold of a `flux.step_cache.StepCache`; None: nothing is skipped.
    """

    prompt: str
    seeds: tuple[int, ...] = (0,)
    negative_prompt: str | None = None
    image_size: tuple[int, int] | None = None
    steps: int | None = None
    guidance: float | None = None
    cfg_scale: float | None = None
    schedule: str = "model"
    clip_prompt: str | None = None
    edit: Edit | None = None
    cfg_end: float = 1.0
    nag: Nag | None = None
    guide: Guide | Loss | None = None
    references: tuple[Picture, ...] = ()
    control: Picture | None = None
    control_edges: bool = False
    controlnets: tuple[ControlInput, ...] = ()
    solver: str = "euler"
    redux: tuple[tuple[Picture, float], ...] = ()
    redux_blend: bool = False
    cache: float | None = None

    def resolved(self, pipeline: "FluxPipeline") -> "ResolvedRequest":
        """The request with every setting filled in, of a size that the model can make.

        Warns of a size that is rounded, and of guidance that has no effect. FluxError, naming the value, for
        settings that make no picture.
        """
        spec = pipeline.spec
        variants.check(spec, self.edit, self.references, self.control, self.control_edges)
        image_size, size = self._sizes(pipeline)
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        filled = {
            "image_size": image_size,
            "latent_size": size,
            "steps": spec.steps if self.steps is None else self.steps,
            "guidance": spec.guidance if self.guidance is None else self.guidance,
            "cfg_scale": spec.cfg_scale if self.cfg_scale is None else self.cfg_scale,
            "guide": as_guide(self.guide),
        }
        request = ResolvedRequest(**given | filled)
        request.check()
        if self.edit is not None and request.has_no_effect:
            warnings.warn(request.has_no_effect, stacklevel=1)
        pipeline.controlnets.check(request.controlnets)
        tokens = variants.count_tokens(request.references, pipeline.downscale)
        tokens += count_tokens(pipeline.redux, self.redux, self.redux_blend)
        pipeline.check_memory(size, request.steps, tokens)
        networks = (pipeline.flow, *pipeline.controlnets.networks)
        if request.guidance != spec.guidance and not any(n.params.guidance_embed for n in networks):
            text = f"{spec.name} takes no guidance; {request.guidance} has no effect"
            warnings.warn(text, stacklevel=1)  # of this line, so that it is shown once
        return request

    def _sizes(self, pipeline: "FluxPipeline") -> tuple[tuple[int, int], tuple[int, int]]:
        """`image_size`, as it can be made, and the latent's; each (height, width)."""
        best = pipeline.spec.image_size
        if self.edit is None:
            controls = (self.control, *(given.picture for given in self.controlnets))
            best = variants.default_size(self.references, next(filter(None, controls), None), best)
            h, w = pipeline.latent_size(self.image_size or best)
            return (pipeline.downscale * h, pipeline.downscale * w), (h, w)
        height, width = self.image_size or self.edit.default_size(best)
        image_size = (height, width)  # also where a list was given
        return image_size, pipeline.latent_size(pipeline.canvas(self.edit, image_size).picture.shape[:2])


@dataclass(frozen=True, kw_only=True)
class ResolvedRequest(Request):
    """A request with every setting filled in for a model; made by `Request.resolved`."""

    image_size: tuple[int, int]
    steps: int
    guidance: float
    cfg_scale: float
    latent_size: tuple[int, int]
    guide: Guide | None

    @property
    def made_steps(self) -> int:
        """The steps that are made of `steps`: fewer where a picture is the start."""
        return len(sampler.from_strength([0.0] * (self.steps + 1), self.strength)) - 1

    def made_size(self, pipeline: "FluxPipeline") -> tuple[int, int]:
        """(height, width) of the pictures, in pixels: `image_size`, unless another picture is changed."""
        if self.edit is None:
            return self.image_size
        height, width, _ = pipeline.canvas(self.edit, self.image_size).whole.shape
        return height, width

    @property
    def strength(self) -> float:
        """The share of the steps that are made."""
        return 1.0 if self.edit is None else self.edit.share

    @property
    def has_no_effect(self) -> str | None:
        """What has no effect at such a strength, if anything: the prompt, or the picture that is changed."""
        if self.made_steps == 0:
            return f"strength {self.strength:g} makes none of {self.steps} steps: the prompt has no effect"
        whole = self.edit is not None and self.edit.mask is None and self.edit.expand is None
        if whole and self.made_steps == self.steps and self.control is None and not self.references:
            return f"strength {self.strength:g} makes all of {self.steps} steps: the picture has no effect"
        return None

    @property
    def has_pictures(self) -> bool:
        """Whether a picture says something to the transformer or the sampler."""
        return any((self.edit, self.references, self.control, self.controlnets))

    @property
    def pictures(self) -> "ResolvedRequest":
        """What the pictures that are encoded depend on: the request without its prompts and seeds."""
        return replace(self, prompt="", negative_prompt=None, clip_prompt=None, seeds=(), redux=())

    @property
    def texts(self) -> TextKey:
        """What is encoded: the prompt, with guidance the negative prompt, and a text for CLIP alone."""
        guided = self.cfg_scale != 1 or self.nag is not None
        return self.prompt, self.negative_prompt or "" if guided else None, self.clip_prompt

    def resolved(self, pipeline: "FluxPipeline") -> "ResolvedRequest":
        """The request itself."""
        return self

    def check(self) -> None:
        """FluxError, naming the value, where no picture can be made."""
        if self.steps < 1:
            raise FluxError(f"steps must be at least 1, not {self.steps}")
        if not self.seeds:
            raise FluxError("the number of pictures must be at least 1, not 0")
        if self.cfg_scale < 1:
            raise FluxError(f"the cfg scale must be at least 1 (no effect), not {self.cfg_scale}")
        if self.negative_prompt and self.cfg_scale == 1 and self.nag is None:
            text = shown(self.negative_prompt)
            raise FluxError(f"the negative prompt {text} needs a cfg scale above 1 or NAG to have an effect")
        if self.nag is not None and self.negative_prompt is None:
            raise FluxError("NAG needs a negative prompt: say what to lead away from")
        if not 0 < self.cfg_end <= 1:
            raise FluxError(f"the cfg end must be above 0 and at most 1, not {self.cfg_end}")
        if self.cfg_end < 1 and self.cfg_scale == 1:
            raise FluxError(f"the cfg end {self.cfg_end} needs a cfg scale above 1 to have an effect")
        if self.solver not in SOLVERS:
            raise FluxError(f"the solver must be one of {', '.join(SOLVERS)}, not {self.solver!r}")
        if self.cache is not None:
            check_threshold(self.cache)
        sampler.check_seeds(self.seeds)
        for picture, strength in self.redux:
            check_strength(picture.name, strength)
