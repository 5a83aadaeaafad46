"""The options of other trainers in a file of options: which of ours each is, and what there is none for.

Names are those of diffusers' scripts and the toolkits that took them over, of sd-scripts, of XLabs and of
mlx-examples. Steps of theirs are updates, and iterations here are batches: the names that end with _updates
stand for options of ours in that unit.
"""

from typing import Any

# our option -> its names elsewhere
NAMES: dict[str, tuple[str, ...]] = {
    "model": (
        *("model_name", "model_name_or_path", "pretrained_model_name_or_path", "name_or_path"),
        *("base_model", "model_path"),
    ),
    "data": (
        *("instance_data_dir", "train_data_dir", "data_dir", "dataset", "dataset_name", "dataset_path"),
        *("dataset_dir", "data_path", "img_dir", "image_dir", "image_folder"),
    ),
    "config": ("dataset_config",),
    "clip": ("clip_l",),
    "t5": ("t5xxl",),
    "class_tokens": ("instance_prompt",),
    "resolution": ("img_size", "image_size"),
    "batch_size": ("train_batch_size", "per_device_train_batch_size"),
    "flip_aug": ("random_flip",),
    "rank": ("network_dim", "lora_r", "r"),
    "alpha": ("network_alpha",),
    "dropout": ("network_dropout",),
    "targets": ("target_modules", "lora_target_modules", "lora_layers"),
    "train_clip": ("train_text_encoder",),
    "max_updates": ("max_train_steps", "max_steps", "num_train_steps", "train_steps", "steps"),
    "epochs": ("num_train_epochs", "num_epochs", "max_train_epochs"),
    "accumulate": ("gradient_accumulation_steps", "gradient_accumulation", "grad_accumulation_steps"),
    "optimizer": ("optimizer_type", "optimizer_name", "optim"),
    "learning_rate": ("lr", "unet_lr"),
    "schedule": ("lr_scheduler", "lr_scheduler_type"),
    "warmup": ("lr_warmup_steps", "warmup_steps", "num_warmup_steps"),
    "restarts": ("lr_num_cycles", "lr_scheduler_num_cycles"),
    "weight_decay": ("adam_weight_decay",),
    "adam_epsilon": ("adam_eps",),
    "clip_norm": ("max_grad_norm", "gradient_clipping"),
    "ema": ("ema_decay",),
    "loss": ("loss_type",),
    "delta": ("huber_c",),
    "prior_weight": ("prior_loss_weight",),
    "guidance": ("guidance_scale",),
    "time_sampling": ("timestep_sampling", "weighting_scheme"),
    "time_scale": ("sigmoid_scale",),
    "time_mean": ("logit_mean",),
    "time_std": ("logit_std",),
    "grad_checkpoint": ("gradient_checkpointing", "use_gradient_checkpointing"),
    "dtype": ("mixed_precision", "precision"),
    "log_updates": ("logging_steps", "log_interval"),
    "save_updates": ("save_steps", "checkpointing_steps", "save_every_n_steps"),
    "save_every": ("checkpoint_every",),
    "save_every_epochs": ("save_every_n_epochs",),
    "keep_states": ("save_total_limit", "checkpoints_total_limit"),
    "validate_updates": ("validation_steps", "eval_steps"),
    "progress_updates": ("sample_every", "sample_every_n_steps"),
    "progress_prompts": ("validation_prompt", "validation_prompts", "sample_prompts"),
    "name": ("output_name", "lora_name"),
    "output_dir": ("output_path",),
    "trigger": ("trigger_word",),
}
OURS = {other: ours for ours, others in NAMES.items() for other in others}

# the names in updates -> our option in iterations
IN_UPDATES = {
    "max_updates": "iterations",
    "log_updates": "log_every",
    "save_updates": "save_every",
    "validate_updates": "validate_every",
    "progress_updates": "progress_every",
}

# what an option is called here -> values of other trainers -> ours
VALUES: dict[str, dict[str, str | None]] = {
    "dtype": {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "no": "float32", "float": "float32"},
    "schedule": {"constant_with_warmup": "constant"},
    "optimizer": {
        "adamw_torch": "adamw",
        **{f"{paged}adamw{line}8bit": "adamw" for paged in ("", "paged", "paged_") for line in ("", "_")},
    },
    "loss": {"l2": "mse"},
    "time_sampling": {"none": "uniform"},
    "quantize": {"true": "4", "false": None},
}
EIGHT_BIT = "8-bit states of the optimizer are not supported: they have 32 bits"

ANY = object()
# option -> the values that change nothing here
HARMLESS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("report_to", "logging_dir", "log_with", "tracker_project_name", "project_name"), (ANY,)),
    **dict.fromkeys(("dataloader_num_workers", "num_workers", "max_data_loader_n_workers"), (ANY,)),
    **dict.fromkeys(
        ("persistent_data_loader_workers", "allow_tf32", "sdpa", "xformers", "torch_compile"), (ANY,)
    ),
    **dict.fromkeys(
        ("enable_xformers_memory_efficient_attention", "xformers", "highvram", "lowvram", "low_vram"), (ANY,)
    ),
    **dict.fromkeys(("cache_latents_to_disk", "cache_text_encoder_outputs_to_disk", "device"), (ANY,)),
    **dict.fromkeys(("cache_latents", "cache_text_encoder_outputs", "train_unet"), (True,)),
    **dict.fromkeys(("network_train_unet_only", "center_crop", "is_flux"), (True,)),
    **dict.fromkeys(("push_to_hub", "scale_lr", "use_8bit_adam", "fp8_base", "use_ema"), (False,)),
    **dict.fromkeys(("single_blocks", "double_blocks", "disable_sampling"), (False,)),
    "network_module": ("networks.lora_flux",),
    "save_model_as": ("safetensors",),
    "model_prediction_type": ("raw",),
    "with_prior_preservation": (False,),
    "noise_scheduler": ("flowmatch",),
    "lora_bias": ("none",),
    "bias": ("none",),
}

