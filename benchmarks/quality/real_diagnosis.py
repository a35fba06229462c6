"""What the closed form of svd loses in each layer, on the parent's own inputs, and how large its hidden states are.

Every layer reads what the parent's layer reads, so that no layer answers for another; nothing is refitted. Per token
the error is |y' - y|^2 / |y|^2, y the attention's output; by the sum of squares it is sum |y' - y|^2 / sum |y|^2, which
a few tokens with large outputs can decide alone.
"""

# N windows · T tokens of a window · d hidden size · H KV heads of the parent · r of them share one · G queries of each

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from real_bench import Bench, batch_of
from real_models import calibration_windows

from gqa.config import parse_config
from gqa.convert import grouping, heads
from gqa.convert.calibrate import second_moment
from gqa.convert.merge import svd
from gqa.weights.layout import Layout, load_layout
from gqa.weights.reader import Checkpoint

VARIANTS = ("keys", "values", "both")


@torch.inference_mode()
def diagnose(bench: Bench) -> dict[str, Any]:
    """Rows per layer. The second moments are those of the svd conversion's calibration text; errors and sizes are
    measured on test windows of prose."""
    asked = bench.asked
    shape = parse_config(bench.source.config, bench.source.name)
    layout = load_layout(shape.model_type, bench.source.config)
    parent = Layers(bench.parent, layout, len(shape.layers))
    fit = torch.from_numpy(calibration_windows(bench, asked.calibration))
    test = torch.from_numpy(bench.windows("prose", asked.window, asked.diagnosis_windows))
    checkpoint = Checkpoint(bench.folder)
    moments = _moments(parent, fit, checkpoint, layout)
    variants = []
    for layer, moment in enumerate(moments):
        weights = layout.read_attention(checkpoint, layer)
        own = heads.split(weights, shape.layers[layer], layout)
        shared = shared_heads(own, moment, asked.kv_heads)
        made = {"parent": own} | shared
        variants.append(
            {
                name: layout.attention_tensors(layer, heads.join(one, weights, shape.layers[layer], layout))
                for name, one in made.items()
            }
        )
    errors, sizes, hidden = _read(parent, test, variants)
    rows: list[dict[str, Any]] = []
    for layer in range(len(shape.layers)):
        row: dict[str, Any] = {"layer": layer, **_sizes(hidden[layer].reshape(test.shape).numpy())}
        for name in VARIANTS:
            wrong, size = torch.cat(errors[layer][name]), torch.cat(sizes[layer])
            share = wrong / size.clamp_min(1e-300)
            row |= {
                f"{name}_error_p50": share.quantile(0.5).item(),
                f"{name}_error_p90": share.quantile(0.9).item(),
                f"{name}_error_of_squares": (wrong.sum() / size.sum()).item(),
            }
        rows.append(row)
    return {"rows": rows, "fit_tokens": fit.numel(), "test_tokens": test.numel()}


def shared_heads(own: heads.Heads, moment: torch.Tensor, kv_heads: int) -> dict[str, heads.Heads]:
    """The parent's heads with keys, values or both shared by svd in `kv_heads` groups, written out again for each of
    the H KV heads, so that the parent's attention can run them."""
    generator = torch.Generator().manual_seed(0)
    groups = (
        grouping.search(own, moment, kv_heads, generator)
        if 1 < kv_heads < len(own.k)
        else grouping.contiguous(len(own.k), kv_heads)
    )
    back = np.argsort([head for group in groups for head in group]).tolist()
    parts: dict[str, list[heads.Heads]] = {name: [] for name in VARIANTS}
    for group in groups:
        mine = own.select(group)
        merged = svd(mine, moment, generator)
        keys: dict[str, Any] = {"q": merged.q.reshape(mine.q.shape), "k": merged.k.expand_as(mine.k)}
        if merged.q_norm is not None and mine.q_norm is not None:
            keys["q_norm"] = merged.q_norm.reshape(mine.q_norm.shape)
        if merged.k_norm is not None and mine.k_norm is not None:
            keys["k_norm"] = merged.k_norm.expand_as(mine.k_norm)
        values = {"v": merged.v.expand_as(mine.v), "o": merged.o.reshape(mine.o.shape)}
        for name, changed in (("keys", keys), ("values", values), ("both", keys | values)):
            parts[name].append(dataclasses.replace(mine, **changed))
    return {name: heads.together(of).select(back) for name, of in parts.items()}


