"""The GPU benchmark's run: a process that is begun again, rows as time allows, tables. The GPU is a fake one."""

import json
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
from helpers.fake_cuda import FakeCuda, gpu_limits

from gqa.bench.kernels import OURS, ours, torch_enable_gqa
from gqa.bench.problem import Problem
from gqa.record import read_record

PROBLEMS = [
    Problem(8, 2, 16, 64),
    Problem(8, 8, 16, 64, dtype="int8"),
    Problem(8, 2, 16, 64, 64, dtype="fp32", backward=True),
]
LARGE = Problem(8, 2, 16, 128)


@pytest.fixture
def gpu(script) -> Any:
    return script("gpu")


@pytest.fixture
def small(gpu, monkeypatch):
    """gpu.py with tiny rows, and one peer, on a GPU on which we take a microsecond and the peer two."""
    cuda = FakeCuda(monkeypatch)
    cpu_ours = ours("reference")
    monkeypatch.setattr(gpu, "measure_gpu", lambda: gpu_limits(cuda))
    monkeypatch.setattr(gpu, "rows", lambda memory: (list(PROBLEMS), [LARGE]))
    peer = cuda.contender(torch_enable_gqa, 2e-6)
    monkeypatch.setattr(gpu, "peers", lambda: ({"torch flash": peer}, {"FlashInfer": "not installed"}))

    def contenders(problem, found, impl, *, compiled, paged):
        return {OURS: cuda.contender(cpu_ours, 1e-6), **found}

    monkeypatch.setattr(gpu, "contenders", contenders)
    monkeypatch.setattr("gqa.bench.document.commit", lambda: "0123456789ab")
    return gpu


def asked(path, **more) -> dict[str, Any]:
    common = {"out": str(path), "only": "", "impl": "auto", "repeats": 2, "budget": 1.0, "minutes": 9.0}
    common |= {"commit": "0123456789ab", "deadline": time.monotonic() + 1000, "skip": [], "tests": "7 passed"}
    return common | {"append": False} | more


