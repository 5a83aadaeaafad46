"""The options of sd-scripts' data.toml that are not supported here, each with what it does.

So that a file that is right for sd-scripts is told from one with a typing error. `HARMLESS` values say what
happens here anyway, and pass.
"""

from typing import Any

# option -> what it does in sd-scripts
UNSUPPORTED = {
    "secondary_separator": "separates tags that stay together where the others are shuffled",
    "token_warmup_min": "the number of tags at the start, which grows while training",
    "token_warmup_step": "the steps over which the number of tags grows",
    "face_crop_aug_range": "crops around faces whose position the file's name gives",
    "network_multiplier": "the adapter's strength while training on these pictures",
    "resize_interpolation": "how pictures are resized (here by areas down, by lanczos up)",
    "skip_image_resolution": "leaves out pictures below a size",
    "prior_loss_weight": "the weight of regularisation pictures (here --prior-weight)",
    "max_token_length": "the length of Stable Diffusion's prompts (FLUX has one of its model's)",
    "train_data_dir": "the folder of img/10_name folders (here the folder on the command line)",
    "reg_data_dir": "the folder of regularisation pictures (here is_reg = true in a subset)",
    "in_json": "the list of captions (here metadata_file in a subset)",
    "control_dir": "pictures that a ControlNet is given",
    "debug_dataset": "shows the pictures instead of training",
    "cache_info": "keeps the pictures' sizes in a file",
    "custom_attributes": "notes for the user's code",
    "dataset_repeats": "repeats of a whole data set (here num_repeats)",
    "color_aug_strength": "how much colours are varied",
    "caption_extention": "an old spelling of caption_extension",
}
ANY = object()
# option -> the values that change nothing here
HARMLESS = {
    "secondary_separator": (None, ""),
    "token_warmup_min": (1,),
    "token_warmup_step": (0, 0.0),
    "face_crop_aug_range": (None, ""),
    "network_multiplier": (1, 1.0),
    "resize_interpolation": (None, ""),
    "skip_image_resolution": (None,),
    "prior_loss_weight": (1, 1.0),
    "max_token_length": (ANY,),
    "debug_dataset": (False,),
    "cache_info": (ANY,),
    "custom_attributes": (ANY,),
}
# option -> what it is called here
ALIASES = {"conditioning_data_dir": "mask_dir"}


def passes(key: str, value: Any) -> bool:
    """Whether an option of sd-scripts may stay in the file, as it changes nothing here."""
    known = HARMLESS.get(key, ())
    return any(each is ANY or (each == value and type(each) is type(value)) for each in known)


def refusal(key: str) -> str | None:
    """What to say of an option of sd-scripts that is not supported; None for one that it does not have."""
    what = UNSUPPORTED.get(key)
    return None if what is None else f"{key} is an option of sd-scripts that is not supported here: {what}"
