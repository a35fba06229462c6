"""Tasks of lm-evaluation-harness on a loaded model, through our attention, and paired with its parent.

Needs the extra `gqa[eval]`. https://github.com/EleutherAI/lm-evaluation-harness
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gqa.errors import GqaError
from gqa.evaluate.perplexity import mean_and_error, paired_p_value
from gqa.model import hf
from gqa.progress import Progress, silent
from gqa.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Loaded = tuple["PreTrainedModel", "PreTrainedTokenizerBase"]

_FEWSHOT_SEED = 1234  # lm-eval's own default
_JACKKNIFE_GROUPS = 100


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of one task, metric and filter. documents: a score per document, as the task gives it; total: all of them taken
    together as the task does, in most cases their mean; standard_error: of that, None for a single document."""

    documents: Sequence[Any]
    total: float
    standard_error: float | None
    higher_is_better: bool | None


class Tasks:
    """Tasks by their names, groups and tags too; loaded once, to be run on several models.

    folder: more task files (YAML) to find names in; data files that they name are looked for from there. Nothing is
    downloaded for a task whose data is local (`dataset_path: json`). A task file may name Python functions beside it
    (`!function`), which lm-eval imports: take folders only from whom you trust.
    Raises GqaError without lm-eval, for unknown names, and for data that cannot be had.
    """

    def __init__(self, names: Sequence[str], folder: Path | None = None) -> None:
        if folder is not None and not folder.is_dir():
            raise GqaError("no such folder of task files", got=folder)
        TaskManager = _lm_eval("tasks").TaskManager
        own = folder.resolve() if folder is not None else None
        with _quiet(), contextlib.chdir(own or Path.cwd()):
            manager = TaskManager(include_path=own, include_defaults=False)
            if not set(names) <= set(manager.all_tasks):  # reading lm-eval's own 14,000 takes ten seconds
                manager = TaskManager(include_path=own)
            if strange := [name for name in names if name not in manager.all_tasks]:
                raise GqaError(
                    "lm-eval knows no such task",
                    got=", ".join(strange),
                    allowed="a name that `lm-eval ls tasks` lists, or one of a YAML file in --include-path",
                )
            try:
                self._loaded = manager.load(list(names))
            except Exception as error:  # whatever a task's file or the reader of its data raises
                raise GqaError("a task does not load", got=f"{', '.join(names)}: {error}") from error
        self.tasks: dict[str, Any] = self._loaded["tasks"]
        if unsafe := [name for name, task in self.tasks.items() if getattr(task, "UNSAFE_CODE", False)]:
            raise GqaError("a task would run code that the model writes", got=", ".join(unsafe))

    def compare(
        self,
        own: Loaded,
        parent: Loaded | None = None,
        *,
        batch: int = 8,
        limit: int | None = None,
        progress: Progress = silent,
    ) -> list[dict[str, Any]]:
        """A row per task, metric and filter: documents, value, standard_error (over documents), higher_is_better.

        With a parent also parent_value, parent_standard_error, above_parent, and where a document has a score of its
        own p_value, that of a sign-flip test document by document; above_parent_standard_error, paired, where the value
        is the mean of such scores. limit: only the first documents of each task.
        """
        if batch < 1 or (limit is not None and limit < 1):
            raise GqaError("a batch or a limit is not positive", got=f"{batch}, {limit}", allowed="1 or more")
        scores = self.run(*own, batch=batch, limit=limit, progress=progress)
        theirs = {}
        if parent is not None:
            theirs = self.run(*parent, batch=batch, limit=limit, progress=progress, stage="tasks, parent")
        rows = []
        for (task, metric, chosen), one in scores.items():
            row = {
                "task": task,
                "metric": metric,
                "filter": chosen,
                "documents": len(one.documents),
                "value": one.total,
                "standard_error": one.standard_error,
                "higher_is_better": one.higher_is_better,
            }
            rows.append(row | (_beside(one, theirs[task, metric, chosen]) if parent is not None else {}))
        return rows

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch: int = 8,
        limit: int | None = None,
        progress: Progress = silent,
        stage: str = "tasks",
    ) -> dict[tuple[str, str, str], Scores]:
        """(task, metric, filter) -> scores, on the first `limit` documents of each task, or all."""
        for task in self.tasks.values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)  # the same examples for a child and its parent
        with _attention(model), _quiet():
            adapter = _adapter()(model, tokenizer, batch, progress, stage)
            # Standard errors are taken here: lm-eval's bootstrap prints, forks, and leaves some metrics without one.
            found = _lm_eval("evaluator").evaluate(
                adapter, self._loaded, limit=limit, bootstrap_iters=0, log_samples=True
            )
        scores = {}
        for name, task in self.tasks.items():
            better = found["higher_is_better"][name]
            for key, total in found["results"][name].items():
                metric, comma, chosen = key.partition(",")
                if not comma or metric.endswith("_stderr"):
                    continue
                documents = [row[metric] for row in found["samples"][name] if row["filter"] == chosen]
                error = _standard_error(documents, total, task.aggregation().get(metric))
                scores[name, metric, chosen] = Scores(documents, float(total), error, better.get(metric))
        return scores


