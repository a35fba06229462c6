"""`gqa bench` as a user meets it, on shapes that take no time."""

import json
import os
from typing import Any

import pytest
import torch
from helpers.checkpoints import tiny_config, write_checkpoint
from helpers.fake_cuda import FakeCuda, gpu_limits
from helpers.small import small_parent

from gqa.bench import density as serving_density
from gqa.bench import machine, run, soak
from gqa.bench.alone import Difference
from gqa.bench.kernels import OURS, TORCH, ours
from gqa.cli.main import main

SMALL = ("--context", "63", "--repeats", "2", "--impl", "reference", "--device", "cpu")


@pytest.fixture(autouse=True)
def small_probes(monkeypatch):
    monkeypatch.setattr(machine, "READ_BYTES", 1 << 16)
    monkeypatch.setattr(machine, "MATRIX_SHAPES", ((32, 32, 32),))
    monkeypatch.setattr(machine, "REPEATS", 1)
    monkeypatch.setattr(machine, "last_level_cache_bytes", lambda: 1 << 14)


@pytest.fixture
def bench(capsys):
    """Runs `gqa bench ...` and gives (exit code, stdout, stderr)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as caught:
            main(["bench", *arguments])
        printed = capsys.readouterr()
        return caught.value.code, printed.out, printed.err

    return run


def read(out) -> dict[str, Any]:
    return json.loads(out)


def test_json_is_one_record(bench):
    code, out, err = bench("--heads", "8", "--head-dim", "16", "--dtype", "fp32", "--json", *SMALL)
    assert code == 0
    assert "attention: 4/4" in err
    document = read(out)
    assert document["command"] == "bench"
    assert document["inputs"]["context_tokens"] == 63
    assert set(document["inputs"]) >= {"commit", "device", "dtype", "impl", "repeats", "model", "layers"}
    assert {"torch", "numpy", "numba"} <= set(document["versions"])
    machine = document["results"]["machine"]
    assert machine["read_bytes_per_second"] > 0
    assert machine["fp32_flops_per_second"] > 0
    assert machine["threads"] >= 1
    rows = document["results"]["attention"]
    assert [(row["kv_heads"], row["contender"]) for row in rows] == [
        (kv_heads, name) for kv_heads in (8, 4, 2, 1) for name in (OURS, *TORCH)
    ]
    assert document["results"]["generation"] == []
    for row in rows:
        assert row["status"] == "timed"
        assert row["seconds_p20"] <= row["seconds_p50"] <= row["seconds_p80"]
        unexplained = [
            name
            for name, value in row.items()
            if isinstance(value, float) and document["basis"].get(name) not in ("measured", "predicted")
        ]
        assert not unexplained


def test_the_table(bench):
    code, out, _ = bench("--heads", "8/2", "--head-dim", "16", *SMALL)
    assert code == 0
    lines = out.splitlines()
    assert "GB/s" in lines[0]
    assert "(measured)" in lines[0]
    assert lines[2] == ("Attention of 8 query heads of 16, batch 1, bf16: one token per sequence, 63 keys (measured)")
    header, row, blank = lines[3:6]
    assert all(title in header for title in ("KV heads", "of roofline", "of limit", "torch enable_gqa", "torch folded"))
    assert row.startswith("2 ")
    assert "7.88 KiB" in row  # 63 keys * 2 heads * 2 * 16 * 2 bytes
    assert row.count("x") >= 2
    assert blank == ""
    assert sum(line.startswith("- ") for line in lines) == 3


def test_prefill_and_int8(bench):
    _, out, _ = bench("--heads", "4/2", "--head-dim", "16", "--prefill", "--json", *SMALL)
    rows = read(out)["results"]["attention"]
    assert {row["query_tokens"] for row in rows} == {63}
    assert [row["status"] for row in rows] == ["timed", "timed", "unserved"]
    _, out, _ = bench("--heads", "4/2", "--head-dim", "16", "--dtype", "int8", *SMALL)
    assert "unserved" in out
    assert "reference" in out


def test_an_implementation_that_cannot_serve_is_said(bench):
    code, out, _ = bench("--heads", "4/2", "--head-dim", "16", "--dtype", "int8", *SMALL, "--impl", "sdpa")
    assert code == 0
    assert "gqa at 2 KV heads is unserved:" in out


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that takes a nanosecond for everything."""
    cuda = FakeCuda(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cpu = run.measure_device
    monkeypatch.setattr(run, "measure_device", lambda device: gpu_limits(cuda) if device == "cuda" else cpu(device))
    monkeypatch.setattr(run.kernels, "TORCH", {"torch": cuda.contender(TORCH["torch enable_gqa"], 2e-9)})
    monkeypatch.setattr(run.kernels, "ours", lambda impl: cuda.contender(ours(impl), 1e-9))
    return cuda


def test_a_gpu_is_timed_where_there_is_one(bench, gpu):
    shape = ("--heads", "8/2", "--head-dim", "16", "--context", "63", "--repeats", "2", "--impl", "reference")
    code, out, _ = bench(*shape, "--json")
    assert code == 0
    assert read(out)["inputs"]["device"] == "cuda"
    code, out, _ = bench(*shape)
    lines = out.splitlines()
    assert lines[0] == (
        "NVIDIA H200, 132 multiprocessors: copies 4,000 GB/s, bytes read and written, reads 3,000 GB/s, multiplies"
        " matrices at bf16 500, fp16 500, fp32 50 TFLOP/s (measured)"
    )
    header, row = lines[3:5]
    assert header.split()[-8:] == ["GB/s", "of", "copy", "of", "datasheet", "of", "limit", "torch"]
    bandwidth = 63 * 2 * 2 * 16 * 2 / 1e-9 / 1e9  # GB/s
    assert row.split()[-5:] == [
        f"{bandwidth:,.0f}", f"{bandwidth / 4000:.0%}", f"{bandwidth / 4800:.0%}", f"{bandwidth / 4000:.0%}", "2.00x"
    ]  # fmt: skip
    code, out, _ = bench(*shape, "--prefill")
    header, row = out.splitlines()[3:5]
    assert "TFLOP/s" in header
    assert "of matrix" in header
    assert "GB/s" not in header
    assert bench(*shape, "--device", "cpu")[0] == 0  # the CPU can still be asked for


def test_a_gpu_that_is_not_there_is_named(bench, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = bench("--device", "cuda")
    assert (code, out) == (2, "")
    assert err.startswith("error: device cuda is not available")


def test_a_bundled_shape_has_kernel_rows_only(bench):
    code, out, err = bench("qwen2.5-0.5b", "--kv-heads", "2", "--json", *SMALL)
    assert code == 0
    rows = read(out)["results"]["attention"]
    assert {(row["query_heads"], row["kv_heads"], row["head_dim"], row["dtype"]) for row in rows} == {
        (14, 2, 64, "bf16")
    }
    assert read(out)["results"]["generation"] == []
    assert "no weights here" not in err  # a hint for readers of the table
    _, _, err = bench("qwen2.5-0.5b", "--kv-heads", "2", *SMALL)
    assert "gqa bench qwen2.5-0.5b --layers 4" in err


def test_a_folder_with_weights_runs_end_to_end(bench, tmp_path):
    folder = write_checkpoint(tmp_path / "model", tiny_config(num_key_value_heads=2))
    code, out, _ = bench(str(folder), "--kv-heads", "2", *SMALL)
    assert code == 0
    assert "A model of 3 layers, float32, batch 1 (measured)" in out
    assert "transformers default" in out
    assert "random" in out.split("A model of")[1]  # the keys and values are
    assert "weights are random" not in out


def test_layers_of_a_shape_with_random_weights(bench, tmp_path):
    write_checkpoint(tmp_path / "model")
    for weights in (tmp_path / "model").glob("*.safetensors"):
        weights.unlink()
    code, out, err = bench(
        str(tmp_path / "model"), "--kv-heads", "2", "--layers", "1", "--dtype", "bf16", "--json", *SMALL
    )
    assert code == 0
    assert "with random weights" in err
    document = read(out)
    rows = document["results"]["generation"]
    assert [(row["contender"], row["layers"], row["dtype"]) for row in rows] == [
        (OURS, 1, "bfloat16"),
        ("transformers default", 1, "bfloat16"),
    ]
    assert any("weights are random" in sentence for sentence in document["assumptions"])


SERVING = ("--memory", "100KiB", "--context", "20", "--repeats", "1", "--device", "cpu")


@pytest.fixture
def folder(tmp_path):
    return str(write_checkpoint(tmp_path / "model", tiny_config()))


def test_density_over_the_dial(bench, folder):
    code, out, err = bench(folder, "--kv-heads", "8,2", *SERVING, "--json")
    assert code == 0
    assert "decode: 1/1 2 KV heads" in err
    document = read(out)
    inputs, results = document["inputs"], document["results"]
    assert inputs["memory_bytes"] == 100 * 1024
    assert (inputs["model"], inputs["dtype"], inputs["kv_dtype"], inputs["block_tokens"]) == (
        "model",
        "fp32",
        "fp32",
        16,
    )
    token = 3 * (8 + 8) * 4  # layers, D + Dv, bytes; of one KV head
    assert [(row["kv_heads"], row["sequences_fit"]) for row in results["density"]] == [
        (heads, 100 * 1024 // (token * heads * 16) // 2) for heads in (8, 2)
    ]
    assert results["soak"] is None
    unexplained = [
        name
        for row in results["density"]
        for name, value in row.items()
        if isinstance(value, float) and document["basis"].get(name) not in ("measured", "predicted")
    ]
    assert not unexplained
    assert document["basis"]["sequences_fit"] == "measured"
    assert document["basis"]["sequences_predicted"] == "predicted"


def test_density_of_a_shape_without_weights_in_int8(bench, folder):
    os.remove(f"{folder}/model.safetensors")
    code, out, _ = bench(folder, "--layers", "1", "--kv-heads", "2", "--kv-dtype", "int8", "--block", "8", *SERVING)
    assert code == 0
    row = out.splitlines()[4].split()
    block = 8 * 2 * 2 * (8 + 4)  # tokens, K and V, KV heads, D and a scale
    assert row[:3] == ["2", *[str(100 * 1024 // block // 3)] * 2]
    _, out, _ = bench(folder, "--kv-heads", "2", *SERVING, "--soak", "0.1s")
    assert "with random weights (measured)" in out
    code, out, err = bench(folder, "--kv-heads", "2", *SERVING, "--memory", "1KiB")
    assert (code, out) == (2, "")
    assert "not even one block fits" in err


def test_a_soak_is_told_and_its_figures_have_a_basis(bench, folder, tmp_path):
    code, out, _ = bench(folder, "--kv-heads", "8", *SERVING, "--soak", "0.2s", "--seed", "3")
    assert code == 0
    lines = out.splitlines()
    assert any(line.startswith("Soak of ") and "(measured)" in line for line in lines)
    assert "- blocks free at the end: 4 of 4" in lines
    assert "passed" in lines
    _, out, _ = bench(folder, "--kv-heads", "8", *SERVING, "--soak", "0.2s", "--json")
    document = read(out)
    found = document["results"]["soak"]
    assert document["inputs"]["soak_random_weights"] is False
    assert found["passed"]
    assert not [name for name in found if name != "passed" and name not in document["basis"]]


def test_a_soak_of_a_text(bench, tmp_path):
    folder, corpus = small_parent(tmp_path)
    code, out, _ = bench(
        str(folder), "--kv-heads", "4", *SERVING, "--soak", "0.2s", "--text", str(corpus.test[0]), "--json"
    )
    assert code == 0
    assert read(out)["inputs"]["text"] == ["test.py"]
    code, _, err = bench("qwen2.5-0.5b", "--layers", "1", *SERVING, "--soak", "1s", "--text", str(corpus.test[0]))
    assert code == 2
    assert "need the model's tokenizer" in err


def test_what_the_plan_got_wrong_leaves_1(bench, folder, monkeypatch):
    monkeypatch.setattr(serving_density, "max_concurrent_requests", lambda *_: 3)
    code, out, _ = bench(folder, "--kv-heads", "8", *SERVING)
    assert code == 1
    assert out.splitlines()[4].split()[:3] == ["8", "3", "2"]


def test_a_soak_that_finds_something_leaves_1(bench, folder, monkeypatch):
    monkeypatch.setattr(soak, "differences", lambda model, sequence, int8: [Difference([1], 2, 3)])
    code, out, _ = bench(folder, "--kv-heads", "8", *SERVING, "--soak", "0.1s")
    assert "FAILED" in out
    assert code == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--memory", "1GiB"], "--memory goes with a MODEL"),
        (["llama-3-8b", "--memory", "1GiB", "--batch", "2", "--prefill"], "--batch, --prefill"),
        (["llama-3-8b", "--soak", "60m", "--kv-dtype", "int8"], "needs a memory to fill"),
        (["llama-3-8b", "--memory", "1GiB", "--soak", "an hour"], "a duration is not understood"),
        (["llama-3-8b", "--memory", "much"], "a size is not understood"),
        (["llama-3-8b", "--memory", "1GiB", "--kv-dtype", "fp8"], "as the model gives them, or in int8"),
        (["llama-3-8b", "--memory", "1GiB", "--text", "corpus.txt"], "--text is for prompts of a soak"),
        (["llama-3-8b", "--memory", "1GiB", "--dtype", "int8"], "fp32, bf16 or fp16"),
    ],
)
def test_wrong_questions_about_serving_leave_2(bench, arguments, says):
    code, out, err = bench(*arguments)
    assert (code, out) == (2, "")
    assert "error: " in err
    assert says in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--heads", "8/3"], "3 KV heads do not divide 8 query heads"),
        (["--heads", "many"], "--heads is not understood"),
        (["--heads", "0"], "--heads is not understood"),
        (["--heads", "8/2", "--kv-heads", "2"], "given twice"),
        (["--head-dim", "0"], "head_dim must be positive"),
        (["--context", "0"], "a token count is not understood"),
        (["--dtype", "fp8"], "an unknown dtype"),
        (["--device", "tpu"], "an unknown device"),
        (["--layers", "2"], "--layers goes with a MODEL"),
        (["llama-3-8b", "--heads", "8"], "MODEL gives the heads"),
        (["llama-3-8b", "--kv-heads", "3"], "3 KV heads do not divide 32 query heads"),
        (["llama-3-8b", "--layers", "33"], "has 32 layers"),
        (["llama-3-8b", "--layers", "1", "--dtype", "int8"], "fp32, bf16 or fp16"),
        (["deepseek-v3"], "latent attention"),
        (["lama"], "an unknown model"),
    ],
)
def test_wrong_questions_leave_2(bench, arguments, says):
    code, out, err = bench(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert says in err
