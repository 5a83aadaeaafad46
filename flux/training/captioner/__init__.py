"""The recipe of the built-in captioner: a small Florence-2 for pictures of `flux.training.pretrain.emoji`.

    python -m flux.training.captioner --run DIR
    python -m flux.training.captioner.export --run DIR --output flux/assets/tiny-captioner
    python -m flux.training.captioner.evaluate --read-back tiny

Its three tasks say ever more: "a red apple on a blue background", "a large red apple in the centre of a blue
background", "a blue background with a large red apple in the centre". All are prompts of the built-in model.

Made with MLX's CPU backend on a share of two cores of an AMD EPYC, of which a core does 64 pictures a step in
0.3 s for the tower, 0.3 s for the captions and 0.6 s for both.
"""
