"""FluxFlow's keys, as tables: what they are called here, and what of them has no effect."""

from collections.abc import Collection
from typing import Any

from flux.tables import Faults, close

Table = dict[str, Any]

COMPONENTS = {
    "compressor": "encoder",
    "expander": "decoder",
    "flow_processor": "flow",
    "D_img": "discriminator",
}
GROUPS = {"flow_processor": "flow", "D_img": "discriminator"}
FROZEN = {"freeze_vae": "vae", "freeze_flow": "flow", "freeze_text_encoder": "text_encoder"}
METRICS = {
    **dict.fromkeys(("vae_loss", "recon", "recon_loss", "loss_recon"), "vae"),
    **dict.fromkeys(("kl_loss", "loss_kl"), "kl"),
    **dict.fromkeys(("flow_loss", "loss_flow"), "flow"),
    **dict.fromkeys(("g_loss", "loss_gen"), "generator"),
    **dict.fromkeys(("d_loss", "loss_disc"), "discriminator"),
    "lpips_loss": "lpips",
}
RENAMED = {
    "step": {
        "train_diff_full": "train_diff",
        "train_flow": "train_diff",
        "duration_epochs": "n_epochs",
        "initial_clipping_norm": "clip_norm",
        "training_steps": "gradient_accumulation_steps",
        "kl_z_weight": "kl_beta",
        "kl_z_warmup_steps": "kl_warmup_steps",
    },
    "dataset": {
        "image_folder": "path",
        "webdataset_url": "path",
        "webdataset_image_key": "image_key",
        "webdataset_caption_key": "caption_key",
    },
    "output": {"checkpoint_interval": "checkpoint_save_interval"},
    "stop_condition": {"loss_name": "metric"},
    "transition_criteria": {"metric_name": "metric", "loss_threshold": "threshold"},
}
MOVED = ("output_path", "log_interval", "checkpoint_save_interval", "sample_captions")  # out of `training`

FLUX_NETWORKS = "the networks are FLUX's"
TIMES = "the flow's times are continuous"
COUNTED = "shards are read through and counted"
NO_CONTEXT = "FLUX's networks have no context branch"
UNUSED: dict[str, dict[str, str]] = {
    "model": {
        **dict.fromkeys(("model_type", "model_version", "baseline_activation"), FLUX_NETWORKS),
        **dict.fromkeys(("baseline_vae_width_mult", "baseline_vae_depth_mult"), FLUX_NETWORKS),
        **dict.fromkeys(("baseline_flow_blocks", "baseline_flow_ffn_expansion"), FLUX_NETWORKS),
        "pretrained_bert_model": "text encoders begin from nothing",
        "use_gradient_checkpointing": "activations are kept",
    },
    "data": {
        "tokenizer_name": "vocabularies are made of the captions; model.tokenizer, tokenizer_2 name others",
        **dict.fromkeys(("dataloader_max_retries", "dataloader_retry_delay"), "files need no retries"),
        "webdataset_token": "shards are files; the Hub's token is that of `hf auth login`",
        **dict.fromkeys(("webdataset_size", "webdataset_samples_per_shard"), COUNTED),
        "webdataset_label_key": "captions are found by their key alone",
    },
    "step": {
        "preserve_lr": "a resumed run has its learning rates",
        "adaptive_weights": "losses have the weights that are given",
        "instance_noise_decay": "instance noise stays as strong as instance_noise_std",
        "spade_training_mode": "SPADE is on in every batch",
        **dict.fromkeys(("num_train_timesteps", "start_step"), TIMES),
        **dict.fromkeys(("ctx_shrinkage_weight", "ctx_shrinkage_warmup_start_step"), NO_CONTEXT),
        **dict.fromkeys(("ctx_shrinkage_warmup_steps", "lambda_ctx_aux", "ctx_loss_weight"), NO_CONTEXT),
        "freeze_context_branch": NO_CONTEXT,
    },
    "output": {
        **dict.fromkeys(("log_level", "log_file"), "the console's lines go to standard error"),
        "generate_diagrams": "graphs are drawn with every checkpoint",
        **dict.fromkeys(("checkpoint_dir", "sample_dir"), "all is written to output_path"),
        "sample_interval": "samples are drawn with every checkpoint",
    },
    "transition": {
        **dict.fromkeys(("min_epochs", "patience"), "a threshold ends a step in any epoch"),
        "value": "n_epochs says how long a step is",
    },
}
LOADING = ("batch_size", "workers")  # of a data set, for the steps that are trained on it
SWITCHES = ("use_webdataset", "use_tt2m", "tt2m_token", "channels")
STEP_TABLES = (
    *("stop_condition", "transition_criteria", "optimizers", "schedulers", "optim_sched_config"),
    *("freeze_modules", "train_reconstruction"),
)
UNFREEZABLE = {
    "context_branch": NO_CONTEXT,
    **dict.fromkeys(("text_encoder_backbone", "text_encoder_projection"), "text encoders are frozen whole"),
}


class Notes:
    """What has no effect here, by reason."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        """Takes in a key."""
        names = self._names.setdefault(reason, [])
        if name not in names:
            names.append(name)

    def lines(self) -> list[str]:
        """A line for each reason."""
        return [f"no effect here: {', '.join(names)} ({reason})" for reason, names in self._names.items()]


def rename(table: Table, section: str) -> None:
    """Gives keys their names here, in place; of two switches of one name either is enough."""
    for old, new in RENAMED[section].items():
        if old in table:
            value = table.pop(old)
            is_switch = isinstance(value, bool) and isinstance(table.get(new), bool)
            table[new] = (table[new] or value) if is_switch else table.get(new, value)


def drop_unused(table: Table, section: str, where: str, notes: Notes) -> None:
    """Takes out, in place, and notes what has no effect here. A key that is null is not noted."""
    for name, reason in UNUSED[section].items():
        if table.pop(name, None) is not None:
            notes.add(reason, f"{where}.{name}")


def misspelt(
    table: Table, where: str, theirs: Collection[str], ours: Collection[str], faults: Faults
) -> None:
    """Names what is near one of its keys and near none of ours: the reader knows ours alone."""
    unknown = [name for name in table if name not in ours and name not in theirs]
    for name in [name for name in unknown if not close(str(name), ours)]:
        if hint := close(str(name), theirs):
            faults.add(where, f"unknown key {name!r}{hint}")
            del table[name]
