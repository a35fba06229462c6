"""bf16 in Triton's interpreter, which holds it as uint16, made right: conversions round to nearest, and products of
matrices are those of the numbers. Without this tl.dot multiplies the uint16 (seen in Triton 3.6 and 3.9)."""

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast, _convert, _dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp, InterpreterBuilder.create_dot


def repair() -> None:
    def cast(builder, source, kind):
        if source.dtype.scalar == tl.bfloat16:
            source = _widened(source)
        if kind.scalar != tl.bfloat16:
            return source if source.dtype.scalar == kind.scalar else _cast(builder, source, kind)
        numbers = torch.from_numpy(np.ascontiguousarray(source.data, np.float32)).to(torch.bfloat16)
        return TensorHandle(numbers.view(torch.uint16).numpy(), tl.bfloat16)

    def convert(builder, source, kind, rounding):
        if tl.bfloat16 in (source.dtype.scalar, kind.scalar):
            return cast(builder, source, kind)
        return _convert(builder, source, kind, rounding)

    def dot(builder, a, b, *rest):
        a, b = (_widened(x) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return _dot(builder, a, b, *rest)

    def casting(builder, source, kind, *_):
        return cast(builder, source, kind)

    casts = ("create_si_to_fp", "create_ui_to_fp", "create_fp_ext", "create_fp_trunc")
    repaired = {"cast_impl": cast, "create_fp_to_fp": convert, "create_dot": dot} | dict.fromkeys(casts, casting)
    for name, method in repaired.items():
        setattr(InterpreterBuilder, name, method)


def _widened(x):
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
