"""Checkpoints on disk: read safetensors shards, write them, and know which tensor is which."""
