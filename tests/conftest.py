"""Where there is no GPU, Triton's kernels run in its interpreter; it looks at this when it is imported."""

import os

import torch

if torch.cuda.is_available():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else torch's products refuse to be deterministic
else:
    os.environ["TRITON_INTERPRET"] = "1"
