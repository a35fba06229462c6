"""`gqa eval`: what a model predicts on a text or does on tasks, and how far it is from its parent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gqa.cli import eval_table, output
from gqa.errors import GqaError
from gqa.record import Record, describe_versions
from gqa.units import parse_share, parse_tokens

_WINDOW = 256

_OF_TEXT = (
    "Each window is read alone: its first token is context only, and early tokens have little context.",
    "Standard errors are over windows, as the tokens of one window depend on each other.",
)
_OF_TASKS = (
    "Tasks are those of lm-evaluation-harness; their standard errors are over documents, of a mean std / sqrt(N), else "
    "a jackknife.",
)

_OF_ANSWERS = (
    "Answers are greedy: the likeliest token each time; standard errors are over prompts.",
    "KL and the same first choice are over the parent's answers, which both models read.",
    "An answer repeats itself if its end is an n-gram, 3 times or more in a row over 8 tokens or more, or if it has 8 "
    "4-grams or more and fewer than half of them are different.",
    "An answer is right if the right one stands in it as a whole word, in any case.",
)

_EXAMPLES = """
gqa eval ./my-gqa-model --text book.txt
gqa eval ./my-gqa-model --text book.txt --parent ./my-mha-model
gqa eval ./my-gqa-model --text book.txt --parent ./my-mha-model --gate "perplexity<=1.02*parent"
gqa eval ./my-gqa-model --text a.txt --text b.txt --window 4k --tokens 256k --positions
gqa eval ./my-gqa-model --text book.txt --parent ./my-mha-model --recall passkey,hops --lengths 1k,4k
gqa eval ./my-gqa-model --parent ./my-mha-model --answers 100 --gate "answers_equal>=0.5"
gqa eval ./my-gqa-model --parent ./my-mha-model --prompts questions.jsonl --gate "right_answers_kept>=0.9"
gqa eval ./my-gqa-model --parent ./my-mha-model --tasks mine --include-path ./tasks --gate "mine:acc>=0.98*parent"
"""


@click.command(cls=output.Command, examples=_EXAMPLES)
@click.argument("model")
@click.option(
    "--text",
    "texts",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Text that the model has not seen: .txt, .jsonl or .parquet files, or folders of them; repeatable.",
)
@output.text_field_option
@click.option("--parent", metavar="MODEL", help="Compare with this model, window by window.")
@click.option("--window", metavar="TOKENS", help=f"Tokens per window.  [default: {_WINDOW}, or the model's context]")
@click.option("--tokens", metavar="N", help="Measure on about N tokens, chosen at random.  [default: all]")
@click.option("--batch", type=int, default=8, show_default=True, help="Windows at a time.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the choice of windows.")
@click.option("--positions", is_flag=True, help="Also show the loss over how much context a token has.")
@click.option("--recall", metavar="TASKS", help="Also hide facts in the text and ask for them: passkey, hops.")
@click.option("--lengths", metavar="TOKENS,...", help="Contexts for --recall.  [default: the window]")
@click.option("--depths", metavar="SHARE,...", default="0,0.5,1", show_default=True, help="Where in them.")
@click.option("--samples", type=int, default=32, show_default=True, help="Items of each task, length and depth.")
@click.option(
    "--answers",
    type=int,
    metavar="N",
    help="Also compare the answers of MODEL and --parent to N prompts that the parent writes: questions where there is "
    "a chat template, else beginnings of texts (of --text where given).",
)
@click.option(
    "--prompts",
    "prompts_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help='Compare answers to the prompts of a file: one per line, or .jsonl lines {"prompt": ...}, with an "answer" '
    "where right answers are to be counted.",
)
@click.option("--answer-tokens", metavar="N", default="64", show_default=True, help="Tokens of an answer at most.")
@click.option(
    "--chat/--no-chat", default=None, help="Prompts in the chat template or without.  [default: where there is one]"
)
@click.option("--tasks", metavar="NAME,...", help="Also run these tasks of lm-evaluation-harness (gqa[eval]).")
@click.option(
    "--include-path",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Task files of your own (YAML, and the data they name); may hold code, which is run.",
)
@click.option("--limit", type=int, metavar="N", help="Only the first N documents of each task.")
@click.option("--gate", "gates", multiple=True, metavar="CONDITION", help="Exit with 1 if it is not met; repeatable.")
@output.json_option
def command(
    model: str,
    texts: tuple[Path, ...],
    text_field: str,
    parent: str | None,
    window: str | None,
    tokens: str | None,
    batch: int,
    seed: int,
    positions: bool,
    recall: str | None,
    lengths: str | None,
    depths: str,
    samples: int,
    answers: int | None,
    prompts_file: Path | None,
    answer_tokens: str,
    chat: bool | None,
    tasks: str | None,
    include_path: Path | None,
    limit: int | None,
    gates: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure the cross-entropy and perplexity of MODEL on text, its scores on tasks, and with --parent what it lost.

    MODEL is a model folder, a GGUF file, the preset smollm2-135m or a hub id.
    The loss above the parent is a paired difference: both models read the same windows, so its standard error is far
    smaller than those of the two perplexities. A gate is a condition such as "perplexity<=1.02*parent",
    "top1_agreement>=95%", "answers_equal>=0.5" or, of a task's metric, "hellaswag:acc_norm>=0.98*parent". Tasks and
    answers run through this package's attention.
    """
    from gqa.config import parse_config
    from gqa.evaluate.gate import parse_gate
    from gqa.text import load_tokenizer, read_prompts, read_text, token_windows

    conditions = [parse_gate(text) for text in gates]
    if parent is None and (unmet := [gate.text for gate in conditions if gate.needs_parent]):
        raise GqaError("a gate compares with the parent", got=unmet[0], hint="--parent MODEL")
    asks = answers is not None or prompts_file is not None
    if not texts and not tasks and not asks:
        raise GqaError("nothing to measure on", hint="--text FILE, --tasks NAME, --answers N or --prompts FILE")
    if asks and parent is None:
        raise GqaError("answers are compared with those of the parent", hint="--parent MODEL")
    if not asks and (unmet := [gate.text for gate in conditions if gate.of_answers]):
        raise GqaError("a gate asks for answers that are not compared", got=unmet[0], hint="--answers N")
    needs_text = ["--recall"] * (recall is not None) + [gate.text for gate in conditions if gate.of_text]
    if not texts and needs_text:
        raise GqaError("there is no text to measure on", got=needs_text[0], hint="--text FILE")
    if not tasks and (unmet := [gate.text for gate in conditions if gate.task]):
        raise GqaError("a gate asks for a task that is not run", got=unmet[0], hint="--tasks NAME")
    source = output.open_checkpoint(model)
    parent_source = output.open_checkpoint(parent) if parent else None
    context = parse_config(source.config, source.name).context or _WINDOW
    length = parse_tokens(window) if window else min(_WINDOW, context)
    text = read_text(texts, text_field) if texts else None
    assert source.folder is not None
    count = max(1, parse_tokens(tokens) // length) if tokens else None
    tokenizer = load_tokenizer(source.folder)
    windows = None if text is None else token_windows(text, tokenizer, length, count, seed)
    contexts = [parse_tokens(part) for part in lengths.split(",")] if lengths else [length]
    places = [parse_share(part) for part in depths.split(",")]
    most = parse_tokens(answer_tokens)
    read = read_prompts(prompts_file) if prompts_file else []
    parent_tokenizer = load_tokenizer(parent_source.folder) if asks and parent_source and parent_source.folder else None

    from gqa.evaluate import evaluate, load_model
    from gqa.evaluate.answers import compare_answers
    from gqa.evaluate.prompts import check_same_tokenizer, file_prompts, own_prompts
    from gqa.evaluate.recall import recall as measure_recall
    from gqa.model.sample import wants_chat

    if parent_tokenizer is not None:
        check_same_tokenizer(tokenizer, parent_tokenizer)
    ids = file_prompts(parent_tokenizer, read, chat=chat) if parent_tokenizer is not None else []
    asked = None
    if tasks:
        from gqa.evaluate.harness import Tasks

        asked = Tasks([name.strip() for name in tasks.split(",")], include_path)
    loaded = load_model(source.folder)
    loaded_parent = load_model(parent_source.folder) if parent_source and parent_source.folder else None
    results: dict[str, Any] = {}
    with output.progress() as progress:
        if windows is not None:
            results |= evaluate(loaded, windows, loaded_parent, batch, progress, positions=positions)
        if windows is not None and recall is not None:
            results["recall"] = measure_recall(
                loaded,
                tokenizer,
                windows.reshape(-1),
                tasks=[task.strip() for task in recall.split(",")],
                lengths=contexts,
                depths=places,
                samples=samples,
                seed=seed,
                parent=loaded_parent,
                progress=progress,
            )
        if parent_tokenizer is not None and loaded_parent is not None:
            right = [prompt.answers for prompt in read]
            if answers is not None:
                own = own_prompts(
                    loaded_parent, parent_tokenizer, answers, chat=chat, windows=windows, seed=seed, progress=progress
                )
                ids, right = [*own, *ids], [()] * len(own) + right
            results |= compare_answers(
                loaded, loaded_parent, parent_tokenizer, ids, right=right, max_tokens=most, progress=progress
            ).to_dict()
        if asked is not None:
            beside = None
            if loaded_parent is not None and parent_source and parent_source.folder:
                beside = (loaded_parent, load_tokenizer(parent_source.folder))
            results["tasks"] = asked.compare((loaded, tokenizer), beside, batch=batch, limit=limit, progress=progress)
    checks = [gate.check(results) for gate in conditions]
    if checks:
        results["gates"] = checks
    if windows is not None and length > context:
        output.note(f"note: the windows are longer than the model's context of {context} tokens")
    if as_json:
        inputs = {
            "model": model,
            "parent": parent,
            "texts": [str(path) for path in texts],
            "window": length if texts else None,
            "tokens": count and count * length,
            "batch": batch,
            "seed": seed,
            "recall": recall,
            "lengths": contexts if recall else None,
            "depths": places if recall else None,
            "samples": samples if recall else None,
            "answers": answers,
            "prompts_file": prompts_file and str(prompts_file),
            "answer_tokens": most if asks else None,
            "chat": wants_chat(tokenizer, chat) if asks else None,
            "tasks": tasks,
            "include_path": include_path,
            "limit": limit,
            "gates": list(gates),
            "dtype": str(loaded.dtype).removeprefix("torch."),
        }
        assumptions = (_OF_TEXT if texts else ()) + (_OF_ANSWERS if asks else ()) + (_OF_TASKS if tasks else ())
        versions = describe_versions(*(["lm_eval"] if tasks else []))
        basis = dict.fromkeys(results, "measured")
        output.record(Record("eval", inputs, results, basis, assumptions, versions=versions))
    else:
        eval_table.show(results, source.name)
    if not all(check["passed"] for check in checks):
        click.get_current_context().exit(1)
