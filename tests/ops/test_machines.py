"""The CPU kernels on machines that this one is not: other widths of vectors, and an Arm processor's instructions."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ops.aarch64 import assembly, inner_loops

from gqa.ops.api import IMPLEMENTATIONS

pytestmark = pytest.mark.skipif("cpu" not in IMPLEMENTATIONS, reason="no CPU kernels in this release")
HERE = Path(__file__).parent


def python(script, *arguments, **environment):
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=os.environ | environment)


CORE = """
import sys, pytest
from gqa.ops import simd
assert simd.WIDTH == int(sys.argv[1]), simd.WIDTH
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""
# One dtype of two bytes, and int8 with one dtype of queries: each costs a compilation per width.
CHOSEN = "core and not fp16 and not (bf16 and (int8 or gradients))"


@pytest.mark.parametrize("width", ["4", "8", "16"])
def test_any_width_of_vectors(width):
    """4: SSE and NEON; 8: AVX2; 16: AVX-512. LLVM makes several registers of a vector that the machine lacks."""
    files = [str(HERE / name) for name in ("test_cpu.py", "test_cpu_gradients.py")]
    run = python(CORE, width, "-k", CHOSEN, *files, GQA_SIMD_WIDTH=width)
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed
    assert int(passed[1]) > 70


@pytest.mark.parametrize("width", ["3", "", "32"])
def test_other_widths_are_refused(width):
    run = python("import gqa.ops.simd", GQA_SIMD_WIDTH=width)
    assert run.returncode != 0
    assert "GQA_SIMD_WIDTH" in run.stderr


# For a plain x86 (Numba cannot link fp16 without its conversions), so that nothing of this machine is in the IR;
# 32 registers are NEON's.
IR = """
import json
from numba import cfunc, types
from gqa.ops import simd

simd.REGISTERS = 32
from gqa.ops import cpu_backward, cpu_forward, tiles

def ir(function, *arguments):
    return cfunc(types.void(*arguments))(function).inspect_llvm()

def stage(kind):
    def copy(source, columns, target, factor):
        tiles.stage_row(kind, source, columns, target, factor)
    return ir(copy, types.int64, types.int64, types.int64, types.float32)

kernels = {
    "forward": ir(cpu_forward.entry("", simd.FP32, simd.FP32), types.voidptr),
    "backward": ir(cpu_backward.entry("", simd.FP32), types.voidptr),
}
print(json.dumps(kernels | {kind.name: stage(kind) for kind in (simd.BF16, simd.FP16, simd.INT8)}))
"""


@pytest.fixture(scope="module")
def kernels():
    """IR by name: the forward kernel, and the conversion of rows by the kind of number they hold."""
    run = python(IR, GQA_SIMD_WIDTH="4", NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="+f16c")
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_the_ir_names_no_machine(kernels):
    for name, ir in kernels.items():
        assert "<4 x float>" in ir, name
        intrinsics = set(re.findall(r"@llvm\.(\w+)", ir))
        assert not intrinsics & {"x86", "aarch64", "arm"}, name


def multiply_adds(loop):
    return len(re.findall(r"\tfmla\tv\d+\.4s, ", loop))


@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_products_are_neon_multiply_adds_in_registers(kernel, kernels):
    loops = inner_loops(assembly(kernels[kernel]))
    # Scores and sums, each in tiles of several shapes, and the lanes shared by few rows; exponentials convert.
    products = [loop for loop in loops if multiply_adds(loop) >= 8 and "\tfcvt" not in loop]
    assert len(products) >= 6
    for loop in products:
        assert not re.search(r"\tblr?\t", loop), "a call:\n" + loop
        assert not re.search(r"\tf(madd|mul|add)\ts", loop), "scalar arithmetic:\n" + loop
        assert 4 * loop.count("[sp") <= multiply_adds(loop), "sums that live in memory:\n" + loop
    for loop in loops:
        assert "\tfmadd\t" not in loop, "a scalar multiply-add:\n" + loop


def test_the_softmax_is_vectors_too(kernels):
    """exp2: a polynomial of degree 6, and an integer for the power of two."""
    loops = inner_loops(assembly(kernels["forward"]))
    exponentials = [loop for loop in loops if re.search(r"\tfcvt[a-z]*\tv\d+\.4s, ", loop)]
    assert exponentials
    for loop in exponentials:
        assert multiply_adds(loop) >= 6
        assert not re.search(r"\tbl\t", loop)


@pytest.mark.parametrize(("kind", "conversion"), [("bf16", "u?shll"), ("fp16", "fcvtl"), ("int8", "scvtf")])
def test_rows_are_converted_four_at_a_time(kind, conversion, kernels):
    loops = inner_loops(assembly(kernels[kind]))
    assert any(re.search(rf"\t{conversion}2?\tv\d+\.4s, ", loop) for loop in loops), loops


def test_inner_loops_of_a_nest():
    text = ".Lout:\n\tmov\tx0, x1\n.Lin:\n\tfadd\ts0, s0, s1\n\tb.ne\t.Lin\n\tcbnz\tx0, .Lout\n\tb\t.Lafter\n.Lafter:"
    assert inner_loops(text) == [".Lin:\n\tfadd\ts0, s0, s1\n\tb.ne\t.Lin"]
