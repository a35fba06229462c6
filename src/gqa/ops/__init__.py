"""The attention op: `api` is the edge that people call, `registry` the registered op, the rest implementations.

An implementation imports neither another one nor the edge; `visible` is what they share.
"""
