"""ControlNets: what control pictures bring to every step; several add up."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import mlx.core as mx
import numpy as np

from flux import images, sampler
from flux.conditioning import edges
from flux.conditioning.pictures import Picture
from flux.conditioning.texts import TextConditioning
from flux.errors import FluxError
from flux.jsonfiles import shown
from flux.models.autoencoder import AutoEncoder
from flux.models.controlnet import ControlNet, spread
from flux.models.transformer import Flux, FluxParams, ModulationVectors, Residuals
from flux.weights import checkpoints, tensors
from flux.weights.fit import check_controlnet
from flux.weights.layouts import Part
from flux.weights.quantize import quantize

Fit = Callable[[np.ndarray], np.ndarray]
MODES = ("canny", "tile", "depth", "blur", "pose", "gray", "lq")  # InstantX's and Shakker-Labs', from 0


@dataclass(frozen=True)
class ControlInput:
    """What a ControlNet is told: a control picture, and when and how strongly it acts.

    mode: for a union, one of `MODES` or its number. strength: a factor of what it adds. start, end: shares of
    the steps that are made, from 0 to 1; it acts in the steps that lie wholly between. edges: the control
    picture is a photo, of which the ControlNet is told the edges.
    """

    picture: Picture
    mode: str | int | None = None
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    edges: bool = False

    def check(self) -> None:
        """FluxError, naming the value, where no picture can be made."""
        if not math.isfinite(self.strength):
            raise FluxError(f"a ControlNet's strength must be a finite number, not {self.strength}")
        if not 0 <= self.start <= self.end <= 1:  # which NaN is not
            raise FluxError(
                "a ControlNet's start and end must be shares of the steps, 0 <= start <= end <= 1, "
                f"not {self.start} and {self.end}"
            )
        if self.edges:
            edges.opencv()

    def mode_number(self, modes: int) -> int | None:
        """The mode's number for a ControlNet with so many modes; FluxError where it does not go with them."""
        known = f"{', '.join(MODES[:modes])} or a number from 0 to {modes - 1}"
        if self.mode is None:
            if modes:
                raise FluxError(f"this ControlNet is a union: it needs the control picture's mode, {known}")
            return None
        if not modes:
            raise FluxError(f"this ControlNet takes no mode: leave out {shown(self.mode)}")
        text = str(self.mode)
        number = MODES.index(text) if text in MODES else int(text) if text.isdecimal() else modes
        if number >= modes:
            raise FluxError(f"this ControlNet has no mode {shown(self.mode)}, but {known}")
        return number

    def pixels(self, fit: Fit) -> np.ndarray:
        """The control picture at the size that is made: (H, W, 3), uint8."""
        fitted = fit(self.picture.pixels)
        return edges.canny(fitted) if self.edges else fitted

    def acts(self, step: int, steps: int) -> bool:
        """Whether it acts in a step (from 0) of so many, as in diffusers' pipelines."""
        return bool(self.strength) and step / steps >= self.start and (step + 1) / steps <= self.end


class Control(NamedTuple):
    """What a ControlNet needs in every step and does not depend on the latent; of a batch of 1.

    `mx.eval` takes it.
    """

    picture: mx.array  # (1, L, hidden)
    text: mx.array  # (1, Lt, hidden), the mode's token first
    positions: mx.array  # rotary tables
    modulation: dict[int, ModulationVectors]  # of the steps in which it acts
    strength: float


