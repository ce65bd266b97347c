"""The trajectory store: base and checkpoints with their real steps, as one Zarr v3 group (docs/store.md)."""
