"""Tables that ship with the package; every figure has its source beside it."""
