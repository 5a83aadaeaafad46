"""The recipe of the built-in captioner: a small Florence-2 for pictures of `flux.training.pretrain.emoji`.

    python -m flux.training.captioner --run DIR
    python -m flux.training.captioner.export --run DIR --output flux/assets/tiny-captioner
    python -m flux.training.captioner.evaluate --read-back tiny

Its three tasks say ever more: "a red apple on a blue background", "a large red apple in the centre of a blue
background", "a blue background with a large red apple in the centre". All are prompts of the built-in model.

The built-in weights are of `--tower-steps 450 --steps 420`, made with MLX's CPU backend on a share of two
cores of an AMD EPYC: about 4 minutes of one core for the tower, 3 for the captions. It was made in pieces: the
tower's first 280 steps on 12,000 pictures and as of a run of 800; the first 150 steps of the captions on what
the tower saw at step 280, the next 80 at step 340.
"""
