"""Run directories: manifests, trajectory, hypergradients and test gradients (Zarr), contributions (Parquet)."""
