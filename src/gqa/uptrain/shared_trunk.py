"""Parent and child as one model: every layer holds both attentions, and everything else exists once.

Only the attentions of a converted model differ from its parent's. So one copy of the embeddings, norms, MLPs and head
serves both: a distillation takes the memory of one model, plus the child's attentions with their optimizer state.

Letters: B windows · T tokens of a window · d hidden size · V entries of the vocabulary · R rows of predictions.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gqa.config import child_config, parse_config, text_part
from gqa.errors import GqaError
from gqa.evaluate.load import load_model, quiet_transformers
from gqa.model.generate import use_attention
from gqa.uptrain.distill import rows_loss
from gqa.uptrain.loop import recompute_activations
from gqa.uptrain.teacher import arithmetic
from gqa.weights.layout import Layout
from gqa.weights.reader import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Logits in one piece of predictions: 64 MiB in float32.
_PIECE_NUMBERS = 1 << 24


class TwoAttentions(nn.Module):
    """The attention of the parent and the attention of the child, in the place of one; `runs` says which runs."""

    def __init__(self, parent: nn.Module, child: nn.Module) -> None:
        super().__init__()
        self.parent, self.child = parent, child
        self.runs = "parent"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.runs)(*args, **kwargs)


class SharedTrunk:
    """A distillation's objective (see `gqa.uptrain.loop.Objective`), KL(parent || child), on one copy of the model.

    `hidden(ids, child=...)` gives the last hidden states of parent or child, `logits(hidden)` their predictions.

    attention: the child's attention tensors by their names in the checkpoint; those that are not in it are the
    parent's. Everything but the child's attentions is frozen, in bf16 if `half`, else fp32; the child's attentions are
    fp32 and require gradients. Products run in bf16 if `half`; the residual stream stays in fp32.
    Raises GqaError for what `load_model` refuses.
    """

    def __init__(
        self,
        parent: Checkpoint,
        config: Mapping[str, Any],
        kv_heads: int,
        layout: Layout,
        attention: Mapping[str, Tensor],
        *,
        half: bool,
        device: str,
        gradient_checkpointing: bool = False,
    ) -> None:
        dtype = torch.bfloat16 if half else torch.float32
        model = load_model(parent.folder, dtype=dtype, device=device)
        model.requires_grad_(False)
        use_fast_attention(model, layout)
        implementation = str(model.config.get_text_config(decoder=True)._attn_implementation)
        child = _hollow_child(child_config(config, kv_heads), implementation)
        self.model, self.half, self.taught, self.layout = model, half, True, layout
        self.pairs: list[TwoAttentions] = []
        for layer in range(len(parse_config(config, layout.model_type).layers)):
            prefix = layout.layer_prefix(layer)
            path = layout.in_decoder(prefix).rstrip(".").partition(".")[2]  # within the decoder: layers.3
            within = prefix + layout.attention_path + "."
            own = {
                name.removeprefix(within): (attention[name] if name in attention else parent.read(name))
                for name in parent.names
                if name.startswith(within)
            }
            module = child.get_submodule(path).get_submodule(layout.attention_path)
            own = {name: tensor.to(device, torch.float32, copy=True) for name, tensor in own.items()}
            missing, unexpected = module.load_state_dict(own, strict=False, assign=True)
            assert not missing, f"the child's attention lacks {missing}"
            assert not unexpected or all(name.endswith("inv_freq") for name in unexpected), unexpected
            module.requires_grad_(True)
            block = model.get_decoder().get_submodule(path)
            pair = TwoAttentions(block.get_submodule(layout.attention_path), module)
            setattr(block, layout.attention_path, pair)
            if gradient_checkpointing:
                block.training = True  # the block alone: dropout within it stays off
            self.pairs.append(pair)
        if gradient_checkpointing:
            recompute_activations(model)
        self._head = _head_alone(model)

    def hidden(self, ids: Tensor, *, child: bool) -> Tensor:
        """Token ids (B, T) -> the hidden states that the head reads (B, T, d)."""
        for pair in self.pairs:
            pair.runs = "child" if child else "parent"
        embedded = self.model.get_input_embeddings()(ids).float()
        with arithmetic(ids.device, half=self.half):
            return self.model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (R, d) -> logits (R, V), with whatever scale or cap the model gives them."""
        with arithmetic(hidden.device, half=self.half):
            return self._head(inputs_embeds=hidden[None]).logits[0]

    def backward(self, places: object, ids: Tensor, scale: float) -> Tensor:
        """Add the gradients of `scale * KL(parent || child)`, a mean over the predicted tokens of windows ids (B, T);
        returns the child's cross-entropy and the KL (2,), in nats per token.

        Predictions are made and differentiated some rows at a time, so that memory does not grow with B * T * V.
        """
        with torch.no_grad():
            target = self.hidden(ids, child=False)[:, :-1].flatten(0, 1)
        own = self.hidden(ids, child=True)
        leaf = own[:, :-1].flatten(0, 1).detach().requires_grad_()
        following = ids[:, 1:].flatten()
        figures = leaf.new_zeros(2)
        for start in range(0, len(leaf), self.rows):
            piece = slice(start, start + self.rows)
            share = len(leaf[piece]) / len(leaf)
            with torch.no_grad():
                teacher = self.logits(target[piece])
            loss, entropy, kl = rows_loss(self.logits(leaf[piece]), following[piece], teacher, 1.0)
            (loss * share * scale).backward()
            assert kl is not None  # there is a teacher
            figures += torch.stack([entropy, kl]) * share
        assert leaf.grad is not None
        gradient = torch.zeros_like(own)
        gradient[:, :-1] = leaf.grad.unflatten(0, (len(ids), -1))
        own.backward(gradient)
        return figures

    def attention(self) -> dict[str, Tensor]:
        """The child's attention tensors, by their names in the checkpoint."""
        return {
            f"{self.layout.layer_prefix(layer)}{self.layout.attention_path}.{name}": tensor
            for layer, pair in enumerate(self.pairs)
            for name, tensor in pair.child.state_dict().items()
        }

    @property
    def rows(self) -> int:
        """Predictions per piece: about 64 MiB of logits."""
        return max(1, _PIECE_NUMBERS // self.model.config.get_text_config().vocab_size)


class _Given(nn.Module):
    """In the place of a decoder: returns the hidden states that it was given."""

    def forward(self, *ids: None, inputs_embeds: Tensor, **others: Any) -> _Output:
        return _Output(inputs_embeds)


class _Output:
    """A decoder's output that has hidden states and nothing else. The classes of transformers differ in the fields that
    they have, and a head reads those of its own; here every other field is None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor:
        assert index == 0
        return self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None


def _head_alone(model: PreTrainedModel) -> nn.Module:
    """What the model does behind its decoder: head, scale and cap, on the same tensors."""
    head = copy.copy(model)
    head._modules = {**model._modules, model.base_model_prefix: _Given()}
    return head


def _hollow_child(config: Mapping[str, Any], implementation: str) -> nn.Module:
    """The decoder that a child's config describes; no parameter takes memory yet."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(text_part(config))
    whole = AutoConfig.for_model(str(fields.pop("model_type")), **fields)
    with init_empty_weights(include_buffers=False), quiet_transformers():
        model = AutoModelForCausalLM.from_config(whole, attn_implementation=implementation)
    return model.eval().get_decoder()


def use_fast_attention(model: PreTrainedModel, layout: Layout) -> None:
    """Our own attention where the model can run it; else what the architecture needs."""
    with quiet_transformers():
        try:
            use_attention(model, "gqa")
        except GqaError:
            if not layout.eager:  # such a model was loaded with torch's attention, which is right for it
                return
            use_attention(model, "eager")
