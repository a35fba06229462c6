"""The whole path over the dial: convert, evaluate, uptrain, evaluate again, measure, record.

A study is a row of named steps. Each leaves one small JSON file when it is done, so a study that was stopped goes on
with the first step that has none; the long steps (conversion, uptraining) resume within themselves.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gqa.config import ModelShape, check_kv_heads, kv_head_choices, parse_config
from gqa.errors import GqaError
from gqa.hardware import find_device
from gqa.plan.cache import kv_bytes, kv_bytes_per_token
from gqa.plan.sweep import plan
from gqa.progress import Progress, silent
from gqa.record import Record, write_text_atomic
from gqa.source import Source
from gqa.study.corpus import StudyText
from gqa.units import dtype_bytes

# What is compared at every setting: the published baseline, the closed form, and that refined.
METHODS = ("mean", "svd", "svd+refine")
BEST = METHODS[-1]

# Devices whose memory the report draws as limits: a small, a consumer's and a large one.
_DEVICES = ("L4", "RTX 4090", "H100 SXM")

_FORMAT = 1  # of the step files: raise it when an old one must not be taken for a new one


@dataclasses.dataclass(frozen=True)
class Settings:
    """kv_heads: stops of the dial below the parent's (empty: every divisor). calibration_windows: for conversion;
    the same ones serve refinement. test_windows: for every evaluation. uptrain_tokens: for every child and for the
    control (0: no uptraining). contexts: where decoding is timed, in tokens, with decode_repeats steps each."""

    kv_heads: tuple[int, ...] = ()
    calibration_windows: int = 128
    test_windows: int = 128
    uptrain_tokens: int = 0
    contexts: tuple[int, ...] = (512, 2048, 8192, 32768)
    refine_steps: int = 120
    decode_repeats: int = 24
    seed: int = 0


def run(
    source: Source,
    text: StudyText,
    out: Path,
    settings: Settings,
    progress: Progress = silent,
    *,
    training: Mapping[str, Any] | None = None,
) -> Record:
    """Study the checkpoint `source`, write OUT/study.json and return the record.

    training: what is known of the parent's training (`train_tokens`, `train_seconds`), for the reader.
    Raises GqaError if OUT holds another study, and for settings that are not on the model's dial.
    """
    shape = parse_config(source.config, source.name)
    stops = settings.kv_heads or tuple(n for n in kv_head_choices(shape.query_heads) if n < shape.kv_heads)
    for stop in stops:
        check_kv_heads(shape, stop)
        if stop >= shape.kv_heads:
            raise GqaError(
                f"{stop} KV heads are not fewer than the parent's {shape.kv_heads}",
                allowed=", ".join(str(n) for n in kv_head_choices(shape.query_heads) if n < shape.kv_heads),
            )
    stops = tuple(sorted(set(stops), reverse=True))
    study = _Study(source, shape, text, Path(out), dataclasses.replace(settings, kv_heads=stops), progress)
    record = study.run(dict(training or {}))
    record.write(study.out / "study.json")
    return record


class _Study:
    def __init__(
        self, source: Source, shape: ModelShape, text: StudyText, out: Path, settings: Settings, progress: Progress
    ) -> None:
        assert source.folder is not None
        self.source, self.shape, self.text, self.out = source, shape, text, out
        self.settings, self.progress = settings, progress
        self.parent = source.folder
        self.test = text.test[: settings.test_windows]
        self.calibration = text.calibration[: settings.calibration_windows]
        window = text.train.shape[1]
        self.uptrain = text.train[: max(1, settings.uptrain_tokens // window)] if settings.uptrain_tokens else None
        stages = 2 if self.uptrain is not None else 1
        self.total = 2 + (stages - 1) + len(settings.kv_heads) * len(METHODS) * 2 * stages
        self.done = 0
        self._parent_logits: Any = None  # computed once for all children

    def run(self, training: dict[str, Any]) -> Record:
        self._claim()
        started = time.perf_counter()
        parent = self._step("parent", lambda: self._evaluate(self.parent, with_parent=False))
        control = self._control()
        quality = [self._quality_row(self.shape.kv_heads, "parent", "converted", parent, parent, None)]
        layers: list[dict[str, Any]] = []
        for kv_heads in self.settings.kv_heads:
            mean_loss = None
            for method in METHODS:
                report = self._convert(kv_heads, method)
                layers += [
                    {"kv_heads": kv_heads, "method": method, "layer": layer["layer"], "groups": layer["groups"]}
                    | {"output_error": layer.get("output_error")}
                    for layer in report["layers"]
                ]
                for stage, figures in self._stages(kv_heads, method):
                    row = self._quality_row(kv_heads, method, stage, figures, parent, mean_loss)
                    row["seconds"] = report["seconds"] if stage == "converted" else figures["uptrain_seconds"]
                    if method == "mean" and stage == "converted":
                        mean_loss = row["loss_above_parent_nats"]
                        row["share_of_mean_loss"] = 1.0
                    quality.append(row)
        decode = self._step("decode", self._decode)["rows"]
        results = {
            "parent": self._parent_facts(training) | _scores(parent),
            "control": None if control is None else {"train_tokens": int(self._uptrain.size)} | _scores(control),
            "settings": [
                self._setting(kv_heads, decode) for kv_heads in (self.shape.kv_heads, *self.settings.kv_heads)
            ],
            "quality": quality,
            "layers": layers,
            "decode": decode,
            "capacity": self._capacity(),
        }
        inputs = dataclasses.asdict(self.settings) | {
            "model": self.source.name,
            "text": self.text.name,
            "window_tokens": self.test.shape[1],
            "test_tokens": self.test.size,
            "calibration_tokens": self.calibration.size,
            "seconds": time.perf_counter() - started,
        }
        return Record("study", inputs, results, _BASIS, self._assumptions())

    def _claim(self) -> None:
        """Make OUT this study's, or refuse it if it is another's."""
        identity = {
            "format": _FORMAT,
            "settings": dataclasses.asdict(self.settings),
            "model": _fingerprint(self.parent),
            "text": {
                name: hashlib.sha256(np.ascontiguousarray(windows).tobytes()).hexdigest()
                for name, windows in (
                    ("train", self.text.train),
                    ("calibration", self.calibration),
                    ("test", self.test),
                )
            },
        }
        identity = json.loads(json.dumps(identity))
        path = self.out / "steps" / "identity.json"
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            different = sorted(key for key in identity if identity[key] != found.get(key))
            if different:
                raise GqaError(
                    "the folder holds another study",
                    got=f"{self.out} (different: {', '.join(different)})",
                    hint=f"choose another folder with --out, or remove {self.out}",
                )
        elif self.out.exists() and any(self.out.iterdir()):
            raise GqaError("the folder holds something else", got=self.out, hint="choose another one with --out")
        else:
            write_text_atomic(path, json.dumps(identity, indent=2) + "\n")

    def _step(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of a step: from its file, or by doing the work now."""
        path = self.out / "steps" / f"{name}.json"
        if path.exists():
            result = json.loads(path.read_text(encoding="utf-8"))
        else:
            self.progress("study", self.done, self.total, name)
            result = work()
            write_text_atomic(path, json.dumps(result, indent=2) + "\n")
        self.done += 1
        self.progress("study", self.done, self.total, name)
        return result

    def _control(self) -> dict[str, Any] | None:
        """The parent itself, continued on the text that the children are uptrained on, without a teacher."""
        if self.uptrain is None:
            return None
        return self._step("control", lambda: self._train_and_evaluate(self.parent, self.out / "models" / "control"))

    def _convert(self, kv_heads: int, method: str) -> dict[str, Any]:
        from gqa.convert.recipe import make_recipe
        from gqa.convert.run import convert

        def work() -> dict[str, Any]:
            name, _, refined = method.partition("+")
            baseline = name == "mean"
            recipe = make_recipe(
                kv_heads,
                name,  # type: ignore[arg-type]
                calibration_tokens=0 if baseline else self.calibration.size,
                refine_tokens=self.calibration.size if refined else 0,
                refine_steps=self.settings.refine_steps,
                window=self.calibration.shape[1],
                seed=self.settings.seed,
            )
            folder = self._folder(kv_heads, method)
            return convert(self.source, folder, recipe, self.calibration, self.progress, texts=[self.text.name])

        return self._step(_name(kv_heads, method, "convert"), work)

    def _stages(self, kv_heads: int, method: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """A child right after conversion and after uptraining. Only the best method's models are kept on disk."""
        folder = self._folder(kv_heads, method)
        yield "converted", self._step(_name(kv_heads, method, "evaluate"), lambda: self._evaluate(folder))
        if self.uptrain is not None:
            trained = folder.with_name(folder.name + "-uptrained")
            work = lambda: self._train_and_evaluate(folder, trained, teacher=True)  # noqa: E731
            yield "uptrained", self._step(_name(kv_heads, method, "uptrain"), work)
            if method != BEST:
                shutil.rmtree(trained, ignore_errors=True)
        if method != BEST:
            shutil.rmtree(folder, ignore_errors=True)

    def _train_and_evaluate(self, folder: Path, out: Path, *, teacher: bool = False) -> dict[str, Any]:
        from gqa.uptrain import uptrain

        trained = uptrain(
            folder,
            out,
            windows=self._uptrain,
            parent_folder=self.parent if teacher else None,
            seed=self.settings.seed,
            progress=self.progress,
        )
        return self._evaluate(out) | {"uptrain_seconds": trained["seconds"]}

    def _evaluate(self, folder: Path, *, with_parent: bool = True) -> dict[str, Any]:
        from gqa.evaluate import evaluate, load_model, remember

        if not with_parent:
            return evaluate(load_model(folder), self.test)
        if self._parent_logits is None:
            self._parent_logits = remember(load_model(self.parent), self.test)
        return evaluate(load_model(folder), self.test, parent=self._parent_logits)

    def _decode(self) -> dict[str, Any]:
        """Time one more token at every context; the settings take turns, so that a slow moment of the machine does
        not fall on one of them alone."""
        from gqa.bench.decode import measure_decode
        from gqa.evaluate import load_model
        from gqa.model import hf

        hf.register()
        folders = {self.shape.kv_heads: self.parent}
        folders |= {kv_heads: self._folder(kv_heads, BEST) for kv_heads in self.settings.kv_heads}
        models = {kv_heads: load_model(folder) for kv_heads, folder in folders.items()}
        for model in models.values():
            model.set_attn_implementation("gqa")
        rows = []
        for context in self.settings.contexts:
            for kv_heads, model in models.items():
                measured = measure_decode(model, context, repeats=self.settings.decode_repeats)
                predicted = kv_bytes(self.shape.with_kv_heads(kv_heads), context, 1, dtype_bytes(self._kv_dtype))
                row = {"kv_heads": kv_heads, "context_tokens": context, "cache_bytes_predicted": predicted}
                rows.append(row | measured)
        return {"rows": rows}

    def _quality_row(
        self,
        kv_heads: int,
        method: str,
        stage: str,
        figures: Mapping[str, Any],
        parent: Mapping[str, Any],
        mean_loss: float | None,
    ) -> dict[str, Any]:
        loss = figures["cross_entropy_nats_per_token"] - parent["cross_entropy_nats_per_token"]
        fidelity = {name: figures.get(name) for name in ("kl_to_parent_nats", "top1_agreement")}
        return {
            "kv_heads": kv_heads,
            "method": method,
            "stage": stage,
            **_scores(figures),
            **fidelity,
            "loss_above_parent_nats": loss,
            "share_of_mean_loss": None if not mean_loss else loss / mean_loss,
        }

    def _setting(self, kv_heads: int, decode: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        shape = self.shape.with_kv_heads(kv_heads)
        row = plan(shape, kv_heads=[kv_heads], kv_dtype=self._kv_dtype).results["settings"][0]
        measured = [d["cache_bytes_measured"] / d["context_tokens"] for d in decode if d["kv_heads"] == kv_heads]
        return {
            "kv_heads": kv_heads,
            "queries_per_kv_head": row["queries_per_kv_head"],
            "kv_bytes_per_token": row["kv_bytes_per_token"],
            "kv_bytes_per_token_measured": measured[0] if measured else None,
            "kv_cache_saving_ratio": kv_bytes_per_token(self.shape, 1) / kv_bytes_per_token(shape, 1),
            "attention_parameters": row["attention_parameters"],
            "parameters": row["parameters"],
        }

    def _capacity(self) -> list[dict[str, Any]]:
        rows = []
        for name in _DEVICES:
            device = find_device(name)
            record = plan(
                self.shape,
                kv_heads=[self.shape.kv_heads, *self.settings.kv_heads],
                context=max(self.settings.contexts),
                kv_dtype=self._kv_dtype,
                device=device,
            )
            for row in record.results["settings"]:
                rows.append(
                    {
                        "kv_heads": row["kv_heads"],
                        "device": device.name,
                        "memory_bytes": device.memory_bytes,
                        "max_context_tokens": row["max_context"],
                        "max_concurrent_requests": row["max_concurrent_requests"],
                        "context_tokens": max(self.settings.contexts),
                    }
                )
        return rows

    def _parent_facts(self, training: Mapping[str, Any]) -> dict[str, Any]:
        row = plan(self.shape, kv_heads=[self.shape.kv_heads]).results["settings"][0]
        return {
            "name": self.source.name,
            "parameters": row["parameters"],
            "layers": len(self.shape.layers),
            "query_heads": self.shape.query_heads,
            "kv_heads": self.shape.kv_heads,
            "head_dim": self.shape.head_dim,
            "train_tokens": training.get("train_tokens"),
            "train_seconds": training.get("train_seconds"),
        }

    def _assumptions(self) -> tuple[str, ...]:
        said = [
            f"Quality is measured on {self.test.size:,} tokens of test text in windows of {self.test.shape[1]}; "
            "no test text was seen in training, calibration or uptraining. Standard errors are over windows.",
            f"Calibration and refinement look at {self.calibration.size:,} tokens, without labels.",
            "Decoding is timed at batch 1 with a cache filled with random keys and values; contexts may be longer than "
            "the model was trained for, which changes the text but not the time.",
            f"Capacity is arithmetic: 90 % of the device's memory, minus the weights, for a {self._kv_dtype} cache.",
        ]
        if self.uptrain is not None:
            said.insert(
                2,
                f"Uptraining sees {self._uptrain.size:,} tokens of the training text with the parent as teacher; the "
                "control is the parent itself, continued on the same tokens with the same schedule.",
            )
        return tuple(said)

    @property
    def _uptrain(self) -> np.ndarray:
        assert self.uptrain is not None
        return self.uptrain

    @property
    def _kv_dtype(self) -> str:
        """Of the cache that is measured here: models run in fp32 on a CPU, as stored on a GPU."""
        import torch

        return (self.shape.weight_dtype or "fp32") if torch.cuda.is_available() else "fp32"

    def _folder(self, kv_heads: int, method: str) -> Path:
        return self.out / "models" / _name(kv_heads, method)


_BASIS = {
    **dict.fromkeys(
        (
            "cross_entropy_nats_per_token",
            "standard_error_nats",
            "perplexity",
            "kl_to_parent_nats",
            "top1_agreement",
            "loss_above_parent_nats",
            "share_of_mean_loss",
            "seconds",
            "train_seconds",
            "output_error",
            "cache_bytes_measured",
            "kv_bytes_per_token_measured",
            "seconds_per_token_p20",
            "seconds_per_token_p50",
            "seconds_per_token_p80",
        ),
        "measured",
    ),
    **dict.fromkeys(
        (
            "kv_bytes_per_token",
            "kv_cache_saving_ratio",
            "attention_parameters",
            "parameters",
            "cache_bytes_predicted",
            "max_context_tokens",
            "max_concurrent_requests",
        ),
        "predicted",
    ),
}


def _name(kv_heads: int, method: str, step: str = "") -> str:
    """`kv2-svd-refine`, `kv2-svd-refine.uptrain`"""
    return f"kv{kv_heads}-{method.replace('+', '-')}" + (f".{step}" if step else "")


def _scores(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {name: figures[name] for name in ("cross_entropy_nats_per_token", "standard_error_nats", "perplexity")}


def _fingerprint(folder: Path) -> dict[str, Any]:
    """What tells one checkpoint from another without reading it all: its config, and its files' names and sizes."""
    config = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    return {
        "config": config,
        "files": {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))},
    }
