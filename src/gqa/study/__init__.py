"""The whole dial in one run: the embedded model and text, and the pipeline over every number of KV heads."""
