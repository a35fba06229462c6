"""Pure arithmetic on model shapes: bytes, parameters, FLOPs, bounds. No torch."""
