"""Calibration text passes through a model one decoder block at a time: only that block's weights are in memory.

The blocks are transformers' own, built with a single layer and without weights, so that norms, rotary embeddings,
masks and windows are exactly those of the model that will be served.

Letters: N windows · T tokens per window · d hidden size · E = d, or d + 1 with a bias column.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gqa.config import LayerShape
from gqa.config.parse import LAYERS
from gqa.convert.scores import Positions
from gqa.convert.states import States
from gqa.errors import GqaError

# Windows per forward pass: enough to fill two cores, small enough for any hidden size.
BATCH = 8


class _SeenError(Exception):
    """Leaves a forward pass once what was wanted has been seen."""


class Block:
    """Decoder block `layer` of the model that `config` (a raw config.json) describes, with these weights, on their
    device.

    `tensors` are the block's, named as in the checkpoint without the layer's prefix
    (`self_attn.q_proj.weight`); `layer_path` and `attention_path` say where block and attention sit; `eager` that
    torch's own attention is not enough for this architecture.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        layer: int,
        tensors: Mapping[str, Tensor],
        *,
        layer_path: str,
        attention_path: str,
        output_path: str,
        dtype: torch.dtype,
        eager: bool = False,
    ) -> None:
        device = next(iter(tensors.values())).device
        model = _hollow_model(config, layer, dtype, device, "eager" if eager else "sdpa")
        self.model: nn.Module = model
        self.decoder: nn.Module = model.base_model
        self.block: nn.Module = model.get_submodule(layer_path)
        self.attention: nn.Module = self.block.get_submodule(attention_path)
        output = self.block.get_submodule(output_path)
        assert isinstance(output, nn.Linear)
        self.output = output
        self._frames: dict[tuple[int, ...], tuple[tuple, dict[str, Any]]] = {}
        self._arguments: dict[tuple[int, ...], dict[str, Any]] = {}
        missing, unexpected = self.block.load_state_dict(
            {name: tensor.to(dtype) for name, tensor in tensors.items()}, strict=False, assign=True
        )
        assert not missing, f"the checkpoint's block lacks {missing}"
        assert not unexpected or all(name.endswith("inv_freq") for name in unexpected), unexpected

    @torch.no_grad()
    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states before the block -> after it: (N, T, d) -> (N, T, d)."""
        return torch.cat([self._run(batch) for batch in hidden.split(BATCH)])

    @torch.no_grad()
    def attention_input(self, hidden: Tensor) -> Tensor:
        """Hidden states before the block -> what its attention is given, after the norm: (N, T, d) -> (N, T, d)."""
        return torch.cat([_caught(self.attention, self._run, batch)[0] for batch in hidden.split(BATCH)])

    def attend(self, inputs: Tensor) -> Tensor:
        """The attention alone: (n, T, d) -> (n, T, d), with gradients where the caller wants them."""
        return self.attention(inputs, **self._arguments_of(inputs))[0]

    @torch.no_grad()
    def next_token_losses(self, others: Mapping[str, Tensor], hidden: States, windows: np.ndarray) -> Tensor:
        """Mean cross-entropy of every window's next tokens (N,), in nats, from the hidden states behind the last
        block. others: the tensors that are in no block, named as the model has them: final norm, head, embeddings."""
        dtype = hidden[:1].dtype
        self.model.load_state_dict({name: t.to(dtype) for name, t in others.items()}, strict=False, assign=True)
        self.model.tie_weights()  # type: ignore[operator]
        after: list[Tensor] = []

        def replace(block: nn.Module, args: tuple, output: Any) -> Any:
            return (after[-1], *output[1:]) if isinstance(output, tuple) else after[-1]

        handle = self.block.register_forward_hook(replace)
        losses = []
        try:
            tokens = torch.from_numpy(np.asarray(windows)).to(hidden[:1].device)
            for ids, batch in zip(tokens.split(1), hidden.split(1), strict=True):
                after.append(batch)
                logits = self.model(inputs_embeds=batch, use_cache=False).logits[0, :-1].float()
                losses.append(nn.functional.cross_entropy(logits, ids[0, 1:]))
                after.clear()
        finally:
            handle.remove()
        return torch.stack(losses).double()

    def positions(self, inputs: Tensor, shape: LayerShape) -> Positions:
        """Rotary turns, visible keys and scale of this attention, for windows like `inputs` (n, T, d)."""
        arguments = self._arguments_of(inputs[:1])
        T = inputs.shape[1]
        pairs = (shape.head_dim if shape.rotary_dim is None else shape.rotary_dim) // 2
        turns = torch.ones(T, pairs, dtype=inputs.dtype.to_complex(), device=inputs.device)
        if pairs:
            turns = torch.complex(*(_angles(part[0], pairs) for part in arguments["position_embeddings"]))
        visible = torch.ones(T, T, dtype=torch.bool, device=inputs.device).tril()
        mask = arguments["attention_mask"]
        if mask is not None:  # without one, sdpa is told to be causal
            visible = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0
        return Positions(
            turns.to(inputs.dtype.to_complex()),
            visible,
            getattr(self.attention, "scaling", shape.head_dim**-0.5),
            getattr(self.attention, "attn_logit_softcapping", None),
        )

    def _arguments_of(self, inputs: Tensor) -> dict[str, Any]:
        size = (inputs.shape[0], inputs.shape[1])
        if size not in self._arguments:  # masks and rotary angles depend on the batch's size alone
            with torch.no_grad():
                self._arguments[size] = _caught(self.attention, self._run, torch.zeros_like(inputs))[2]
        return self._arguments[size]

    def _run(self, hidden: Tensor) -> Tensor:
        """The block's output, given what the decoder gives it beside its input."""
        size = (hidden.shape[0], hidden.shape[1])
        if size not in self._frames:
            decoder = functools.partial(self.decoder, use_cache=False)
            self._frames[size] = _caught(self.block, decoder, inputs_embeds=torch.zeros_like(hidden))[1:]
        args, kwargs = self._frames[size]
        output = self.block(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def first_hidden(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    windows: np.ndarray,
    *,
    layer_path: str,
    dtype: torch.dtype,
) -> Tensor:
    """Hidden states before the first block: token ids (N, T) -> (N, T, d), scaled and with positions where the model
    has them. tensors: the embeddings, named as in the checkpoint."""
    device = next(iter(tensors.values())).device
    model = _hollow_model(config, 0, dtype, device, "eager")
    embeddings = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    unexpected = model.load_state_dict(embeddings, strict=False, assign=True).unexpected_keys
    assert not unexpected, f"the model has no {unexpected}"
    decoder = functools.partial(model.base_model, use_cache=False)
    block = model.get_submodule(layer_path)
    tokens = torch.from_numpy(np.asarray(windows)).to(device)
    return torch.cat([_caught(block, decoder, input_ids=batch)[0] for batch in tokens.split(BATCH)])


@contextlib.contextmanager
def _told_of_the_config() -> Iterator[None]:
    """What transformers and torch say of a configuration whose values make no sense to them, as the one error."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        raise GqaError(
            "transformers makes no model of this config",
            got=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            allowed="values as the architecture's configuration class takes them",
        ) from None


@_told_of_the_config()
def _hollow_model(
    config: Mapping[str, Any], layer: int, dtype: torch.dtype, device: torch.device, attention: str = "sdpa"
) -> Any:
    """The model with block `layer` alone, in the place of the first; no parameter takes memory yet, and buffers lie
    on the device."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(config)
    whole = AutoConfig.for_model(str(fields.pop("model_type")), **fields)
    # Layers may differ (sliding windows): the single layer that is built must be of this layer's kind.
    kinds = getattr(whole, "layer_types", None)
    single = {key: value for key, value in config.items() if key not in LAYERS} | {"num_hidden_layers": 1}
    single |= {"layer_types": [kinds[layer]]} if kinds else {}
    single_config = AutoConfig.for_model(str(single.pop("model_type")), **single)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(single_config, attn_implementation=attention, dtype=dtype)
    model.eval()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    for module in model.base_model.children():
        if isinstance(module, nn.Embedding) and module is not model.get_input_embeddings():
            # Learned positions are added to whatever the decoder is given.
            module.weight = nn.Parameter(
                torch.zeros(module.weight.shape, dtype=dtype, device=device), requires_grad=False
            )
    return model


def _caught(module: nn.Module, run: Callable[..., object], *args: Any, **kwargs: Any) -> tuple[Tensor, tuple, dict]:
    """What `module` is given while `run` runs, which ends there: its input, its other arguments, its keywords."""
    seen: list[tuple[Tensor, tuple, dict[str, Any]]] = []

    def catch(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        first, *others = args if args else (kwargs.pop("hidden_states"),)
        seen.append((first, tuple(others), kwargs))
        raise _SeenError

    handle = module.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        run(*args, **kwargs)
    except _SeenError:
        return seen[0]
    finally:
        handle.remove()
    raise AssertionError("the decoder never reached the module")


def _angles(part: Tensor, pairs: int) -> Tensor:
    """Cosines or sines (T, F) out of what models hold: (T, F), twice side by side (T, 2F), or each twice (T, 2F)."""
    if part.shape[-1] == 2 * pairs:
        return part[:, ::2] if torch.equal(part[:, ::2], part[:, 1::2]) else part[:, :pairs]
    return part


def hidden_errors(parent: States, child: States) -> dict[str, float]:
    """|h' - h|^2 / |h|^2 of every token, with h (N, T, d) the parent's hidden states and h' the child's, as
    `hidden_error`, its mean over all tokens, and `hidden_error_median` and `hidden_error_p90`.

    In models with massive activations a few tokens, of which later ones see no more than the direction, can make up
    most of the mean.
    """
    parts = []
    for before, own in zip(parent.split(BATCH), child.split(BATCH), strict=True):
        wrong, size = (own - before).double().square().sum(-1), before.double().square().sum(-1)
        parts.append((wrong / size.clamp_min(1e-300)).flatten().cpu().numpy())
    errors = np.concatenate(parts)
    median, p90 = np.quantile(errors, (0.5, 0.9))
    return {
        "hidden_error": float(errors.mean()),
        "hidden_error_median": float(median),
        "hidden_error_p90": float(p90),
    }


def token_weights(parent: States, child: States) -> Tensor:
    """What each token's squared error counts in a fit, (N, T) in float32 with a mean of 1: 1 / max(s, 4 median(s)) with
    s = |h|^2 + |h' - h|^2, h (N, T, d) the parent's hidden states before the layer and h' the child's.

    Some models give a few tokens, most often the first of a window, hidden states hundreds of times larger than all
    others' (massive activations: Sun et al. 2024, arXiv 2402.17762). A plain sum of squares belongs to those tokens,
    and to tokens that an error before this layer has made massive in the child alone; a fit to them spoils all others.
    Tokens up to twice the median length count the same: weights of 1 / s for all of them cost SmolLM2 a tenth of its
    loss (docs/LOG.md).
    """
    sizes = torch.cat(
        [
            before.float().square().sum(-1) + (own - before).float().square().sum(-1)
            for before, own in zip(parent.split(BATCH), child.split(BATCH), strict=True)
        ]
    )
    weights = 1 / sizes.clamp_min(4 * float(sizes.median())).clamp_min(1e-30)
    return weights / weights.mean()


def second_moment(inputs: States, *, biased: bool) -> Tensor:
    """E[x xT] in float64 over all tokens: (N, T, d) -> (E, E); with biases x has a last entry of 1."""
    count, d = inputs.shape[0] * inputs.shape[1], inputs.shape[-1]
    moment = torch.zeros(d + biased, d + biased, dtype=torch.float64, device=inputs[:1].device)
    for batch in inputs.split(BATCH):
        rows = batch.reshape(-1, d).double()
        if biased:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        moment += rows.T @ rows
    return moment / count
