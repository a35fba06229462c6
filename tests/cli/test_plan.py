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
    assert "All layers slide" in out


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
        ([], "Missing argument 'MODEL'"),
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
        (["llama-3-70b", "--kv-dtype", "fp8"], "an unknown dtype"),
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
