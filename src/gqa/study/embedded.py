"""The embedded default: a small multi-head Llama, trained on the spot on text that every Python has.

The text is the source of Python's standard library, split by file, so that no test file is ever seen in training or
calibration. The model is trained once per machine and kept in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gqa.errors import GqaError
from gqa.progress import Progress, silent
from gqa.record import write_text_atomic
from gqa.source import write_legacy_keys
from gqa.storage import cache_folder, publish
from gqa.text import read_text

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Not the library's own prose or code: other people's packages, tests, tables (code pages, help topics) and files
# that an installation generates. A part of them exists in some Pythons only, and none of them is typical source text.
_LEFT_OUT = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "ensurepip",
    "idle_test",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
_GENERATED = ("_sysconfigdata", "sitecustomize", "_sysconfig_vars")
_END_OF_TEXT = "<|endoftext|>"
METADATA = "gqa_training.json"
FORMAT = 1  # part of the cache's key: raise it when the same recipe would give another model


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Files of the standard library, sorted; a file belongs to exactly one of the three parts."""

    train: tuple[Path, ...]
    calibration: tuple[Path, ...]
    test: tuple[Path, ...]


@dataclasses.dataclass(frozen=True)
class EmbeddedRecipe:
    """All numbers that decide the embedded parent. Defaults: about 3.5 minutes on 2 cores.

    attention_learning_rate is below what is best for the parent alone, so that attention learns less than it could:
    at 0.02 the parent is better and its children lose more. docs/LOG.md has the figures of both.

    model_type and kv_heads (0: as many as query heads) make parents of other kinds, for comparison: qwen3 has a norm
    of every query and key head, and biases here.
    """

    vocabulary: int = 2048
    hidden: int = 256
    intermediate: int = 512
    layers: int = 6
    heads: int = 8
    model_type: Literal["llama", "qwen3"] = "llama"
    kv_heads: int = 0
    window: int = 256
    batch: int = 8
    steps: int = 300
    matrix_learning_rate: float = 0.02
    attention_learning_rate: float = 0.006
    learning_rate: float = 5e-3
    warmup_steps: int = 20
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    seed: int = 0
    checkpoint_steps: int = 50


@dataclasses.dataclass(frozen=True)
class EmbeddedParent:
    """A trained parent: a transformers folder with its tokenizer, and what it took to train it."""

    folder: Path
    parameters: int
    train_tokens: int
    train_seconds: float
    final_loss_nats: float


def stdlib_corpus(root: Path | None = None) -> Corpus:
    """The running interpreter's standard library (`root` for another folder), split by file: 84 % train,
    8 % calibration, 8 % test.

    A file's part follows from a hash of its path relative to the library, so the split is the same on every machine.
    Copies of the same content count once, in the part of the first one. Raises GqaError if there are too few files.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    parts: dict[str, list[Path]] = {"train": [], "calibration": [], "test": []}
    seen: set[bytes] = set()
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if _LEFT_OUT.intersection(relative.parts) or relative.name.startswith(_GENERATED):
            continue
        content = path.read_bytes()
        digest = hashlib.sha256(content).digest()
        if digest in seen or not _is_text(content):
            continue
        seen.add(digest)
        draw = int.from_bytes(hashlib.sha256(relative.as_posix().encode()).digest()[:8], "big") % 100
        parts["test" if draw < 8 else "calibration" if draw < 16 else "train"].append(path)
    if not all(parts.values()):
        raise GqaError(
            "the standard library's sources are not on this machine",
            got=f"{sum(map(len, parts.values()))} .py files in {root}",
            hint="use a Python with its library as files, or study a model of your own: gqa study MODEL --text FILE",
        )
    return Corpus(**{name: tuple(files) for name, files in parts.items()})


def embedded_parent(
    recipe: EmbeddedRecipe | None = None,
    progress: Progress = silent,
    corpus: Corpus | None = None,
    device: str = "cpu",
) -> EmbeddedParent:
    """The trained parent of this recipe, from the cache or trained now, on a CPU in fp32, on a GPU with bf16 products.

    Training writes a checkpoint every `checkpoint_steps` steps beside the final place, which appears whole by a
    rename: killed at any moment, the next call goes on from the last checkpoint and ends with the same weights.
    """
    recipe = EmbeddedRecipe() if recipe is None else recipe
    corpus = stdlib_corpus() if corpus is None else corpus
    folder = cache_folder() / f"parent-{_key(recipe, corpus, device)}"
    if not (folder / METADATA).exists():
        working = folder.with_name(folder.name + ".partial")
        try:
            working.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise GqaError(
                "the cache folder cannot be written",
                got=f"{working}: {error.strerror}",
                hint="set GQA_CACHE to a folder of yours",
            ) from None
        _train(recipe, corpus, working, progress, device)
        publish(working / "model", folder)
        shutil.rmtree(working, ignore_errors=True)
    facts = json.loads((folder / METADATA).read_text(encoding="utf-8"))
    return EmbeddedParent(
        folder=folder,
        parameters=facts["parameters"],
        train_tokens=facts["train_tokens"],
        train_seconds=facts["train_seconds"],
        final_loss_nats=facts["final_loss_nats"],
    )


def learning_rate_factor(step: int, recipe: EmbeddedRecipe) -> float:
    """The schedule: linear warm-up, then a cosine to zero. 1 is the recipe's learning rate."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


def _is_text(content: bytes) -> bool:
    try:
        return bool(content.decode("utf-8").strip()) and b"\0" not in content
    except UnicodeDecodeError:
        return False