def test_without_a_gpu_it_says_so_in_a_line(gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("error: device cuda is not available")


def test_rows_are_timed_and_written(small, tmp_path, capsys):
    path = tmp_path / "gpu.json"
    small.work(asked(path))
    record = read_record(path, "benchmark gpu")
    assert record.inputs["commit"] == "0123456789ab"
    assert record.results["machine"]["name"] == "NVIDIA H200"
    rows = record.results["attention"]
    assert [(row["contender"], row["status"]) for row in rows] == [
        (OURS, "timed"), ("torch flash", "timed"), (OURS, "timed"), ("torch flash", "unserved"),
        (OURS, "timed"), ("torch flash", "timed"),
    ]  # fmt: skip
    assert record.results["not_reached"] == record.results["crashed"] == []
    assert record.results["too_large"] == ["decode 8/2 D 16 S 128 batch 1 bf16"]
    floats = {name for row in rows for name, value in row.items() if isinstance(value, float)}
    assert floats <= set(record.basis)
    assert not small.row_file(path).exists()
    assert "1/3 decode 8/2 D 16 S 64 batch 1 bf16: 0.001 ms, " in capsys.readouterr().err
    printed = small.markdown(record)
    assert "NVIDIA H200, 132 multiprocessors" in printed
    assert "Absent: FlashInfer, not installed." in printed
    assert "Tests on this GPU: 7 passed." in printed
    assert "| 8/2 | 16 | 64 | 1 | bf16 | 1 µs | 8 | 0.00 | 0.00 | 0.00 | 2x |" in printed
    assert "| 8/2 | 16 | 64 | 1 | fp32 forward and backward | 1 µs | 4 | 0.01 | 2x |" in printed
    assert "Not reached" not in printed


def test_what_time_does_not_allow_is_named(small, tmp_path):
    path = tmp_path / "gpu.json"
    small.work(asked(path, deadline=time.monotonic() - 1))
    record = read_record(path)
    assert record.results["attention"] == []
    assert record.results["not_reached"] == [small.name_of(problem) for problem in PROBLEMS]
    assert "Not reached: decode 8/2 D 16 S 64 batch 1 bf16; " in small.markdown(record)
    small.work(asked(path, append=True, only="int8"))
    record = read_record(path)
    assert {row["dtype"] for row in record.results["attention"]} == {"int8"}
    assert record.results["not_reached"] == []


def test_a_row_that_ends_the_process_is_left_out_then(small, tmp_path, monkeypatch):
    path = tmp_path / "gpu.json"
    measure = small.measure

    def dies(problem, *args, **kwargs):
        if problem == PROBLEMS[1]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return measure(problem, *args, **kwargs)

    monkeypatch.setattr(small, "measure", dies)
    with pytest.raises(RuntimeError, match="illegal"):
        small.work(asked(path))
    name = small.row_file(path).read_text()
    assert name == small.name_of(PROBLEMS[1])
    first = read_record(path).results
    assert first["not_reached"] == [small.name_of(problem) for problem in PROBLEMS[1:]]
    small.work(asked(path, append=True, skip=[name]))
    results = read_record(path).results
    assert results["crashed"] == [name]
    assert results["not_reached"] == []
    assert results["attention"][:2] == first["attention"]
    assert [row["dtype"] for row in results["attention"]] == ["bf16", "bf16", "fp32", "fp32"]


def stand_in(gpu, monkeypatch, folder, body) -> list[dict[str, Any]]:
    """Puts a script in the place of the process that times; returns what each start was asked, filled as they come."""
    script, log = folder / "worker.py", folder / "log"
    script.write_text(
        "import json, pathlib, sys, time\n"
        "asked = json.loads(sys.argv[1])\n"
        f"log = pathlib.Path({str(log)!r})\n"
        "row = pathlib.Path(asked['out']).with_suffix('.row')\n"
        "with log.open('a') as lines: lines.write(sys.argv[1] + '\\n')\n" + body
    )
    monkeypatch.setattr(gpu, "WORKER", (sys.executable, str(script)))
    monkeypatch.setattr(gpu, "POLL", 0.01)
    return (
        [json.loads(line) for line in log.read_text().splitlines()] if gpu.supervise(asked(folder / "r.json")) else []
    )


def test_it_begins_again_behind_the_row_that_ended_it(gpu, tmp_path, monkeypatch, capsys):
    starts = stand_in(
        gpu,
        monkeypatch,
        tmp_path,
        "if len(asked['skip']) < 2:\n    row.write_text(f'row {len(asked[\"skip\"])}')\n    sys.exit(3)\n",
    )
    assert [start["skip"] for start in starts] == [[], ["row 0"], ["row 0", "row 1"]]
    assert [start["append"] for start in starts] == [False, True, True]
    assert "the process ended with 3 in row 0" in capsys.readouterr().err


def test_a_row_that_hangs_is_ended(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "STUCK", 0.05)
    starts = stand_in(
        gpu, monkeypatch, tmp_path, "if not asked['skip']:\n    row.write_text('slow')\n    time.sleep(60)\n"
    )
    assert [start["skip"] for start in starts] == [[], ["slow"]]
    assert "in slow" in capsys.readouterr().err


@pytest.mark.parametrize(
    "body", ["sys.exit(1)\n", "row.write_text('the same')\nsys.exit(1)\n"], ids=["no row", "always"]
)
def test_it_does_not_begin_for_ever(gpu, tmp_path, monkeypatch, body):
    monkeypatch.setattr(gpu, "MOST_STARTS", 2)
    assert stand_in(gpu, monkeypatch, tmp_path, body) == []


def test_the_deadline_ends_it(gpu, tmp_path, monkeypatch):
    (tmp_path / "sleeps.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(gpu, "POLL", 0.01)
    process = subprocess.Popen([sys.executable, str(tmp_path / "sleeps.py")])
    assert gpu._watch(process, tmp_path / "none", time.monotonic() + 0.05) < 0


@pytest.mark.parametrize(("body", "green"), [("assert True", True), ("assert False", False), ("sleep(60)", False)])
def test_the_tests_come_first(gpu, tmp_path, monkeypatch, capsys, body, green):
    folder = tmp_path / "tests/ops"
    folder.mkdir(parents=True)
    (folder / "test_triton_x.py").write_text(f"from time import sleep\ndef test_one():\n    {body}\n")
    (folder / "test_other.py").write_text("def test_two():\n    assert False\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "GPU_TESTS", ("tests/ops/test_triton*.py",))
    found, said = gpu.run_tests(2 if "sleep" in body else 60)
    assert found == green
    assert {True: "1 passed", False: "not done" if "sleep" in body else "1 failed"}[green] in said
    capsys.readouterr()


def test_all_of_it_in_one_command(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200 (fake)")
    monkeypatch.setattr(small, "RESULTS", tmp_path)
    monkeypatch.setattr(small, "run_tests", lambda limit: (False, "1 failed"))
    monkeypatch.setattr(small, "supervise", lambda asked: small.main(["--worker", json.dumps(asked)]) == 0)
    assert small.main(["--tests", "--repeats", "1", "--only", "decode"]) == 1  # as a test has failed
    printed = capsys.readouterr()
    record = read_record(tmp_path / "nvidia-h200-fake-gpu.json")
    assert record.results["tests"] == "1 failed"
    assert {row["query_tokens"] for row in record.results["attention"]} == {1}
    assert "Tests on this GPU: 1 failed." in printed.out
    assert small.main(["--append", "--repeats", "1"]) == 0
    assert len(read_record(tmp_path / "nvidia-h200-fake-gpu.json").results["attention"]) == 6
    capsys.readouterr()


def test_rows_cover_what_the_goals_name(script):
    rows = script("gpu_rows")
    ordered, large = rows.rows(141 * 10**9)
    assert len(ordered) == len(set(ordered))
    first = set(ordered[:8])
    assert {Problem(heads, 8, 128, 8192, batch=32) for heads in (64, 32)} <= first
    assert {Problem(heads, 8, 128, 32768) for heads in (64, 32)} <= first
    assert {Problem(32, n, 128, 32768, batch=16) for n in (32, 16, 8, 4, 2, 1)} <= set(ordered)
    for S in (4096, 16384):
        for heads in (32, 64):
            for dtype in ("bf16", "fp16"):
                found = [p for p in ordered if (p.query_tokens, p.query_heads, p.dtype) == (S, heads, dtype)]
                assert [(p.kv_heads, p.head_dim, p.backward) for p in found] == [(8, 128, False), (8, 128, True)]
    every = ordered + large
    for heads in ((64, 8), (32, 8), (28, 4), (24, 8), (32, 1), (32, 32)):
        for head_dim in (64, 128, 256):
            for batch in (1, 8, 64):
                for S in (1024, 8192, 32768, 131072):
                    assert Problem(*heads, head_dim, S, batch=batch) in every
    assert large
    assert min(p.kv_bytes for p in large) > 141e9 / 4 >= max(p.kv_bytes for p in ordered)
    smaller, _ = rows.rows(24 * 10**9)
    assert not [p for p in smaller if p.query_tokens == 16384]  # their check in float64 would not fit
    assert {(p.query_tokens, p.backward) for p in ordered if rows.compiled(p)} == {
        (1, False),
        (4096, False),
        (4096, True),
    }
    assert {p.dtype for p in ordered if rows.paged(p)} == {"bf16", "fp16", "int8", "fp32"}
