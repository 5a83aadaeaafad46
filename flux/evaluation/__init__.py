"""What adapters and models do, shown and measured: grids, likeness, intervals. Above the pipeline."""
