"""What a prefix does, before any training."""
