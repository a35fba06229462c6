import json
import os
import re
import signal
import subprocess
import sys

import pytest
from click.testing import CliRunner
from helpers.small import small_parent

from gqa.cli.generate import _summary, command
from gqa.errors import GqaError
from gqa.model.generate import Generation

PROMPT = "def f3(x):"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder, _ = small_parent(tmp_path_factory.mktemp("parent"))
    return str(folder)


def run(*arguments, stdin=None):
    return CliRunner().invoke(command, list(arguments), input=stdin, catch_exceptions=False, standalone_mode=False)


def results_of(*arguments, **options):
    return json.loads(run(*arguments, "--json", **options).stdout)["results"]


def test_text_on_stdout_and_what_it_took_on_stderr(model):
    result = run(model, PROMPT, "--max-tokens", "20")
    assert result.stdout == results_of(model, PROMPT, "--max-tokens", "20")["text"] + "\n"
    summary = r"6 prompt tokens in [\d.]+ m?s, 20 tokens at [\d.]+ tokens/s, KV cache 12.50 KiB"
    assert re.fullmatch(summary, result.stderr.splitlines()[-1])


def test_json_is_one_record(model):
    document = json.loads(run(model, PROMPT, "--max-tokens", "20", "--json").stdout)
    assert document["command"] == "generate"
    assert document["inputs"]["max_tokens"] == 20
    assert document["inputs"]["attention"] == "gqa"
    assert document["inputs"]["dtype"] == "float32"
    results = document["results"]
    assert (results["prompt_tokens"], results["new_tokens"], results["interrupted"]) == (6, 20, False)
    assert results["seconds_to_first_token"] > 0
    assert results["tokens_per_second"] > 0
    assert set(document["basis"]) == set(results) - {"text", "interrupted"}


def test_every_attention_and_cache_gives_the_same_text(model):
    texts = {
        results_of(model, PROMPT, "--max-tokens", "20", *options)["text"]
        for options in (
            (),
            ("--attention", "sdpa"),
            ("--attention", "eager"),
            ("--cache", "contiguous"),
            ("--cache", "paged"),
            ("--device", "cpu"),
            ("--dtype", "fp32"),
        )
    }
    assert len(texts) == 1


def test_the_summary_tells_a_gpu_s_peak_memory():
    on_gpu = Generation("text", 6, 20, 0.25, 80.0, 12 << 10, 3 << 20, interrupted=False)
    assert _summary(on_gpu).endswith("20 tokens at 80.0 tokens/s, KV cache 12 KiB, peak GPU memory 3 MiB")


def test_half_precision_halves_the_cache(model):
    for dtype in ("bf16", "fp16"):
        assert results_of(model, PROMPT, "--max-tokens", "20", "--dtype", dtype)["kv_cache_bytes"] == 6400


def test_a_prompt_from_standard_input(model):
    want = results_of(model, PROMPT, "--max-tokens", "8")
    got = results_of(model, "-", "--max-tokens", "8", stdin=PROMPT + "\n")
    assert (got["prompt_tokens"], got["text"]) == (want["prompt_tokens"], want["text"])
    assert run(model, "-", "--max-tokens", "2", stdin=PROMPT).stderr.startswith("6 prompt tokens")


def test_beyond_the_context_is_told(model):
    assert "context of 32 tokens" in run(model, PROMPT, "--max-tokens", "40").stderr
    assert "context" not in run(model, PROMPT, "--max-tokens", "26").stderr


def test_ctrl_c_ends_cleanly(model):
    """A real process with much to say is interrupted when its first words have come."""
    options = ["--max-tokens", "100k"]  # greedy: sampled, the text ends by itself after 189 tokens
    with subprocess.Popen(
        [sys.executable, "-m", "gqa", "generate", model, PROMPT, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        first = os.read(process.stdout.fileno(), 100)
        assert first
        process.send_signal(signal.SIGINT)
        rest, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert rest.endswith(b"\n")
    lines = said.decode().splitlines()
    assert re.match(r"6 prompt tokens in .*, \d+ tokens?", lines[-1])
    assert not any("Traceback" in line for line in lines)


def test_mistakes(model, tmp_path):
    for arguments, word in (
        ((str(tmp_path / "none"), PROMPT), "no such model folder"),
        (("llama-3-70b", PROMPT), "without weights"),
        ((model, ""), "no tokens"),
        ((model, PROMPT, "--max-tokens", "0"), "token count"),
        ((model, PROMPT, "--temperature", "-1"), "temperature"),
        ((model, PROMPT, "--top-p", "0.5"), "does not sample"),
        ((model, PROMPT, "--chat"), "no chat template"),
        ((model, PROMPT, "--device", "nowhere"), "no such device"),
        ((model, PROMPT, "--attention", "sdpa", "--cache", "int8"), "--cache int8 goes with --attention gqa"),
    ):
        with pytest.raises(GqaError, match=word):
            run(*arguments)


def test_help_begins_with_examples():
    lines = run("--help").stdout.splitlines()
    assert lines[0] == "Examples:"
    assert all("gqa generate" in line for line in lines[1:4])


def test_a_gguf_file_is_dequantised_once_and_its_progress_shown(tmp_path, monkeypatch):
    from helpers.gguf_files import tiny_model, write_gguf

    monkeypatch.setenv("GQA_CACHE", str(tmp_path / "cache"))
    path = str(write_gguf(tmp_path / "tiny.gguf", tiny_model(), "Q8_0"))
    first, again = (run(path, "he", "--max-tokens", "4", "--chat") for _ in range(2))
    assert first.stdout == again.stdout
    assert "dequantising tiny.gguf: 3/3" in first.stderr
    assert "dequantising" not in again.stderr
