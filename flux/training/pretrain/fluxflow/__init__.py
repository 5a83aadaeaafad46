"""FluxFlow's config files, read into our keys."""

from flux.training.pretrain.fluxflow.translate import translate as translate
