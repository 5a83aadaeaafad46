"""FluxPipeline: load -> encode -> denoise -> decode.

Everything is lazy, weights too: a part takes memory when its result is evaluated and gives it back when the
part is deleted. With `del flux.t5, flux.clip` after the conditioning and `del flux.flow` after the latents,
only one stage is in memory at a time.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from flux import denoising, generation, images, known_words, machine, sampler
from flux.adapters import evaluate, read_weighted
from flux.adapters.attach import fingerprint
from flux.conditioning import (
    ControlInput,
    ControlNets,
    Edit,
    PictureConditioning,
    TextConditioning,
    encode_texts,
)
from flux.conditioning.canvas import Canvas
from flux.conditioning.encoded import NO_PICTURES
from flux.conditioning.redux import Redux
from flux.conditioning.texts import warn_of_cuts
from flux.denoising import Branch, Conditioning, Plan, prepare_branch
from flux.distributed.ranks import Ranks
from flux.errors import FluxError
from flux.generation import OnStep
from flux.known_words import KnownWords
from flux.loading import Parts, load
from flux.models.nag import Nag
from flux.models.transformer import ROUNDINGS
from flux.requests import Request
from flux.step_cache import BlockCount
from flux.text_cache import TextCache, identity
from flux.weights import checkpoints
from flux.weights.quantize import read_kind
from flux.weights.registry import ModelSpec


class FluxPipeline:
    """Text to pictures with a FLUX model.

    The parts are the attributes `flow`, `ae`, `clip`, `t5`, `clip_tokenizer` and `t5_tokenizer`; any of them
    may be deleted once it has done its work. `spec` holds the model's defaults, `known_words` what a small
    model was trained on, if its folder says so.
    """

    known_words: KnownWords | None = None

    def __init__(
        self,
        name: str,
        t5_padding: bool | int = True,
        dtype: mx.Dtype | None = None,
        bits: int | str | None = None,
        adapters: Sequence[tuple[str | Path, float]] = (),
        fuse_adapters: bool = False,
        ranks: Ranks | None = None,
        shift: str | float | None = None,
        noise: str = "mlx",
        rounding: str = "bfloat16",
        controlnets: Sequence[str] = (),
        redux: str | None = None,
        siglip: str | None = None,
        text_cache: str | Path | None = None,
        **files: str | None,
    ):
        """Find a model and load it lazily.

        name: a model of the registry ("schnell", "flux-dev", ...), a folder, a file, or a repository of the
        Hub; see `flux.weights.checkpoints.find`.
        t5_padding: pad every prompt to the model's length, as FLUX was trained; False does not, which is
        faster, and a number pads to so many tokens (ComfyUI: 256).
        dtype: the weights' type; by default bfloat16 on a GPU and float32 on a CPU.
        bits: to quantize the transformer and T5 to so many a weight, of `flux.weights.quantize.KINDS`: 4, 8,
        "mxfp4", ...; None not to.
        adapters: files of LoRAs and their like, each with its strength (1: as trained); their changes add up.
        fuse_adapters: work them into the weights, before these are quantized, rather than keep them beside:
        steps are faster, and the networks that they change are in memory from the start.
        ranks: to split the transformer and T5 over; all of them must then call `encode`, `prepare` and
        `denoise` together, with the same arguments, and have the same results.
        shift: of the sampling's times: "dev", "none" or a factor; None as the model's config says.
        noise: whose random numbers a seed stands for: "mlx", "torch" (ComfyUI's and diffusers' in float32) or
        "diffusers" (PyTorch's, rounded to `dtype`), made as by PyTorch's CPU generator.
        rounding: of time and guidance in 16-bit types, one of `ROUNDINGS`.
        controlnets: files, folders or repositories of ControlNets, of which each takes a `ControlInput` of
        every request; quantized as the transformer is, and whole on each of `ranks`.
        redux, siglip: FLUX.1 Redux's file, folder or repository, for requests with pictures of it, and its
        encoder's where that is elsewhere; see `Redux.load`. None: no such requests.
        text_cache: a folder in which the features of prompts are kept, so that the text encoders are read
        for new prompts alone; not with `ranks`.
        files: `transformer`, `ae`, `clip` or `t5` = a file to take that part from.
        Raises FluxError for a model that cannot be found or loaded, and for an adapter that cannot or does
        not fit it; warns of what else of an adapter is left out.
        """
        sampler.check_noise(noise)
        if rounding not in ROUNDINGS:
            raise FluxError(f"the rounding must be one of {', '.join(ROUNDINGS)}, not {rounding!r}")
        if text_cache is not None and ranks is not None:
            raise FluxError("a text cache does not go with a model that is split over several ranks")
        weighted = read_weighted(adapters)  # before a model is fetched
        self.checkpoint = checkpoints.find(name, **files)
        count, mode = (None, "affine") if bits is None else read_kind(bits)
        parts = load(self.checkpoint, dtype, count, weighted, fuse_adapters, mode, ranks)
        self._set(parts, t5_padding, noise)
        self.controlnets = ControlNets.load(controlnets, dtype, count, mode)
        self.controlnets.check_fit(self.flow, self.ae)
        self.rounding = rounding
        types = [self.flow.dtype if dtype is None else dtype for dtype in ROUNDINGS[rounding]]
        for network in (self.flow, *self.controlnets.networks):
            network.time_dtype, network.guidance_dtype = types
        self._split = ranks is not None
        if shift is not None:
            self.spec: ModelSpec = replace(self.spec, shift=sampler.read_shift(shift))
        self._adapters = [file for file, _ in adapters]
        if text_cache is not None:
            settings = (dtype, bits, weighted, fuse_adapters, self.t5_tokenizer, self.t5_padding)
            self.text_cache: TextCache | None = TextCache(text_cache, identity(self.checkpoint, *settings))
        if not adapters and not any(files.values()):  # these may know others
            self.known_words = known_words.read(self.checkpoint.t5_tokenizer.parent)
        if redux is not None:
            self.redux: Redux | None = Redux.load(redux, siglip, dtype)
            self.redux.check_fit(self.flow.params.context_in_dim, self.checkpoint.parts["transformer"].label)

    @classmethod
    def from_parts(cls, parts: Parts, t5_padding: bool | int = True, noise: str = "mlx") -> "FluxPipeline":
        """A pipeline of modules that are already there."""
        flux = cls.__new__(cls)
        flux._set(parts, t5_padding, noise)
        return flux

    def _set(self, parts: Parts, t5_padding: bool | int, noise: str) -> None:
        self.spec, self.flow, self.ae, self.clip, self.t5, self.clip_tokenizer, self.t5_tokenizer = parts
        self.t5_padding = bool(t5_padding)
        if not isinstance(t5_padding, bool):
            self.t5_tokenizer.padded_length = t5_padding
        self.noise_kind = noise
        self.rounding = "bfloat16"
        self._split = False
        self.controlnets = ControlNets()
        self.redux = None
        self.block_count = BlockCount()  # of all pictures with a step cache
        self.text_cache = None
        # Pixels of a picture to one of its latent, along each side: 8 for FLUX.1.
        self.downscale = 2 ** (len(self.ae.params.ch_mult) - 1)

    def latent_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """The latent's (height, width) of a picture's in pixels, rounded with a warning where it must be."""
        height, width = image_size
        if height < 1 or width < 1:
            raise FluxError(f"a picture's height and width must be positive, not {height}x{width}")
        step = 2 * self.downscale  # a token is a patch of 2x2
        h, w = (2 * max(1, (side + step // 2) // step) for side in image_size)
        rounded = (h * self.downscale, w * self.downscale)
        if rounded != tuple(image_size):
            text = f"the size {height}x{width} is not a multiple of {step}; made {rounded[0]}x{rounded[1]}"
            warnings.warn(text, stacklevel=2)
        return h, w

    def check_memory(self, latent_size: tuple[int, int], steps: int = 1, more_tokens: int = 0) -> None:
        """FluxError where the largest arrays of a step, a picture or all steps exceed the memory.

        more_tokens: beside the picture's and the text's.
        """
        (h, w), params = latent_size, self.flow.params
        tokens = h // 2 * (w // 2) + self.spec.t5_length + more_tokens
        hidden = tokens * params.hidden_size * int(4 + params.mlp_ratio) * self.flow.dtype.size
        on_cpu = mx.default_device().type == mx.DeviceType.cpu  # where attention writes its scores down
        scores = 4 * params.num_heads * tokens**2 if on_cpu else 0
        picture = 2 * 4 * 3 * h * w * self.downscale**2  # float32, before and after it is clipped
        size = f"{h * self.downscale}x{w * self.downscale}"
        machine.require(max(hidden + scores, picture), f"a picture of {size}")
        modulation = params.hidden_size * (12 * params.depth + 3 * params.depth_single_blocks + 2)
        machine.require(steps * modulation * self.flow.dtype.size, f"a picture of {steps} steps")

    def fingerprints(self) -> dict[str, str]:
        """A digest of each file of weights, by what it is: the same on ranks that have the same files."""
        adapters = {f"adapter {file}": fingerprint(file) for file in self._adapters}
        pictures = {} if self.redux is None else self.redux.files.fingerprints()
        others = adapters | self.controlnets.fingerprints() | pictures
        return self.checkpoint.fingerprints() | others

    def ensure_models_are_loaded(self) -> None:
        """Read all weights now rather than when they are first needed."""
        redux = () if self.redux is None else (self.redux.siglip, self.redux.encoder)
        for part in (self.flow, self.ae, self.clip, self.t5, *self.controlnets.networks, *redux):
            self._read(part)
            mx.eval(part.parameters())

    def _read(self, network: nn.Module) -> None:
        """A network that is split is read before it is used, or whole layers would stand in memory."""
        if self._split:
            evaluate(network)

    def generate_images(
        self,
        prompt: str,
        n_images: int = 1,
        seed: int | None = None,
        image_size: tuple[int, int] | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
        negative_prompt: str | None = None,
        cfg_scale: float | None = None,
        on_step: OnStep | None = None,
        keep_models: bool = True,
        schedule: str = "model",
        clip_prompt: str | None = None,
        **others: Any,
    ) -> np.ndarray:
        """Pictures of a prompt, (n_images, H, W, 3), uint8: those of `txt2image.py`, to the bit.

        seed: of the first picture; picture i is made from seed + i. None: a random one.
        image_size: (height, width) in pixels. It, num_steps, guidance, cfg_scale: the model's where None.
        negative_prompt: what to lead away from, with a `cfg_scale` above 1 or `nag`; empty where None.
        on_step: called with the request of one picture, the step and the latent after it.
        keep_models: False takes each network out of memory when its work is done; the pipeline can then make
        no other picture.
        schedule, clip_prompt, others: fields of `Request`, such as edit, references, control, controlnets,
        redux, solver, cfg_end, nag, guide and cache.
        Raises FluxError for values that make no picture.
        """
        seed = sampler.random_seed() if seed is None else seed
        settings: dict[str, Any] = {
            name: tuple(x) if isinstance(x, list) else x for name, x in others.items()
        }
        request = Request(
            prompt=prompt,
            seeds=tuple(range(seed, seed + n_images)),
            negative_prompt=negative_prompt,
            image_size=image_size,
            steps=num_steps,
            guidance=guidance,
            cfg_scale=cfg_scale,
            schedule=schedule,
            clip_prompt=clip_prompt,
            **settings,
        )
        pictures = generation.generate(self, [request], on_step=on_step, keep_models=keep_models)
        return np.stack(list(pictures))

    def generate_latents(
        self,
        text: str,
        n_images: int = 1,
        num_steps: int | None = None,
        guidance: float | None = None,
        latent_size: tuple[int, int] = (64, 64),
        seed: int | None = None,
        negative_prompt: str | None = None,
        cfg_scale: float | None = None,
        keep_modulation: bool = True,
    ) -> Iterator:
        """Yield the conditioning, then the packed latent (n_images, L, channels), float32, after each step.

        The conditioning is the tuple (x_T, x_positions, t5_conditioning, t5_positions, clip_conditioning).
        When it has been evaluated, `t5` and `clip` may be deleted.

        latent_size: (height, width), an eighth of the picture's; both even.
        num_steps, guidance, cfg_scale: the model's where None.
        seed: of the first picture; picture i is made from seed + i, whatever the batch. None: a random one.
        negative_prompt: what to lead away from, with a `cfg_scale` above 1; empty where None.
        keep_modulation: False lets go of a quarter of the transformer's weights before the first step; the
        pipeline can then make no other picture.
        Raises FluxError for values that make no picture.
        """
        seed = sampler.random_seed() if seed is None else seed
        height, width = latent_size
        if height < 2 or width < 2 or height % 2 or width % 2:
            raise FluxError(f"the latent's height and width must be even and positive, not {latent_size}")
        size = (self.downscale * height, self.downscale * width)
        seeds = tuple(range(seed, seed + n_images))
        request = Request(text, seeds, negative_prompt, size, num_steps, guidance, cfg_scale).resolved(self)
        noise = self.noise(seeds, latent_size)

        def generate():
            conditioning = self.encode(text, negative_prompt, request.cfg_scale)
            # The caller cannot evaluate what it does not see, and is about to delete the encoders.
            mx.eval(conditioning.negative or ())
            yield self._shown(conditioning.positive, noise, latent_size)
            sampling = (request.steps, request.guidance, request.cfg_scale)
            plan = self.prepare(conditioning, noise, latent_size, *sampling)
            if not keep_modulation:
                mx.eval(plan)
                self.flow.drop_modulation()
            yield from self.denoise(plan)

        return generate()

    def noise(self, seeds: Sequence[int], latent_size: tuple[int, int]) -> mx.array:
        """The packed noise (B, L, channels), float32, that the pictures of these seeds begin with."""
        channels = self.flow.params.out_channels // 4
        return sampler.pack(sampler.noise(seeds, latent_size, channels, self.noise_kind, self.flow.dtype))

    def encode(
        self,
        text: str,
        negative_prompt: str | None = None,
        cfg_scale: float = 1.0,
        clip_text: str | None = None,
        nag: Nag | None = None,
    ) -> Conditioning:
        """The conditioning of one prompt, not yet evaluated; with the negative one where guidance needs it.

        That is true guidance, a cfg_scale other than 1, or NAG. clip_text: what CLIP reads of the prompt's,
        where it is another text.
        """
        self._read(self.t5)
        positive = self._encode_text(text, clip_text)
        guided = cfg_scale != 1 or nag is not None
        return Conditioning(positive, self._encode_text(negative_prompt or "") if guided else None)

    def _encode_text(self, text: str, clip_text: str | None = None) -> TextConditioning:
        cache, tokenizers = self.text_cache, (self.t5_tokenizer, self.clip_tokenizer)
        clip_texts = None if clip_text is None else [clip_text]
        if cache is not None and (found := cache.get(text, clip_text)) is not None:
            warn_of_cuts([text], *tokenizers, clip_texts)
            return found
        made = encode_texts([text], self.t5, self.clip, *tokenizers, self.t5_padding, clip_texts)
        if cache is not None:
            cache.put(text, clip_text, made)
        return made

    @staticmethod
    def _shown(text: TextConditioning, noise: mx.array, latent_size: tuple[int, int]) -> tuple[mx.array, ...]:
        """The tuple that `generate_latents` yields first, everything as a batch of all pictures."""
        t5_positions = sampler.text_positions(text.t5.shape[1])
        alike = (sampler.image_positions(latent_size), text.t5, t5_positions, text.clip)
        return noise, *(mx.broadcast_to(a, (len(noise), *a.shape[1:])) for a in alike)

    def prepare(
        self,
        conditioning: Conditioning,
        noise: mx.array | None,
        latent_size: tuple[int, int],
        num_steps: int,
        guidance: float,
        cfg_scale: float = 1.0,
        schedule: str = "model",
        pictures: PictureConditioning = NO_PICTURES,
        strength: float = 1.0,
        controlnets: Sequence[ControlInput] = (),
        solver: str = "euler",
    ) -> Plan:
        """Compute, lazily, what is the same in all steps and for all seeds; noise (B, L, channels) is packed.

        strength: of a picture that is changed, see `Edit`. controlnets: see `Request`. Without noise
        `denoise` takes a plan with another's: `plan._replace(x=noise)`. After the plan's evaluation
        `flow.drop_modulation()` gives memory back, and `denoise` still works.
        """
        self._read(self.flow)
        height, width = latent_size
        times = sampler.timesteps(num_steps, height // 2 * (width // 2), self.spec.shift, schedule)
        times = sampler.from_strength(times, strength)

        seen = self._seen(times[:-1])

        def branch(text: TextConditioning) -> Branch:
            return prepare_branch(self.flow, text, pictures, latent_size, seen, guidance)

        positive, negative = conditioning
        controls = self.controlnets.prepare(
            controlnets, pictures.controls, positive, latent_size, seen, guidance
        )
        branches = branch(positive), negative and branch(negative)
        return Plan(noise, times, *branches, cfg_scale, pictures, solver, controls)

    def _seen(self, times: list[float]) -> mx.array:
        """Times as the transformer is told them. diffusers' pipeline rounds their thousandfold first."""
        seen = mx.array(times)
        return (seen * 1000).astype(self.flow.dtype) / 1000 if self.rounding == "diffusers" else seen

    def denoise(self, plan: Plan) -> Iterator[mx.array]:
        """Yield the packed latent (B, L, channels), float32, after each step."""
        return denoising.denoise(self.flow, plan, self.controlnets)

    def canvas(self, edit: Edit, image_size: tuple[int, int]) -> Canvas:
        """What the model works on for a picture that is changed; image_size: see `Edit.canvas`."""
        return edit.canvas(image_size, 2 * self.downscale)  # a token is a patch of 2x2

    def encode_picture(self, picture: np.ndarray) -> mx.array:
        """The packed latent (1, L, channels), float32, of a picture (H, W, 3), uint8: the mean, no sample."""
        return self.encode_pixels(images.normalize(picture[None]))

    def encode_pixels(self, pixels: mx.array) -> mx.array:
        """The packed latent (1, L, channels), float32, of a picture (1, H, W, 3) in -1..1."""
        self._read(self.ae)
        x = pixels.astype(self.ae.encoder.conv_in.weight.dtype)
        return sampler.pack(self.ae.encode(x, memory=machine.autoencoder_memory())).astype(mx.float32)

    def decode(self, x: mx.array, latent_size: tuple[int, int] = (64, 64)) -> mx.array:
        """Packed latents (B, L, channels) -> pictures (B, H, W, 3) in 0..1, float32.

        In pieces where half of the machine's memory would not do for the whole.
        """
        latent = sampler.unpack(x, latent_size)  # (B, h, w, z)
        latent = latent.astype(self.ae.decoder.conv_in.weight.dtype)
        return images.denormalize(self.ae.decode(latent, machine.autoencoder_memory()))
