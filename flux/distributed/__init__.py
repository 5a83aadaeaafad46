"""Several processes: who they are (ranks), how networks are split over them (sharding, fsdp), gradients."""
