"""The trained parts as a model's folder, in diffusers' layout.

python -m flux.recipes.tiny.export --run DIR --output flux/assets/tiny
"""

import sys
from dataclasses import replace

from flux.arguments import run_program
from flux.distributed.ranks import Ranks
from flux.models.autoencoder import AutoEncoder
from flux.recipes.arguments import export_folders
from flux.recipes.tiny import recipe
from flux.recipes.tiny.flow import load_tokenizers, make_model
from flux.recipes.tiny.latents import read
from flux.training.states import load_state
from flux.weights import registry
from flux.weights.save import Model, save_diffusers


def main() -> int:
    """Run the program; its exit status: 0, 2 for bad input, 130 when interrupted."""
    return run_program(run)


def run(ranks: Ranks) -> int:
    """Write the trained model as diffusers' folder."""
    run, output = export_folders(__doc__)
    latents = read(run / "latents.safetensors")
    autoencoder = AutoEncoder(
        replace(recipe.AUTOENCODER, scale_factor=latents.scale, shift_factor=latents.shift)
    )
    load_state(autoencoder, run / "autoencoder.safetensors")
    clip, _ = load_tokenizers(run)
    parts = make_model(run, clip)
    load_state(parts, run / "flow.safetensors", "ema.average")
    spec = replace(registry.get("tiny"), t5_length=recipe.T5_LENGTH)
    tokenizers = (run / "tokenizer", run / "tokenizer_2")
    model = Model(parts.flow, autoencoder, parts.clip, parts.t5, *tokenizers, spec)
    save_diffusers(output, model)
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
