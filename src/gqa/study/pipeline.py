"""The whole path over the dial: convert, evaluate, uptrain, evaluate again, measure, record.

A study is a row of named steps, so one that was stopped goes on with the first that is not done; the long ones
(conversion, uptraining) resume within themselves.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gqa.config import ModelShape, check_kv_heads, kv_head_choices, parse_config
from gqa.errors import GqaError
from gqa.plan.cache import kv_bytes
from gqa.plan.kv_dtype import kv_dtype
from gqa.progress import Progress, silent
from gqa.record import Record
from gqa.source import Source
from gqa.study import rows
from gqa.study.corpus import StudyText
from gqa.study.steps import Steps

if TYPE_CHECKING:
    from gqa.study.patterns import Groups

# What is compared at every setting: the published baseline, the closed form, and that refined.
METHODS = ("mean", "svd", "svd+refine")
BEST = METHODS[-1]
# What else is looked at in the models.
ANALYSES = ("gradients", "patterns")


@dataclasses.dataclass(frozen=True)
class Settings:
    """kv_heads: stops of the dial below the parent's (empty: every divisor). calibration_windows: for conversion;
    the same ones serve refinement. test_windows: for every evaluation. uptrain_tokens: for every child and for the
    control (0: no uptraining). contexts: where decoding is timed, in tokens, with decode_repeats steps each.
    analyses: which of ANALYSES are made; a study may be given again with more of them."""

    kv_heads: tuple[int, ...] = ()
    calibration_windows: int = 128
    test_windows: int = 128
    uptrain_tokens: int = 0
    contexts: tuple[int, ...] = (512, 2048, 8192, 32768)
    refine_steps: int = 120
    decode_repeats: int = 24
    seed: int = 0
    analyses: tuple[str, ...] = ANALYSES


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
        stages = 2 if self.uptrain is not None else 1
        total = 2 + len(settings.analyses) + (stages - 1) + len(settings.kv_heads) * len(METHODS) * (1 + stages)
        self.steps = Steps(out, self._identity(), total, progress)
        self._parent_logits: Any = None  # computed once for all children

    def run(self, training: Mapping[str, Any]) -> Record:
        parent = self.steps.do("parent", lambda: self._evaluate(self.parent, with_parent=False))
        control = self._control()
        quality = [rows.quality(self.shape.kv_heads, "parent", "converted", parent, parent)]
        layers: list[dict[str, Any]] = []
        groups: dict[int, Groups] = {}
        for kv_heads in self.settings.kv_heads:
            for method in METHODS:
                report = self._convert(kv_heads, method)
                layers += rows.layers(kv_heads, method, report)
                groups[kv_heads] = {row["layer"]: row["groups"] for row in report["layers"]}  # of BEST in the end
                for stage, figures in self._stages(kv_heads, method):
                    seconds = report["seconds"] if stage == "converted" else figures["uptrain_seconds"]
                    quality.append(rows.quality(kv_heads, method, stage, figures, parent, seconds))
        rows.share_losses(quality)
        decode = self.steps.do("decode", self._decode)["rows"]
        analyses: dict[str, Any] = {}
        if "gradients" in self.settings.analyses:
            analyses |= self.steps.do("gradients", self._gradients)
        if "patterns" in self.settings.analyses:
            analyses |= self.steps.do("patterns", lambda: self._patterns(groups))
        stops = (self.shape.kv_heads, *self.settings.kv_heads)
        results = {
            "parent": rows.parent_facts(self.shape, self.source.name, training) | rows.scores(parent),
            "control": None if control is None else {"train_tokens": self._uptrain.size} | rows.scores(control),
            "settings": [rows.setting(self.shape, kv_heads, self._kv_dtype, decode) for kv_heads in stops],
            "quality": quality,
            "layers": layers,
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
        return {
            "settings": settings,
            "model": _fingerprint(self.parent),
            "text": {name: hashlib.sha256(part.tobytes()).hexdigest() for name, part in parts.items()},
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
        timed = []
        for context in self.settings.contexts:
            for kv_heads, model in models.items():
                measured = measure_decode(model, context, repeats=self.settings.decode_repeats)
                predicted = kv_bytes(self.shape.with_kv_heads(kv_heads), context, 1, kv_dtype(self._kv_dtype))
                row = {"kv_heads": kv_heads, "context_tokens": context, "cache_bytes_predicted": predicted}
                timed.append(row | measured)
        return {"rows": timed}

    def _gradients(self) -> dict[str, Any]:
        """How gradients grow with the query heads that share a KV head: random weights, the parent, its children."""
        from gqa.study.gradients import measure

        folders = {self.shape.query_heads // self.shape.kv_heads: self.parent}
        folders |= {self.shape.query_heads // n: self._folder(n, BEST) for n in self.settings.kv_heads}
        return measure(folders, self.test[:_GRADIENT_WINDOWS])

    def _patterns(self, groups: Mapping[int, Groups]) -> dict[str, Any]:
        """What the heads of the parent, its children and a random model look at."""
        from gqa.study.patterns import Child, measure
        from gqa.text import load_tokenizer

        children = {n: Child(self._folder(n, BEST), groups[n]) for n in self.settings.kv_heads}
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


def _name(kv_heads: int, method: str, step: str = "") -> str:
    """`kv2-svd-refine`, `kv2-svd-refine.uptrain`"""
    return f"kv{kv_heads}-{method.replace('+', '-')}" + (f".{step}" if step else "")


def _fingerprint(folder: Path) -> dict[str, Any]:
    """What tells one checkpoint from another without reading it all: its config, and its files' names and sizes."""
    config = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    return {
        "config": config,
        "files": {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))},
    }
