"""Conversion: a checkpoint in, a checkpoint with fewer KV heads out."""
