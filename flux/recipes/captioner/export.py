"""The trained captioner as a folder, in the layout of transformers' Florence-2.

python -m flux.recipes.captioner.export --run DIR --output flux/assets/tiny-captioner
"""

import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx

from flux.arguments import run_program
from flux.captioning.tokenizer import BartTokenizer
from flux.distributed.ranks import Ranks
from flux.errors import FluxError
from flux.models.florence2 import Florence2
from flux.recipes.arguments import export_folders
from flux.recipes.captioner import recipe
from flux.recipes.captioner.__main__ import STATE
from flux.training.states import load_state
from flux.training.vocabularies import IMAGE_TOKEN
from flux.trees import named_arrays
from flux.weights import florence2, tensors


def save(folder: Path, network: Florence2, tokenizer: Path, dtype: mx.Dtype = mx.float16) -> None:
    """Writes config, weights in dtype, and what prepares pictures and texts; tokenizer: its folder.

    The folder appears whole or not at all. FluxError where there is one of that name.
    """
    if folder.exists():
        raise FluxError(f"{folder}: is there already: remove it or choose another name")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        shutil.copytree(tokenizer, partial)
        weights = {name: w.astype(dtype) for name, w in named_arrays(network.parameters())}
        tensors.save(partial / "model.safetensors", florence2.to_transformers(weights))
        for name, content in configs(BartTokenizer.from_folder(tokenizer)).items():
            (partial / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        partial.rename(folder)
    except OSError as error:
        raise FluxError(f"{folder}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def configs(tokenizer: BartTokenizer) -> dict[str, dict[str, Any]]:
    """The JSON files beside the weights, by name, in transformers' words."""
    params, size = recipe.params(tokenizer), recipe.PICTURES
    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": recipe.GENERATION.decoder_start_token_id,
        "forced_eos_token_id": recipe.GENERATION.forced_eos_token_id,
    }
    vision = {
        **asdict(params.vision),
        "projection_dim": params.language.d_model,
        "max_position_embeddings": params.max_position_embeddings,
        "max_temporal_embeddings": params.max_temporal_embeddings,
        "model_type": "florence_vision",
    }
    places = (size.height // recipe.STRIDE) * (size.width // recipe.STRIDE)
    return {
        "config": {
            "architectures": ["Florence2ForConditionalGeneration"],
            "model_type": "florence2",
            "image_token_id": tokenizer.special[IMAGE_TOKEN],
            "is_encoder_decoder": True,
            "vision_config": vision,
            "text_config": {**asdict(params.language), **tokens, "model_type": "bart"},
        },
        "generation_config": asdict(recipe.GENERATION) | tokens,
        "preprocessor_config": {
            "image_processor_type": "CLIPImageProcessor",
            "image_seq_length": 1 + places,
            "do_center_crop": False,
            "do_resize": True,
            "resample": 3,  # bicubic
            "size": {"height": size.height, "width": size.width},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(size.mean),
            "image_std": list(size.deviation),
            "do_convert_rgb": True,
        },
    }


def main() -> int:
    """Run the program; its exit status: 0, 2 for bad input, 130 when interrupted."""
    return run_program(run)


def run(ranks: Ranks) -> int:
    """Write the trained captioner as a checkpoint's folder."""
    run, output = export_folders(__doc__)
    tokenizer = run / "tokenizer"
    network = Florence2(recipe.params(BartTokenizer.from_folder(tokenizer)))
    load_state(network, run / STATE, "model")
    save(output, network, tokenizer)
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