@dataclass(frozen=True)
class ControlNets:
    """The ControlNets of a pipeline, in their order, and the files that they are from."""

    networks: tuple[ControlNet, ...] = ()
    parts: tuple[Part, ...] = ()

    @classmethod
    def load(
        cls,
        names: Iterable[str],
        dtype: mx.Dtype | None = None,
        bits: int | None = None,
        mode: str = "affine",
    ) -> "ControlNets":
        """Find and lazily load ControlNets by their files, folders or repositories; FluxError where not.

        dtype: of the weights. bits, mode: to quantize them, see `flux.weights.quantize`; None not to.
        """
        parts = tuple(map(checkpoints.find_controlnet, names))
        networks = tuple(cast(ControlNet, checkpoints.load_part(part, dtype)) for part in parts)
        if bits is not None:
            for network in networks:
                quantize(network, bits, mode=mode)
        return cls(networks, parts)

    def check_fit(self, flow: Flux, ae: AutoEncoder) -> None:
        """FluxError for one that cannot work with a model; reads no weights."""
        for part, network in zip(self.parts, self.networks, strict=True):
            check_controlnet(part.label, network, flow, ae)

    def check(self, inputs: Sequence[ControlInput]) -> None:
        """FluxError, naming the value, for inputs that do not go with these ControlNets."""
        if len(inputs) != len(self.networks):
            raise FluxError(
                f"{len(self.networks)} ControlNet(s) and {len(inputs)} control picture(s): "
                "give one for each, in the same order"
            )
        for given, network in zip(inputs, self.networks, strict=True):
            given.check()
            given.mode_number(network.params.modes)

    def encode(
        self, inputs: Sequence[ControlInput], fit: Fit, encode_picture: Callable[[np.ndarray], mx.array]
    ) -> tuple[mx.array, ...]:
        """What each takes of its control picture: (1, L, control_channels).

        fit: brings a picture (H, W, 3), uint8, to the size that is made. encode_picture: the autoencoder's
        packed latent of such a picture.
        """

        def encode(network: ControlNet, pixels: np.ndarray) -> mx.array:
            if not network.takes_pixels:
                return encode_picture(pixels)
            return sampler.pack(network.hint(images.normalize(pixels[None]))).astype(mx.float32)

        return tuple(
            encode(network, given.pixels(fit)) for network, given in zip(self.networks, inputs, strict=True)
        )

    def prepare(
        self,
        inputs: Sequence[ControlInput],
        pictures: Sequence[mx.array],
        text: TextConditioning,
        latent_size: tuple[int, int],
        times: mx.array,
        guidance: float,
    ) -> tuple[Control, ...]:
        """Their shares of steps at these times, (T,), as the transformer is told them; lazily.

        pictures: as `encode` gives them.
        """

        def prepare(network: ControlNet, given: ControlInput, picture: mx.array) -> Control:
            embedded = network.embed_text(text.t5, given.mode_number(network.params.modes))
            text_positions = sampler.text_positions(embedded.shape[1])
            steps = [step for step in range(len(times)) if given.acts(step, len(times))]
            seen = times[steps[0] : steps[-1] + 1] if steps else None
            vectors = [] if seen is None else network.modulation(seen, text.clip, mx.array([guidance]))
            return Control(
                network.embed_control(picture),
                embedded,
                network.positions(text_positions, sampler.image_positions(latent_size)),
                dict(zip(steps, vectors, strict=True)),
                given.strength,
            )

        return tuple(map(prepare, self.networks, inputs, pictures))

    def residuals(
        self, controls: Sequence[Control], flow: FluxParams, x: mx.array, step: int
    ) -> Residuals | None:
        """What those that act in a step add to a transformer of such a shape; None where none acts.

        x (B, L, channels), the noisy latent. Of several ControlNets, block by block the sum.
        """
        total = None
        for network, control in zip(self.networks, controls, strict=True):
            if step not in control.modulation:
                continue
            text = mx.broadcast_to(control.text, (len(x), *control.text.shape[1:]))
            vectors = control.modulation[step]
            made = network.residuals(x, control.picture, text, control.positions, vectors)
            double, single = ([control.strength * r for r in kind] for kind in made)
            found = Residuals(
                spread(double, flow.depth, network.repeats),
                spread(single, flow.depth_single_blocks, repeat=False),
            )
            total = found if total is None else Residuals(*map(_sum, total, found))
        return total

    def fingerprints(self) -> dict[str, str]:
        """A digest of each one's files, by its file."""
        return {
            f"ControlNet {part.label}": " ".join(map(tensors.fingerprint, part.files)) for part in self.parts
        }


NO_CONTROLNETS = ControlNets()


def _sum(a: list[mx.array], b: list[mx.array]) -> list[mx.array]:
    """Block by block; a list that is empty adds nothing."""
    return [x + y for x, y in zip(a, b, strict=True)] if a and b else a or b