def _key(recipe: EmbeddedRecipe, corpus: Corpus, device: str) -> str:
    """A name for everything that decides the weights: recipe, train files, torch's version, device, this code's
    format."""
    import torch

    elsewhere = [] if device == "cpu" else [device]
    digest = hashlib.sha256(json.dumps([FORMAT, dataclasses.asdict(recipe), torch.__version__, *elsewhere]).encode())
    for path in corpus.train:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _train(recipe: EmbeddedRecipe, corpus: Corpus, working: Path, progress: Progress, device: str) -> None:
    """Train in `working` until the finished model lies in `working`/model."""
    import torch
    from torch.nn.functional import cross_entropy

    from gqa.quiet import quiet_transformers

    began = time.perf_counter()
    progress("tokenizer", 0, 1)
    texts = [read_text([path]) for path in corpus.train]
    tokenizer = _train_tokenizer(texts, recipe)
    windows = _windows(texts, tokenizer, recipe)
    progress("tokenizer", 1, 1, f"{windows.size} tokens of training text")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model: Any = _new_model(recipe).to(device)  # pyright: ignore[reportArgumentType]
    model.train()
    precision = torch.autocast(device, torch.bfloat16) if device != "cpu" else contextlib.nullcontext()
    every = 1 if device == "cpu" else 20  # steps between two looks at the loss, for which a GPU would have to stop
    shown = math.nan
    optimizers = _optimizers(model, recipe)
    first, seconds_before = _resume(working, model, optimizers)
    loss_sum, loss_count = 0.0, 0
    batches = _batches(windows, recipe)
    for step, batch in enumerate(batches):
        if step < first:
            continue
        ids = torch.from_numpy(batch).to(device)
        with precision:
            logits = model(input_ids=ids, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * learning_rate_factor(step, recipe)
            optimizer.step()
        model.zero_grad()
        if step >= recipe.steps - max(1, recipe.steps // 20):
            loss_sum, loss_count = loss_sum + loss.item(), loss_count + 1
        if (step + 1) % every == 0:
            shown = loss.item()
        progress("training the parent", step + 1, recipe.steps, f"loss {shown:.2f}")
        if (step + 1) % recipe.checkpoint_steps == 0 and step + 1 < recipe.steps:
            spent = seconds_before + time.perf_counter() - began
            _save_state(working, model, optimizers, step + 1, spent)

    model.eval()
    folder = working / "model"
    shutil.rmtree(folder, ignore_errors=True)
    with quiet_transformers():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_legacy_keys(folder)
    facts: dict[str, Any] = {
        "recipe": dataclasses.asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_tokens": recipe.steps * recipe.batch * recipe.window,
        "train_text_tokens": int(windows.size),
        "train_seconds": seconds_before + time.perf_counter() - began,
        "final_loss_nats": loss_sum / max(1, loss_count),
    }
    write_text_atomic(folder / METADATA, json.dumps(facts, indent=2) + "\n")


def _train_tokenizer(texts: list[str], recipe: EmbeddedRecipe) -> PreTrainedTokenizerFast:
    """A byte-level BPE on the train part only: every text can be encoded, and nothing of the test part leaks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[_END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=_END_OF_TEXT,
        eos_token=_END_OF_TEXT,
        pad_token=_END_OF_TEXT,
        model_max_length=recipe.window,
        clean_up_tokenization_spaces=False,
    )


def _windows(texts: list[str], tokenizer: PreTrainedTokenizerFast, recipe: EmbeddedRecipe) -> np.ndarray:
    """All train files one after another as windows (N, window). Encoded file by file, on all cores."""
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    ids = np.concatenate([np.asarray(file_ids, dtype=np.int64) for file_ids in encoded])
    count = len(ids) // recipe.window
    if count < recipe.batch:
        raise GqaError("the training text is too short", got=f"{count} windows", allowed=f"{recipe.batch} or more")
    return ids[: count * recipe.window].reshape(count, recipe.window)


def _batches(windows: np.ndarray, recipe: EmbeddedRecipe) -> Iterator[np.ndarray]:
    """`steps` batches (batch, window): every window once in random order, then all again in another order."""
    random = np.random.default_rng(recipe.seed)
    order = np.empty(0, dtype=np.int64)
    for _ in range(recipe.steps):
        if len(order) < recipe.batch:
            order = random.permutation(len(windows))
        yield windows[order[: recipe.batch]]
        order = order[recipe.batch :]


def _new_model(recipe: EmbeddedRecipe) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        recipe.model_type,
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads or recipe.heads,
        head_dim=recipe.hidden // recipe.heads,
        attention_bias=recipe.model_type == "qwen3",
        max_position_embeddings=recipe.window,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config)


def _optimizers(model: PreTrainedModel, recipe: EmbeddedRecipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, slower for the attentions; AdamW for the embedding and the norms."""
    import torch

    from gqa.convert.muon import Muon

    parts: dict[str, list[torch.nn.Parameter]] = {"attention": [], "mlp": [], "others": []}
    for name, parameter in model.named_parameters():
        part = "others" if parameter.ndim < 2 or "embed" in name else "attention" if "self_attn" in name else "mlp"
        parts[part].append(parameter)
    matrices = [
        {"params": parts["mlp"], "lr": recipe.matrix_learning_rate},
        {"params": parts["attention"], "lr": recipe.attention_learning_rate},
    ]
    optimizers = [
        Muon(matrices, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(parts["others"], recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def _save_state(working: Path, model: Any, optimizers: list[Any], step: int, seconds: float) -> None:
    import torch

    temporary = working / "state.pt.tmp"
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "step": step,
        "seconds": seconds,
    }
    torch.save(state, temporary)
    os.replace(temporary, working / "state.pt")


def _resume(working: Path, model: Any, optimizers: list[Any]) -> tuple[int, float]:
    """Load the last checkpoint, if there is one: (steps done, seconds they took)."""
    import torch

    path = working / "state.pt"
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"], state["seconds"]
