"""The op inside models: an nn.Module of our own, and transformers' models."""