def _beside(own: Scores, theirs: Scores) -> dict[str, Any]:
    difference = own.total - theirs.total
    row = {
        "parent_value": theirs.total,
        "parent_standard_error": theirs.standard_error,
        "above_parent": difference,
        "above_parent_standard_error": None,
        "p_value": None,
    }
    a, b = _per_document(own.documents), _per_document(theirs.documents)
    if a is not None and b is not None:
        mean, error = mean_and_error(a - b)
        row["p_value"] = paired_p_value(a - b)
        if math.isclose(mean, difference, rel_tol=1e-9, abs_tol=1e-12):  # a mean, so its error is the difference's
            row["above_parent_standard_error"] = error
    return row


def _per_document(documents: Sequence[Any]) -> torch.Tensor | None:
    """A number per document, to be paired. Perplexities of texts give (log-likelihood, length) for each: the first, as
    the length is the same for both models. None for metrics that need all documents together, such as F1 or BLEU."""
    if all(isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], float) for value in documents):
        documents = [value[0] for value in documents]
    if not all(isinstance(value, int | float) for value in documents):
        return None
    return torch.tensor([float(value) for value in documents], dtype=torch.float64)


def _standard_error(documents: Sequence[Any], total: float, aggregate: Any) -> float | None:
    """Of a mean `std / sqrt(N)`; of any other total a jackknife over up to 100 groups of documents,
    `sqrt((n-1)/n * sum (total without a group - their mean)^2)`, which is the same for a mean of single documents."""
    count = len(documents)
    if count < 2:
        return None
    values = _per_document(documents)
    if values is not None and math.isclose(values.mean().item(), total, rel_tol=1e-9, abs_tol=1e-12):
        return mean_and_error(values)[1]
    if aggregate is None:
        return None
    groups = min(count, _JACKKNIFE_GROUPS)
    left_out = [[d for i, d in enumerate(documents) if i % groups != group] for group in range(groups)]
    totals = torch.tensor([float(aggregate(rest)) for rest in left_out], dtype=torch.float64)
    return math.sqrt((groups - 1) / groups * (totals - totals.mean()).square().sum().item())


def _lm_eval(module: str) -> Any:
    try:
        return importlib.import_module(f"lm_eval.{module}")
    except ImportError as error:
        raise GqaError("lm-eval is not installed", got=error, hint="pip install 'gqa[eval]'") from None


@functools.cache
def _adapter() -> Any:
    """lm-eval's class for transformers' models, with our progress instead of its bars."""
    HFLM = _lm_eval("models.huggingface").HFLM

    class Adapter(HFLM):
        def __init__(self, model: Any, tokenizer: Any, batch: int, progress: Progress, stage: str) -> None:
            self._progress, self._stage, self._done, self._total = progress, stage, 0, 0
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return self._counted(super().loglikelihood, requests)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return self._counted(super().loglikelihood_rolling, requests)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return self._counted(super().generate_until, requests)

        def _counted(self, answer: Any, requests: Any) -> Any:
            self._done, self._total = 0, len(requests)
            answers = answer(requests, disable_tqdm=True)
            self._progress(self._stage, self._total, self._total)
            return answers

        def _count(self, batch: int) -> None:
            # A text longer than the context takes several calls, and choices of one token share one.
            self._done = min(self._done + batch, self._total - 1)
            self._progress(self._stage, self._done, self._total)

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            logits = super()._model_call(inps, *args, **kwargs)
            self._count(len(inps))
            return logits

        def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
            tokens = super()._model_generate(context, *args, **kwargs)
            self._count(len(context))
            return tokens

    return Adapter


@contextlib.contextmanager
def _attention(model: Any) -> Iterator[None]:
    """Our op meanwhile; the model is handed back with the attention it came with."""
    before = model.config._attn_implementation
    hf.register()
    model.set_attn_implementation(hf.NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no advice from lm-eval and datasets meanwhile: gqa has its own progress."""
    from tqdm.std import tqdm

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels, start = [logger.level for logger in loggers], tqdm.__init__

    def hidden(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **(kwargs | {"disable": True}))

    for logger in loggers:
        logger.setLevel(logging.ERROR)
    tqdm.__init__ = hidden
    try:
        with quiet_transformers():
            yield
    finally:
        tqdm.__init__ = start
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
