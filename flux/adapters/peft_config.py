"""PEFT's configs beside or in an adapter file: alpha and rank of each module, and what they promise."""

import math
from collections.abc import Mapping
from typing import Any

from flux import jsonfiles
from flux.adapters import checks
from flux.adapters.adapter import part_of
from flux.adapters.names import Target
from flux.errors import FluxError

PEFT_METADATA = "lora_adapter_metadata"  # the header's entry in which diffusers keeps PEFT's config
DIFFUSERS_PARTS = {"flux": "transformer", "clip": "text_encoder", "t5": "text_encoder_2"}
# Ways to begin a training that change the base's weights too: the adapter alone is then another change.
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

Json = Mapping[str, Any]


class Configs:
    """PEFT's LoraConfig (or another kind's) for each network."""

    def __init__(self, metadata: Mapping[str, str], beside: Json | None = None):
        """metadata: of the file's header; beside: the config in another file, for all networks."""
        self._configs = _unpack(metadata.get(PEFT_METADATA, "{}"))
        if beside is not None:
            self._configs = dict.fromkeys(DIFFUSERS_PARTS.values(), beside)
        self._patterns: dict[tuple[str, str], checks.Patterns] = {}
        for config in self._configs.values():
            _check(config)

    def of(self, target: Target) -> Json:
        """The config of a module's network; empty where there is none."""
        return self._configs.get(DIFFUSERS_PARTS[part_of(target.module)], {})

    def kind(self, target: Target) -> str:
        """PEFT's name for the kind of adapter, such as LORA; empty where there is no config."""
        return str(self.of(target).get("peft_type") or "")

    def number(self, target: Target, name: str, patterns: str) -> float:
        """A number of the config for one module: of the first pattern that fits, else the usual one."""
        config, network = self.of(target), DIFFUSERS_PARTS[part_of(target.module)]
        if (network, patterns) not in self._patterns:
            self._patterns[network, patterns] = checks.Patterns(config.get(patterns) or {}, patterns)
        # Newer versions of transformers leave `text_model.` out.
        found = self._patterns[network, patterns].find(
            target.theirs, target.theirs.removeprefix("text_model.")
        )
        return checks.number(config.get(name), name) if found is None else found

    def alpha(self, target: Target, rank: int) -> float | None:
        """A LoRA's alpha, where a config has it."""
        config = self.of(target)
        if config.get("lora_alpha") is None:
            return None
        alpha = self.number(target, "lora_alpha", "alpha_pattern")
        return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha

    def scale(self, target: Target) -> float | None:
        """alpha / r of PEFT's LoHa and LoKr, which it multiplies every product with; None for others."""
        if self.kind(target) not in ("LOHA", "LOKR"):
            return None
        rank = checks.positive(self.number(target, "r", "rank_pattern"), "r")
        return self.number(target, "alpha", "alpha_pattern") / rank

    def promises_biases(self) -> bool:
        """Whether the base's biases were trained as well."""
        return any(config.get("bias") in ("all", "lora_only") for config in self._configs.values())


def _unpack(text: str) -> dict[str, Json]:
    """`network.field` -> value, as diffusers writes it, by networks."""
    try:
        packed = jsonfiles.parse_object(text)
    except ValueError as error:
        raise FluxError(f"{PEFT_METADATA}: {error}") from None
    configs: dict[str, dict[str, Any]] = {}
    for name, value in packed.items():
        network, _, field = name.partition(".")
        configs.setdefault(network, {})[field] = value
    return dict(configs)


def _check(config: Json) -> None:
    initial = config.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith(CHANGES_THE_BASE):
        raise FluxError(
            f"init_lora_weights is {initial!r}: this adapter belongs to changed base weights; "
            "convert it to a plain LoRA with PEFT's path_initial_model_for_weight_conversion"
        )
    if config.get("coft"):
        raise FluxError("a constrained OFT of PEFT (coft) is not supported; merge it with PEFT")