class Layers:
    """The attentions of a loaded model, which can be watched and given other weights."""

    def __init__(self, model: Any, layout: Layout, count: int) -> None:
        self.model, self.layout = model, layout
        self.prefixes = [layout.layer_prefix(layer) for layer in range(count)]
        self.blocks = [model.get_submodule(layout.in_decoder(prefix).rstrip(".")) for prefix in self.prefixes]
        self.attentions = [block.get_submodule(layout.attention_path) for block in self.blocks]

    def put(self, layer: int, tensors: dict[str, torch.Tensor]) -> None:
        own = {name.removeprefix(self.prefixes[layer]): tensor for name, tensor in tensors.items()}
        unexpected = self.blocks[layer].load_state_dict(self.layout.as_module(own), strict=False).unexpected_keys
        assert not unexpected, unexpected

    def run(self, windows: torch.Tensor) -> None:
        for ids in windows.split(batch_of(windows.shape[1])):
            self.model(input_ids=ids.to(self.model.device), use_cache=False, logits_to_keep=1)


def _moments(parent: Layers, windows: torch.Tensor, checkpoint: Checkpoint, layout: Layout) -> list[torch.Tensor]:
    """E[x xT] of every attention's input."""
    biased = any(layout.read_attention(checkpoint, 0).__dict__.get(f"{name}_bias") is not None for name in "qkv")
    sums: dict[int, torch.Tensor] = {}
    tokens = windows.numel()

    def add(layer: int, hidden: torch.Tensor, given: dict[str, Any]) -> None:
        moment = second_moment(hidden, biased=biased) * (hidden.shape[0] * hidden.shape[1] / tokens)
        sums[layer] = sums[layer] + moment if layer in sums else moment

    with _watched(parent, add):
        parent.run(windows)
    return [sums[layer].cpu() for layer in range(len(parent.attentions))]


def _read(parent: Layers, windows: torch.Tensor, variants: list[dict[str, dict[str, torch.Tensor]]]):
    """Squared errors of each variant, squared sizes of the parent's output, and rms of the hidden states before each
    layer: per layer, in the windows' order."""
    count = len(parent.attentions)
    errors: list[dict[str, list[torch.Tensor]]] = [{name: [] for name in VARIANTS} for _ in range(count)]
    sizes: list[list[torch.Tensor]] = [[] for _ in range(count)]
    hidden: list[list[torch.Tensor]] = [[] for _ in range(count)]

    def compare(layer: int, inputs: torch.Tensor, given: dict[str, Any]) -> None:
        attend = parent.attentions[layer].forward  # past the hook that called this
        right = attend(inputs, **given)[0].double()
        sizes[layer].append(right.square().sum(-1).flatten().cpu())
        for name in VARIANTS:
            parent.put(layer, variants[layer][name])
            wrong = attend(inputs, **given)[0].double() - right
            errors[layer][name].append(wrong.square().sum(-1).flatten().cpu())
        parent.put(layer, variants[layer]["parent"])

    def size(layer: int, before: torch.Tensor) -> None:
        hidden[layer].append(before.double().square().mean(-1).sqrt().flatten().cpu())

    with _watched(parent, compare, size):
        parent.run(windows)
    return errors, sizes, [torch.cat(of) for of in hidden]


@contextlib.contextmanager
def _watched(parent: Layers, attention: Any, block: Any = None) -> Iterator[None]:
    """Call `attention(layer, its input, its other arguments)` and `block(layer, hidden states before it)`."""

    def before_attention(layer: int):
        def hook(module: Any, args: tuple, given: dict[str, Any]) -> None:
            rest = dict(given)
            hidden = args[0] if args else rest.pop("hidden_states")
            attention(layer, hidden, rest)

        return hook

    def before_block(layer: int):
        def hook(module: Any, args: tuple, given: dict[str, Any]) -> None:
            block(layer, args[0] if args else given["hidden_states"])

        return hook

    handles = [
        one.register_forward_pre_hook(before_attention(layer), with_kwargs=True)
        for layer, one in enumerate(parent.attentions)
    ]
    if block is not None:
        handles += [
            one.register_forward_pre_hook(before_block(layer), with_kwargs=True)
            for layer, one in enumerate(parent.blocks)
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sizes(rms: np.ndarray) -> dict[str, Any]:
    """Massive activations (Sun et al. 2024, arXiv 2402.17762): the largest hidden state beside the usual ones, and the
    place of the largest in its window. rms (N, T)."""
    places, counts = np.unique(rms.argmax(axis=1), return_counts=True)
    return {
        "hidden_rms_p50": float(np.quantile(rms, 0.5)),
        "hidden_rms_p90": float(np.quantile(rms, 0.9)),
        "hidden_rms_max": float(rms.max()),
        "largest_token_place": int(places[counts.argmax()]),
        "largest_token_place_share": float(counts.max() / len(rms)),
    }
