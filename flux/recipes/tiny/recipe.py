"""What the built-in model is trained on. Its sizes and its training are recipe.yaml, for the pipeline:

    python -m flux.training.pretrain flux/recipes/tiny/recipe.yaml --resume
    python -m flux.recipes.tiny.export --run tiny-run --output flux/assets/tiny
    python -m flux.recipes.tiny.evaluate

The committed weights are of an earlier recipe (revision 27b9d34 of this repository has its loops), of 64x64
pictures and ten colours: an autoencoder in 57 minutes and a flow in 138, 528 thousand pictures, by two
processes on two CPU cores that other work shared.
"""

SUBJECTS = 205  # the first so many of the table are trained on; the rest are for fine-tuning
SCENES = 60_000  # pictures of the data set: scenes.py