# option of other trainers -> what there is instead
LEFT_OUT: dict[str, str] = {
    "use_8bit_adam": EIGHT_BIT,
    "fp8_base": "the base in fp8 (here --quantize 8, 4 or mxfp4)",
    "save_precision": "the numbers of the saved file (here float32)",
    "save_model_as": "the kind of the saved file (here safetensors; --format has the naming)",
    "network_module": "the kind of the adapter (here LoRA, or --dora)",
    "optimizer_args": "further settings of the optimizer (here --weight-decay, --adam-beta1 ...)",
    "text_encoder_lr": "a rate of the text encoders (here one for all)",
    "blocks_to_swap": "blocks that wait in the memory of the processor (here all memory is one)",
    "lr_power": "the exponent of a polynomial schedule",
    "min_snr_gamma": "a weight of models that predict noise",
    "snr_gamma": "a weight of models that predict noise",
    "noise_offset": "a change of the noise",
    "discrete_flow_shift": "the shift of the times (here that of --time-sampling)",
    "model_prediction_type": "what the model's output is taken for (here as FLUX was trained)",
    "scale_lr": "a rate times the batch (here --learning-rate as it stands)",
    "use_ema": "an average of the weights (here --ema X)",
    "center_crop": "crops at random (here --random-crop)",
    "with_prior_preservation": "regularisation pictures (here a folder reg, or is_reg in a data.toml)",
    "class_data_dir": "regularisation pictures (here a folder reg, or is_reg in a data.toml)",
    "class_prompt_reg": "the caption of regularisation pictures",
    "num_class_images": "how many regularisation pictures are drawn",
    "push_to_hub": "sends the adapter to the Hub",
    "hub_model_id": "the adapter's name on the Hub",
    "resume_from_checkpoint": "goes on with a run (here --resume DIR)",
    "num_augmentations": "random crops a picture (here --random-crop and --repeats)",
    "progress_steps": "steps of a progress picture (here the model's)",
    "max_sequence_length": "the length of prompts (here the model's)",
    "t5xxl_max_token_length": "the length of prompts (here the model's)",
    "apply_t5_attn_mask": "a mask of T5's padding (here none, as FLUX was trained)",
    "image_column": "the column of the pictures (here found by its usual names)",
    "num_validation_images": "how many pictures a prompt (here one)",
    "validation_epochs": "epochs from one progress picture to the next (here --progress-every)",
    "sample_steps": "steps of a progress picture (here the model's)",
    "sample_width": "the size of progress pictures (here that of the training)",
    "sample_height": "the size of progress pictures (here that of the training)",
    "random_ratio": "crops of random shape (here --buckets)",
    "single_blocks": "which blocks are trained (here --lora-targets single_blocks.0,single_blocks.1 ...)",
    "double_blocks": "which blocks are trained (here --lora-targets double_blocks.0,double_blocks.1 ...)",
    "disable_sampling": "no progress pictures (here there are none without --progress-prompt)",
    "noise_scheduler": "the times of the training (here --time-sampling)",
    "train_unet": "leaves the transformer as it is (here it is always trained)",
    "network_train_unet_only": "trains the text encoders, too (here --train-clip)",
    "lora_bias": "trains biases, too",
    "bias": "trains biases, too",
    "cache_latents": "encodes pictures anew in every epoch (here once)",
    "cache_text_encoder_outputs": "encodes captions anew in every epoch (here once)",
}


def passes(name: str, value: Any) -> bool:
    """Whether an option changes nothing here."""
    known = HARMLESS.get(name, ())
    if value is None:
        return name in HARMLESS or name in LEFT_OUT
    return any(each is ANY or (each == value and type(each) is type(value)) for each in known)


def translated(name: str, value: Any) -> tuple[Any, str]:
    """Our value of our option, given as another trainer writes it, and what to say of it, if anything."""
    table = VALUES.get(name)
    if table is None or not isinstance(value, (str, bool, int)):
        return value, ""
    text = str(value).lower()
    said = EIGHT_BIT if name == "optimizer" and "8bit" in text else ""
    if text in table:
        return table[text], said
    return (value if name not in ("optimizer", "quantize") else text), said


def in_iterations(name: str) -> str:
    """Our option of a name that may be the one in updates."""
    return IN_UPDATES.get(name, name)


def iterations(given: dict[str, Any], accumulate: int) -> dict[str, Any]:
    """With what was given in updates as iterations, of which an update takes `accumulate`."""
    return {
        in_iterations(name): value * accumulate if name in IN_UPDATES else value
        for name, value in given.items()
    }
