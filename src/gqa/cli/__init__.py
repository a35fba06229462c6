"""The `gqa` command. One file per command; `output.py` is the only printer."""
