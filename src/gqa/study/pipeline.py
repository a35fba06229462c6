"""The whole path over the dial: convert, evaluate, uptrain, evaluate again, measure, record.

A study is a row of named steps, so one that was stopped goes on with the first that is not done; the long ones
(conversion, uptraining) resume within themselves.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gqa.config import ModelShape, parse_config
from gqa.plan.cache import kv_bytes
from gqa.plan.kv_dtype import kv_dtype
from gqa.progress import Progress, silent
from gqa.record import Record
from gqa.source import Source
from gqa.study import rows
from gqa.study.corpus import StudyText
from gqa.study.settings import BEST, METHODS, Settings, recipe_of
from gqa.study.steps import Steps

if TYPE_CHECKING:
    from gqa.study.patterns import Groups


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
    study = _Study(source, shape, text, Path(out), settings.for_model(shape), progress)
    record = study.run(training or {})
    record.write(study.out / "study.json")
    return record


_GRADIENT_WINDOWS, _PATTERN_WINDOWS = 32, 16  # of test text


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
        stages = settings.stages
        total = 2 + len(settings.analyses) + (stages - 1) + len(settings.kv_heads) * len(METHODS) * (1 + stages)
        self.steps = Steps(out, self._identity(), total, progress)
        self.stops: tuple[int, ...] = ()  # that were studied
        self._parent_known: Any = None  # its logits, computed once for all children, or itself where they are too many

    def run(self, training: Mapping[str, Any]) -> Record:
        parent = self.steps.do("parent", lambda: self._evaluate(self.parent, with_parent=False))
        control = self._control()
        quality = [rows.quality(self.shape.kv_heads, "parent", "converted", parent, parent)]
        layers: list[dict[str, Any]] = []
        groups: dict[int, Groups] = {}
        within: int | None = None
        for kv_heads in self.settings.kv_heads:
            for method in METHODS:
                report = self._convert(kv_heads, method)
                layers += rows.layers(kv_heads, method, report)
                groups[kv_heads] = {row["layer"]: row["groups"] for row in report["layers"]}  # of BEST in the end
                for stage, figures in self._stages(kv_heads, method):
                    seconds = report["seconds"] if stage == "converted" else figures["uptrain_seconds"]
                    quality.append(rows.quality(kv_heads, method, stage, figures, parent, seconds))
            self.stops = (*self.stops, kv_heads)
            if self.settings.budget is not None:
                if quality[-1]["perplexity"] > (1 + self.settings.budget) * parent["perplexity"]:
                    break
                within = kv_heads
        rows.share_losses(quality)
        decode = self.steps.do("decode", self._decode)["rows"]
        analyses: dict[str, Any] = {}
        if "gradients" in self.settings.analyses:
            analyses |= self.steps.do("gradients", self._gradients)
        if "patterns" in self.settings.analyses:
            analyses |= self.steps.do("patterns", lambda: self._patterns(groups))
        stops = (self.shape.kv_heads, *self.stops)
        results = {
            "parent": rows.parent_facts(self.shape, self.source.name, training) | rows.scores(parent),
            "control": None if control is None else {"train_tokens": self._uptrain.size} | rows.scores(control),
            "settings": [rows.setting(self.shape, kv_heads, self._kv_dtype, decode) for kv_heads in stops],
            "quality": quality,
            "layers": layers,
            "within_budget": None if self.settings.budget is None else {"kv_heads": within},
            "decode": decode,
            **analyses,
            "capacity": rows.capacity(self.shape, stops, self._kv_dtype, max(self.settings.contexts)),
            "plan": rows.planned(self.shape, stops, self._kv_dtype, max(self.settings.contexts)),
        }
        inputs = dataclasses.asdict(self.settings) | {
            "model": self.source.name,
            "text": self.text.name,
            "window_tokens": self.test.shape[1],
            "test_tokens": self.test.size,
            "calibration_tokens": self.calibration.size,
            "seconds": self.steps.seconds,
        }
        return Record("study", inputs, results, rows.BASIS, self._assumptions())

    def _identity(self) -> dict[str, Any]:
        """What tells this study from another."""
        parts = {"train": self.text.train, "calibration": self.calibration, "test": self.test}
        settings = dataclasses.asdict(self.settings)
        del settings["analyses"]
        if settings["budget"] is None:
            del settings["budget"]
        return {
            "settings": settings,
            "model": _fingerprint(self.parent),
            "text": {name: hashlib.sha256(part.tobytes()).hexdigest() for name, part in parts.items()},
        }

    def _assumptions(self) -> tuple[str, ...]:
        said = [
            f"Quality is measured on {self.test.size:,} tokens of test text in windows of {self.test.shape[1]}; "
            "no test text was seen in training, calibration or uptraining. Standard errors are over windows.",
            f"Calibration reads {self.calibration.size:,} tokens; the distillation trains the attentions of each child "
            f"on {self.settings.distill_tokens:,} tokens of the training text against the parent's predictions.",
            "Decoding is timed at batch 1 with a cache filled with random keys and values; contexts may be longer than "
            "the model was trained for, which changes the text but not the time.",
            f"Capacity is arithmetic: 90 % of the device's memory, minus the weights, for a {self._kv_dtype} cache.",
        ]
        if "gradients" in self.settings.analyses:
            said.append(
                "Growth of gradients: norm of a KV head's rows of W_k or W_v times that of the weights, at random "
                f"weights over seeds, in models right after conversion over {_GRADIENT_WINDOWS} windows; 95 % "
                "intervals."
            )
        if "patterns" in self.settings.analyses:
            said.append(
                f"What heads look at: {BEST} right after conversion, and a random model of the parent's shape; figures "
                f"are means over {min(_PATTERN_WINDOWS, len(self.test))} windows of test text and every query token "
                "after the first; maps are of the start of one window, in 64 levels of the root of a share."
            )
        if self.uptrain is not None:
            said.insert(
                2,
                f"Uptraining sees {self._uptrain.size:,} tokens of the training text with the parent as teacher; the "
                "control is the parent itself, continued on the same tokens with the same schedule, without a teacher.",
            )
        return tuple(said)

    def _control(self) -> dict[str, Any] | None:
        """The parent itself, continued on the text that the children are uptrained on, without a teacher."""
        if self.uptrain is None:
            return None
        return self.steps.do("control", lambda: self._train_and_evaluate(self.parent, self.out / "models" / "control"))

    def _convert(self, kv_heads: int, method: str) -> dict[str, Any]:
        from gqa.convert.run import convert
        from gqa.uptrain import distill_attentions, training_windows

        def work() -> dict[str, Any]:
            recipe = recipe_of(kv_heads, method, self.settings, self.calibration)
            folder = self._folder(kv_heads, method)
            return convert(
                self.source,
                folder,
                recipe,
                self.calibration,
                self.progress,
                distill=distill_attentions,
                distill_windows=training_windows(
                    self.text.train, recipe.distill_tokens, recipe.distill_batch, recipe.seed
                )
                if recipe.distill_tokens
                else None,
                texts=[self.text.name],
            )

        return self.steps.do(_name(kv_heads, method, "convert"), work)

    def _stages(self, kv_heads: int, method: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """A child right after conversion and after uptraining. Only the best method's models are kept on disk."""
        folder = self._folder(kv_heads, method)
        yield "converted", self.steps.do(_name(kv_heads, method, "evaluate"), lambda: self._evaluate(folder))
        if self.uptrain is not None:
            trained = folder.with_name(folder.name + "-uptrained")
            work = lambda: self._train_and_evaluate(folder, trained, teacher=True)  # noqa: E731
            yield "uptrained", self.steps.do(_name(kv_heads, method, "uptrain"), work)
            if method != BEST:
                shutil.rmtree(trained, ignore_errors=True)
        if method != BEST:
            shutil.rmtree(folder, ignore_errors=True)

    def _train_and_evaluate(self, folder: Path, out: Path, *, teacher: bool = False) -> dict[str, Any]:
        from gqa.uptrain import Settings as Uptraining
        from gqa.uptrain import uptrain

        trained = uptrain(
            folder,
            out,
            windows=self._uptrain,
            parent_folder=self.parent if teacher else None,
            settings=Uptraining(seed=self.settings.seed),
            progress=self.progress,
        )
        return self._evaluate(out) | {"uptrain_seconds": trained["seconds"]}

    def _evaluate(self, folder: Path, *, with_parent: bool = True) -> dict[str, Any]:
        from gqa.evaluate import evaluate, load_model, remember
        from gqa.study.estimate import REMEMBERED_BYTES, logits_bytes

        if not with_parent:
            return evaluate(load_model(folder), self.test)
        if self._parent_known is None:
            parent = load_model(self.parent)
            windows, tokens = self.test.shape
            size = logits_bytes(windows, tokens, parent.config.get_text_config().vocab_size)
            self._parent_known = remember(parent, self.test) if size <= REMEMBERED_BYTES else parent
        return evaluate(load_model(folder), self.test, parent=self._parent_known)

    def _decode(self) -> dict[str, Any]:
        """Time one more token at every context; the settings take turns, so that a slow moment of the machine does
        not fall on one of them alone, unless their models are too large to be held together."""
        from gqa.bench.decode import measure_decode
        from gqa.convert.memory import available_bytes
        from gqa.device import default_device
        from gqa.evaluate import load_model
        from gqa.model import hf

        hf.register()
        folders = {self.shape.kv_heads: self.parent}
        folders |= {kv_heads: self._folder(kv_heads, BEST) for kv_heads in self.stops}
        free = available_bytes(default_device())
        fit = free is None or 2 * len(folders) * widest_bytes(self.parent) < free
        timed = []
        for some in [list(folders)] if fit else [[kv_heads] for kv_heads in folders]:
            models = {kv_heads: load_model(folders[kv_heads]) for kv_heads in some}
            for model in models.values():
                model.set_attn_implementation("gqa")
            for context in self.settings.contexts:
                for kv_heads, model in models.items():
                    measured = measure_decode(model, context, repeats=self.settings.decode_repeats)
                    predicted = kv_bytes(self.shape.with_kv_heads(kv_heads), context, 1, kv_dtype(self._kv_dtype))
                    row = {"kv_heads": kv_heads, "context_tokens": context, "cache_bytes_predicted": predicted}
                    timed.append(row | measured)
            models.clear()
        order = {kv_heads: place for place, kv_heads in enumerate(folders)}
        return {"rows": sorted(timed, key=lambda row: (row["context_tokens"], order[row["kv_heads"]]))}

    def _gradients(self) -> dict[str, Any]:
        """How gradients grow with the query heads that share a KV head: random weights, the parent, its children."""
        from gqa.study.gradients import measure

        folders = {self.shape.query_heads // self.shape.kv_heads: self.parent}
        folders |= {self.shape.query_heads // n: self._folder(n, BEST) for n in self.stops}
        return measure(folders, self.test[:_GRADIENT_WINDOWS])

    def _patterns(self, groups: Mapping[int, Groups]) -> dict[str, Any]:
        """What the heads of the parent, its children and a random model look at."""
        from gqa.study.patterns import Child, measure
        from gqa.text import load_tokenizer

        children = {n: Child(self._folder(n, BEST), groups[n]) for n in self.stops}
        tokenizer = load_tokenizer(self.parent)
        return measure(self.parent, children, self.test[:_PATTERN_WINDOWS], tokenizer, self.settings.seed)

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


def widest_bytes(folder: Path) -> int:
    """Of a model's weights as it runs on a CPU, in fp32."""
    from gqa.weights.reader import Checkpoint

    checkpoint = Checkpoint(folder)
    return sum(math.prod(checkpoint.entry(name).shape) * 4 for name in checkpoint.names)


def _name(kv_heads: int, method: str, step: str = "") -> str:
    """`kv2-svd-distill`, `kv2-svd-distill.uptrain`"""
    return f"kv{kv_heads}-{method.replace('+', '-')}" + (f".{step}" if step else "")


def _fingerprint(folder: Path) -> dict[str, Any]:
    """What tells one checkpoint from another without reading it all: its config, and its files' names and sizes."""
    config = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    return {
        "config": config,
        "files": {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))},
    }
