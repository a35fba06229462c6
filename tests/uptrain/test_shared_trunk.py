"""Parent and child on one copy of the model. Letters: B windows, T tokens, V entries of the vocabulary."""

import json

import pytest
import torch
from helpers.architectures import ROWS, TOKENS, VOCAB, tiny_model
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from gqa.config import child_config, parse_config
from gqa.evaluate import load_model
from gqa.source import open_checkpoint
from gqa.uptrain import shared_trunk
from gqa.uptrain.shared_trunk import SharedTrunk
from gqa.weights.layout import load_layout
from gqa.weights.reader import Checkpoint

B = 3


@pytest.fixture
def ids():
    return torch.randint(3, VOCAB, (B, TOKENS), generator=torch.Generator().manual_seed(1))


def trunk_of(folder, row, **how):
    """The parent beside a child whose attentions are random ones of the child's shapes, and those."""
    source, parent = open_checkpoint(str(folder)), Checkpoint(folder)
    layout = load_layout(row.model_type, source.config)
    child = parse_config(child_config(source.config, row.kv_heads), "child")
    generator = torch.Generator().manual_seed(2)
    attention = {
        name: torch.randn(shape, generator=generator) * 0.2
        for layer in range(len(child.layers))
        for name, shape in layout.attention_shapes(child, layer).items()
        if name in parent
    }
    how = {"half": False, "device": "cpu"} | how
    return SharedTrunk(parent, source.config, row.kv_heads, layout, attention, **how), attention


def saved(tmp_path, name):
    row = ROWS[name]
    model = tiny_model(row, **row.multi_head).float()
    model.save_pretrained(tmp_path / "parent")
    return tmp_path / "parent", row


@pytest.mark.parametrize("name", ROWS)
def test_parent_and_child_predict_as_models_of_their_own(tmp_path, name, ids):
    folder, row = saved(tmp_path, name)
    trunk, attention = trunk_of(folder, row)
    parent = load_model(folder)
    child_folder = tmp_path / "child"
    config = child_config(open_checkpoint(str(folder)).config, row.kv_heads)
    write_child(folder, child_folder, config, attention)
    child = load_model(child_folder)
    if row.attention == "eager":
        parent.set_attn_implementation("eager")
        child.set_attn_implementation("eager")
    with torch.no_grad():
        for model, which in ((parent, False), (child, True), (parent, False)):
            hidden = trunk.hidden(ids, child=which)
            got = torch.stack([trunk.logits(window) for window in hidden])
            torch.testing.assert_close(got, model(ids).logits, rtol=1e-4, atol=2e-4)


def write_child(folder, child_folder, config, attention):
    parent = Checkpoint(folder)
    child_folder.mkdir()
    (child_folder / "config.json").write_text(json.dumps(config))
    tensors = {name: attention[name] if name in attention else parent.read(name) for name in parent.names}
    save_file(tensors, child_folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_the_gradient_is_that_of_the_whole_kl_however_it_is_cut(tmp_path, ids, rows, monkeypatch):
    folder, row = saved(tmp_path, "llama")
    trunk, _ = trunk_of(folder, row)
    monkeypatch.setattr(shared_trunk, "_PIECE_NUMBERS", rows * VOCAB)
    entropy, kl = trunk.backward(None, ids, 0.5)
    got = [torch.clone(parameter.grad) for parameter in trunk.model.parameters() if parameter.grad is not None]
    trunk.model.zero_grad()
    with torch.no_grad():
        target = trunk.logits(trunk.hidden(ids, child=False).flatten(0, 1)).unflatten(0, ids.shape)
    own = trunk.logits(trunk.hidden(ids, child=True).flatten(0, 1)).unflatten(0, ids.shape)
    p, q = (log_softmax(x[:, :-1].flatten(0, 1), -1) for x in (target, own))
    whole = kl_div(q, p, reduction="batchmean", log_target=True)
    (whole / 2).backward()
    expected = [parameter.grad for parameter in trunk.model.parameters() if parameter.requires_grad]
    assert kl == pytest.approx(whole.item(), rel=1e-5)
    assert entropy == pytest.approx(cross_entropy(own[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item(), rel=1e-5)
    assert len(got) == len(expected) > 0
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_only_the_attentions_are_trained_and_only_they_are_there_twice(tmp_path):
    folder, row = saved(tmp_path, "qwen3")
    trunk, attention = trunk_of(folder, row, half=True)
    trained = {name for name, parameter in trunk.model.named_parameters() if parameter.requires_grad}
    assert all(".self_attn.child." in name for name in trained)
    assert trunk.attention().keys() == attention.keys()
    assert all(tensor.dtype == torch.float32 for tensor in trunk.attention().values())
    frozen = {name: p for name, p in trunk.model.named_parameters() if name not in trained}
    assert all(parameter.dtype == torch.bfloat16 for parameter in frozen.values())
    assert len(frozen) == len(Checkpoint(folder).names)


def test_activations_computed_again_give_the_same_gradients(tmp_path, ids):
    folder, row = saved(tmp_path, "llama")
    grads = []
    for again in (False, True):
        trunk, _ = trunk_of(folder, row, gradient_checkpointing=again)
        trunk.backward(None, ids, 1.0)
        grads.append([p.grad for p in trunk.model.parameters() if p.requires_grad])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
