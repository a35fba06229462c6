"""`gqa plan` as a user meets it."""

import json

import pytest

from gqa.cli.main import main


@pytest.fixture
def plan(capsys):
    """Runs `gqa plan ...` and gives (exit code, stdout, stderr)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as caught:
            main(["plan", *arguments])
        printed = capsys.readouterr()
        return caught.value.code, printed.out, printed.err

    return run


def test_json_of_the_issue(plan):
    code, out, err = plan(
        *("llama-3-70b", "--kv-heads", "64,8,1", "--context", "131072", "--batch", "1", "--kv-dtype", "fp16"),
        *("--device", "H200", "--weight-dtype", "int8", "--json"),
    )
    assert (code, err) == (0, "")
    settings = {setting["kv_heads"]: setting for setting in json.loads(out)["results"]["settings"]}
    assert list(settings) == [64, 8, 1]
    assert settings[8]["kv_bytes"] == 42_949_672_960
    assert settings[8]["kv_bytes_as_mha"] == 343_597_383_680
    assert set(settings[8]) >= {
        "kv_bytes_per_token",
        "attention_parameters",
        "kv_projection_parameters",
        "weight_bytes",
        "decode_seconds_bound",
        "max_concurrent_requests",
        "max_context",
        "queries_per_kv_head",
    }
    # 143,771 MiB * 0.9 - 70,553,706,496 bytes of int8 weights leave room for one cache of 40 GiB, not two.
    assert settings[8]["max_concurrent_requests"] == 1
    assert settings[64]["max_concurrent_requests"] == 0


def test_the_table(plan):
    code, out, err = plan("llama-3-70b", "--kv-heads", "64,8,1", "--context", "128k")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "Llama-3-70B: 80 layers, 64 query heads, 8 KV heads, head dim 128"
    assert lines[1] == "1 request of 131,072 tokens, bf16 cache"
    rows = {line.split()[0]: line for line in lines if line[:1].isdigit()}
    assert "40 GiB" in rows["8"]
    assert "8 *" in rows["8"]
    assert "320 GiB" in rows["64"]
    assert "*" not in rows["64"]
    assert "1/64" in rows["1"]
    assert "requests" not in lines[3]
    assert "predicted" in out
    assert "* the model as it is" in out


def test_columns_of_a_device(plan):
    code, out, _ = plan("llama-3-8b", "--device", "l4")
    assert code == 0
    header = next(line for line in out.splitlines() if line.startswith("KV heads"))
    assert all(title in header for title in ("decode at best", "requests", "longest context"))
    assert "23034 MiB, as the driver reports" in out


def test_nothing_fits_is_a_no(plan):
    code, out, err = plan("llama-3.1-405b", "--device", "T4")
    assert code == 1
    assert "KV heads" in out
    assert err.startswith("no setting fits")
    code, out, _ = plan("llama-3.1-405b", "--device", "T4", "--json")
    assert code == 1
    assert json.loads(out)["command"] == "plan"


def test_a_model_folder(plan, tmp_path):
    config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for model in (tmp_path, tmp_path / "config.json"):
        code, out, _ = plan(str(model))
        assert code == 0
        assert "8 KV heads" in out
        assert "unknown" in out  # the config tells no vocabulary, so no weights
    assert "8,192 tokens" in out


def test_latent_unlimited_and_unknown_are_said(plan):
    _, out, _ = plan("deepseek-v3")
    assert "latent *" in out
    assert "no KV-head dial" in out
    _, out, _ = plan("mistral-7b-v0.1", "--device", "L4")
    assert "no limit" in out
    assert "nothing that the model keeps grows" in out


def test_lists(plan):
    code, out, _ = plan("--models")
    assert code == 0
    assert "Llama-3-70B" in out.splitlines()
    code, out, _ = plan("--devices")
    assert code == 0
    assert "H100 SXM" in out.splitlines()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "which model?"),
        (["llama-3-70b", "--kv-heads", "12"], "12 KV heads do not divide 64 query heads"),
        (["llama-3-70b", "--kv-heads", "128"], "more than the 64 query heads"),
        (["llama-3-70b", "--kv-heads", "0"], "positive whole number"),
        (["llama-3-70b", "--kv-heads", "8,"], "--kv-heads is not understood"),
        (["llama-3-70b", "--kv-heads", "9" * 50], "--kv-heads is not understood"),
        (["llama-3-70b", "--context", "0"], "a token count is not understood"),
        (["llama-3-70b", "--context", "9" * 400], "a token count is not understood"),
        (["llama-3-70b", "--context", "9" * 15], "context is out of range"),
        (["llama-3-70b", "--batch", "0"], "--batch"),
        (["llama-3-70b", "--batch", "9" * 400], "batch is out of range"),
        (["llama-3-70b", "--device", "abacus"], "an unknown device"),
        (["llama-3-70b", "--kv-dtype", "fp7"], "an unknown dtype"),
        (["llama-3-70b", "--weight-dtype", ""], "an unknown dtype"),
        (["llama-3-70b", "--utilisation", "90"], "utilisation is a share"),
        (["llama-3-70b", "--utilisation", "nan"], "utilisation is a share"),
        (["deepseek-v3", "--kv-heads", "8"], "no KV heads to turn"),
        (["lama"], "an unknown model"),
        (["./nowhere"], "no such model folder"),
    ],
)
def test_wrong_questions_leave_2(plan, arguments, says):
    code, out, err = plan(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert says in err


def test_a_recommendation(plan):
    code, out, _ = plan("llama-2-7b", "--context", "4k", "--requests", "16", "--device", "L4")
    assert code == 0
    assert "Recommended: 8 KV heads" in out
    code, out, _ = plan("llama-2-7b", "--context", "4k", "--requests", "999", "--device", "L4")
    assert code == 1
    assert "No setting holds 999 requests" in out


def test_a_device_of_ones_own(plan):
    question = ("llama-3-8b", "--kv-heads", "8", "--context", "8k", "--json")
    code, out, _ = plan(*question, "--memory", "24GiB", "--bandwidth", "936GB/s", "--flops", "71TFLOP/s")
    assert code == 0
    device = json.loads(out)["results"]["device"]
    assert (device["memory_bytes"], device["bandwidth_bytes_per_second"]) == (24 * 2**30, 936e9)
    assert device["flops_per_second"] == 71e12
    code, out, _ = plan(*question, "--device", "L4", "--bandwidth", "600GB/s")
    assert json.loads(out)["results"]["device"]["bandwidth_bytes_per_second"] == 600e9
    assert json.loads(out)["results"]["device"]["name"] == "L4"
    # Without a rate nothing is bound by compute; JSON has no infinity.
    code, out, _ = plan(*question, "--memory", "24GiB", "--bandwidth", "936GB/s")
    assert json.loads(out)["results"]["device"]["flops_per_second"] is None
    assert json.loads(out)["results"]["settings"][0]["prefill_limit"] == "bandwidth"


def test_this_machine(plan):
    code, out, _ = plan("llama-3.2-1b", "--device", "this", "--json")
    assert code == 0
    device = json.loads(out)["results"]["device"]
    assert 1e9 < device["bandwidth_bytes_per_second"] < 1e13
    assert device["memory_bytes"] > 1e9
    assert device["name"].startswith("this machine")


def test_a_folder_tells_what_its_weights_take(plan, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_attention_heads=8, num_hidden_layers=2
    )
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path)
    stored = sum(tensor.nbytes for tensor in model.state_dict().values())
    _, out, _ = plan(str(tmp_path), "--json")
    rows = {row["kv_heads"]: row for row in json.loads(out)["results"]["settings"]}
    assert rows[8]["weight_bytes"] == stored
    # Two heads instead of eight leave a quarter of k and v: 2 layers * 2 matrices of 32 * 32 in 2 bytes.
    assert rows[2]["weight_bytes"] == stored - 2 * 2 * 32 * 32 * 2 * 3 // 4
    _, out, _ = plan(str(tmp_path), "--weights", "1MiB", "--kv-heads", "8", "--json")
    assert json.loads(out)["results"]["settings"][0]["weight_bytes"] == 2**20


def test_details_check_and_engines(plan):
    code, out, _ = plan("llama-3-8b", "--details", "--device", "H100 SXM", "--engine", "vllm", "--reserve", "5GiB")
    assert code == 0
    for words in ("attention core", "cache above weights from", "prefill at best", "FLOPs per token", "blocks of 16"):
        assert words in out
    code, out, _ = plan("--check")
    assert code == 0
    assert "logged figures of 36 cases agree." in out


def test_planning_loads_no_torch_and_is_quick():
    import subprocess
    import sys

    program = (
        "import sys; from gqa.cli.main import main\n"
        "try: main(['plan', 'llama-3-70b', '--device', 'H200', '--engine', 'vllm'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numba', 'triton', 'transformers', 'numpy'} & set(sys.modules)\n"
        "print('heavy', heavy)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy set()"


def test_a_log_is_asked_for_by_hand(plan):
    # vLLM issue 10517: 3.81 GiB for the cache hold 1950 blocks of 2 MiB, if it is 3.81 and no digit more; 1.56x.
    code, out, _ = plan("llama-3.1-8b", "--kv-heads", "8", "--engine", "vllm@0.6", "--cache-memory", "3.81GiB",
                        "--context", "20000")  # fmt: skip
    assert code == 0
    assert "1,950 blocks of 16, 31,200 tokens, 1.56x 20,000" in out
    # The same from the card's memory: 39.50 GiB * 0.9 - 14.96 - 9.47 GiB (vLLM issue 12330); no bandwidth, no bounds.
    code, out, _ = plan("llama-3-8b", "--kv-heads", "8", "--engine", "vllm@0.6", "--memory", "39.50GiB",
                        "--weights", "14.96GiB", "--reserve", "9.47GiB", "--context", "8192")  # fmt: skip
    assert code == 0
    assert "11.12 GiB for the cache, 5,693 blocks of 16" in out
    assert "No bandwidth is told" in out
    code, _, err = plan("llama-3-8b", "--bandwidth", "100GB/s")
    assert code == 2
    assert "needs its memory" in err


def test_a_gguf_file(plan, tmp_path, monkeypatch):
    from helpers.gguf_files import tiny_model, write_gguf

    monkeypatch.setenv("GQA_CACHE", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(), "Q4_0")
    code, out, err = plan(str(path))
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "tiny: 2 layers, 8 query heads, 2 KV heads, head dim 8"
    path.write_bytes(path.read_bytes()[:-50])
    code, out, err = plan(str(path))
    assert (code, out) == (2, "")
    assert err.startswith("error: tiny.gguf is truncated\n")
