"""The recipe of the built-in captioner: a small Florence-2 for pictures of `flux.recipes.emoji`.

    python -m flux.recipes.captioner --run DIR
    python -m flux.recipes.captioner.export --run DIR --output flux/assets/tiny-captioner
    python -m flux.recipes.captioner.evaluate --read-back tiny

Its three tasks say ever more: "a red apple on a blue background", "a large red apple in the centre of a blue
background", "a blue background with a large red apple in the centre". All are prompts of the built-in model.

The committed weights were made on a share of two CPU cores (AMD EPYC) in about 80 minutes, not by the first
line as it stands but in pieces of it: the tower for 280 steps on 12 000 pictures, then up to 450 on 8 000;
the captions from its features for 420 steps, the last 190 of them on the finished tower; both together for
150 steps at a rate of 0.01 and 112 at 0.005 on 8 000 pictures, then for the rest of 1100 steps on 20 000,
from 0.006 down to zero (`--tower-steps 450 --language-steps 420 --pictures 20000 --steps 1100 --rate
0.024`). The pictures that the autoencoder had damaged were 1000 of these.
"""
