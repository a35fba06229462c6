"""The CPU kernels among threads and processes: Python's threads, torch's, and a fork."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from ops.precision import assert_precise

import gqa
from gqa.ops.api import IMPLEMENTATIONS

pytestmark = pytest.mark.skipif("cpu" not in IMPLEMENTATIONS, reason="no CPU kernels in this release")


def random_call(seed, T, S):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(1, h, t, 64, generator=random) for h, t in ((6, T), (2, S), (2, S))]


@pytest.fixture
def torch_threads():
    """Sets torch's number of threads; what it was comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
def test_four_callers_at_once_get_what_each_gets_alone(threads, torch_threads):
    torch_threads(threads)
    shapes = [(1, 3000), (65, 200), (1, 100), (9, 1000)]
    calls = [random_call(seed, *shape) for seed, shape in enumerate(shapes)]
    want = [gqa.attention(*call, causal=True, impl="cpu") for call in calls]

    def many(index):
        torch.set_num_threads(threads)  # a setting of each thread, with OpenMP
        return [gqa.attention(*calls[index], causal=True, impl="cpu") for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        for index, outs in enumerate(pool.map(many, range(4))):
            for out in outs:
                torch.testing.assert_close(out, want[index], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 5000), (65, 111), (1, 7)], ids=["split keys", "prefill", "tiny"])
def test_any_number_of_threads_gives_the_result(shape, torch_threads):
    call = random_call(0, *shape)
    for threads in (1, 2, 4):
        torch_threads(threads)
        first, lse = gqa.attention(*call, causal=True, return_lse=True, impl="cpu")
        assert_precise(first, lse, *call, causal=True)
        assert torch.equal(gqa.attention(*call, causal=True, impl="cpu"), first), "the same call twice differs"


# The child sends its bits to the parent, for torch's own operators would hang in it: its threads stayed behind.
FORK = """
import os, sys, torch
import gqa

torch.set_num_threads(2)
torch.manual_seed(0)
call = [torch.randn(1, h, t, 64) for h, t in ((8, 1), (2, 5000), (2, 5000))]
compute = lambda: gqa.attention(*call, causal=True, impl="cpu")
if {before}:
    compute()
result, answer = os.pipe()
child = os.fork()
if child == 0:
    try:
        os.write(answer, compute().numpy().tobytes())
    except gqa.GqaError as error:
        os.write(answer, b"refused")
    sys.exit(0)
_, status = os.waitpid(child, 0)
assert status == 0, status
got = os.read(result, 1 << 16)
assert got in (b"refused", compute().numpy().tobytes())
print(len(got))
"""


@pytest.mark.parametrize("before", [True, False], ids=["after use", "before use"])
def test_a_forked_child_gets_an_answer_or_an_error(before):
    script = FORK.format(before=before)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() in (str(4 * 8 * 64), str(len("refused")))


# The last byte of every tensor lies at the end of a page, and the next page may not be read.
GUARDED = """
import ctypes, mmap, torch
import gqa

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
keep = []

def at_the_edge(x):
    pages = -(-x.nbytes // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(start + pages * mmap.PAGESIZE, mmap.PAGESIZE, 0) == 0
    keep.append(memory)
    offset = pages * mmap.PAGESIZE - x.nbytes
    view = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=offset).view(x.shape)
    return view.copy_(x)

for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for T in (1, 9):
        for S in (1, 63, 111):
            for D in (1, 60, 64, 100):
                call = [torch.randn(1, h, t, D).to(dtype) for h, t in ((3, T), (1, S), (1, S))]
                mask = torch.rand(T, S) > 0.2
                options = dict(causal=True, impl="cpu")
                want = gqa.attention(*call, mask=mask, **options)
                got = gqa.attention(*map(at_the_edge, call), mask=at_the_edge(mask), **options)
                assert torch.equal(got, want)
                if T == 1:
                    k, v = ((x.float() * 20).to(torch.int8) for x in call[1:])
                    scales = dict(k_scale=torch.rand(1, 1, S), v_scale=torch.rand(1, 1, S))
                    want = gqa.attention(call[0], k, v, **scales, **options)
                    edge = {name: at_the_edge(x) for name, x in scales.items()}
                    got = gqa.attention(*map(at_the_edge, (call[0], k, v)), **edge, **options)
                    assert torch.equal(got, want)
print("nothing read beyond")
import os; os._exit(0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect as Linux has it")
def test_nothing_is_read_beyond_the_tensors():
    run = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True, timeout=60)
    assert run.stdout == "nothing read beyond\n", f"exit {run.returncode} {run.stderr}"
