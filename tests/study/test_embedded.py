import dataclasses
import json
import shutil

import pytest

from gqa.config import parse_config
from gqa.errors import GqaError
from gqa.evaluate import evaluate, load_model
from gqa.study.corpus import from_corpus
from gqa.study.embedded import METADATA, SHIPPED, embedded_parent, stdlib_corpus
from gqa.text import load_tokenizer


def test_the_library_is_split_by_file_and_nothing_is_in_two_parts():
    corpus = stdlib_corpus()
    parts = (corpus.train, corpus.calibration, corpus.test)
    files = [path for part in parts for path in part]
    assert len(set(files)) == len(files)
    contents = [path.read_bytes() for path in files]
    assert len(set(contents)) == len(contents)
    assert not any({"test", "tests", "site-packages"} & set(path.parts) for path in files)
    sizes = [sum(path.stat().st_size for path in part) for part in parts]
    assert sizes[0] > 10 * sizes[1] / 2
    assert min(sizes) > 200_000


def test_the_split_does_not_depend_on_where_the_library_lies(tmp_path):
    names = [f"package/module_{i}.py" for i in range(60)]
    split = []
    for place in ("here", "there/deeper"):
        root = tmp_path / place
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(f"# {name}")
        (root / "copy.py").write_text("# package/module_1.py")  # a copy counts once
        (root / "empty.py").write_text("")
        corpus = stdlib_corpus(root)
        split.append([[path.relative_to(root) for path in part] for part in dataclasses.astuple(corpus)])
    assert split[0] == split[1]
    assert sum(map(len, split[0])) == 60


def test_a_python_without_sources_is_told(tmp_path):
    with pytest.raises(GqaError, match="sources are not on this machine"):
        stdlib_corpus(tmp_path)


def test_the_shipped_parent_is_an_ordinary_multi_head_model_that_has_learnt():
    parent = embedded_parent()
    config = json.loads((parent.folder / "config.json").read_text())
    assert parse_config(config, "parent").kv_heads == config["num_attention_heads"] == 8
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]  # for readers of transformers 4
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert sum(path.stat().st_size for path in parent.folder.iterdir()) < 32 << 20
    model = load_model(parent.folder)
    assert sum(p.numel() for p in model.parameters()) == parent.parameters
    tokenizer = load_tokenizer(parent.folder)
    text = "def ünknown(x):\n\treturn '日本'\n"  # byte level: what was never seen comes back too
    assert tokenizer.decode(tokenizer.encode(text)) == text
    test = from_corpus(dataclasses.replace(stdlib_corpus(), train=stdlib_corpus().test), parent.folder, 256).test[:8]
    loss = evaluate(model, test)["cross_entropy_nats_per_token"]
    assert loss == pytest.approx(parent.final_loss_nats, abs=0.7)  # the standard library's code is not all code


def test_the_facts_of_the_shipped_parent_name_no_path():
    text = (SHIPPED / METADATA).read_text()
    facts = json.loads(text)
    assert set(facts["sha256"]) == {path.name for path in SHIPPED.iterdir()} - {METADATA}
    assert facts["train_tokens"] <= facts["train_text_tokens"]  # every token at most once
    assert sum(row["files"] for row in facts["data"]["packages"].values()) > 1000
    losses = [row["loss_nats"] for row in facts["losses"]]
    assert losses[0] > losses[-1] + 1
    assert not [word for word in text.split('"') if word.startswith("/") or "\\" in word]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", METADATA])
def test_a_damaged_or_missing_file_is_one_clear_error(tmp_path, name):
    folder = tmp_path / "parent"
    shutil.copytree(SHIPPED, folder)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content if name != METADATA else content[:100])
    with pytest.raises(GqaError, match="damaged"):
        embedded_parent(folder)
    (folder / name).unlink()
    with pytest.raises(GqaError, match="damaged"):
        embedded_parent(folder)
