"""``mhf eval``: perplexity of texts and tasks of lm-eval, into the run folder."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhf_lightning.errors import readable_errors
from mhf_lightning.parsing import SuggestingParser

if TYPE_CHECKING:
    from mhf_lightning.checkpoint.trained import Trained
    from mhf_lightning.evaluation.results import Results


def build_parser() -> SuggestingParser:
    """The options of ``mhf eval``."""
    parser = SuggestingParser(
        prog="mhf eval",
        description="Evaluate a trained model. Results go to RUN/eval/*.json, TensorBoard and the terminal.",
    )
    parser.add_argument("run", metavar="RUN", type=str, help="Folder of a run, or one of its checkpoints (.../step-N).")
    parser.add_argument(
        "--tasks",
        type=str | None,
        default=None,
        help="Tasks of lm-eval, with commas (pip install mhf-lightning[eval]).",
    )
    parser.add_argument(
        "--perplexity",
        metavar="FILE",
        nargs="+",
        type=str,
        default=[],
        help="Texts: files, folders, globs or hf://NAME, as for mhf data prepare. A document is scored by itself.",
    )
    parser.add_argument(
        "--stride",
        type=int | None,
        default=None,
        help="perplexity: tokens that each window of a long document scores; default half the context.",
    )
    parser.add_argument("--text_key", type=str, default="text", help="perplexity: key or column with the text.")
    parser.add_argument(
        "--skip_bad", metavar="N", type=int, default=0, help="perplexity: bad documents to leave out at most."
    )
    parser.add_argument(
        "--name", type=str | None, default=None, help="What to call the result; default perplexity, or the tasks."
    )
    parser.add_argument("--task_dir", type=str | None, default=None, help="tasks: folder with task YAML of your own.")
    parser.add_argument(
        "--num_fewshot", type=int | None, default=None, help="tasks: examples; default each task's own."
    )
    parser.add_argument("--limit", type=int | None, default=None, help="tasks: questions of each at most.")
    parser.add_argument("--batch_size", type=int, default=8, help="Sequences of a forward.")
    parser.add_argument(
        "--data", type=str | None, default=None, help="Dataset with the tokenizer; default that of the run."
    )
    return parser


def main(args: list[str]) -> int:
    """Run ``mhf eval``; return the exit code."""
    options = build_parser().parse_args(args)
    with readable_errors():
        tasks = [task.strip() for task in (options.tasks or "").split(",") if task.strip()]
        if not tasks and not options.perplexity:
            raise ValueError("there is nothing to evaluate: give --tasks NAMES or --perplexity FILES")
        if options.batch_size < 1:
            raise ValueError(f"--batch_size is {options.batch_size}; it must be at least 1")
        if options.name is not None and tasks and options.perplexity:
            raise ValueError(
                "--name would be that of two results: give --tasks and --perplexity in two calls, or no name"
            )
        for key, least in (("limit", 1), ("num_fewshot", 0)):
            value = getattr(options, key)
            if value is not None and value < least:
                raise ValueError(f"--{key} is {value}; it must be at least {least}")
        settings = _settings(options)
        name = options.name + (settings if tasks else "") if options.name else None
        name = name or (_named_after(tasks, settings) if tasks else "perplexity")
        if not re.fullmatch(r"[\w.-]{1,200}", name):
            raise ValueError(f"--name is {name!r}; give letters, digits, '.', '_' and '-' only, 200 at most")
        if tasks:  # before anything that takes long
            try:
                from mhf_lightning.evaluation.tasks import evaluate_tasks, find_tasks
            except ImportError as error:
                raise ValueError(f"lm-eval is not installed ({error}): pip install 'mhf-lightning[eval]'") from error
            manager = find_tasks(tasks, Path(options.task_dir) if options.task_dir else None)
        import torch

        from mhf_lightning.checkpoint.trained import read_trained, read_vocabulary
        from mhf_lightning.evaluation.results import check_writable

        trained = read_trained(Path(options.run))
        check_writable(trained)
        vocabulary = read_vocabulary(trained, Path(options.data) if options.data else None)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        decoder = trained.decoder(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        if options.perplexity:
            text_name = "perplexity" if tasks else name
            _report(trained, "perplexity", text_name, *_perplexity(decoder, vocabulary, text_name, options))
        if tasks:
            results, details = evaluate_tasks(
                decoder,
                vocabulary,
                tasks,
                manager,
                num_fewshot=options.num_fewshot,
                limit=options.limit,
                batch_size=options.batch_size,
            )
            results = {task + settings: metrics for task, metrics in results.items()}
            _report(trained, "tasks", name, results, details)
    return 0


def _settings(options: Any) -> str:
    """Name what makes the figures of a task differ from those of its own settings, so that they are not mixed up."""
    given = {"fewshot": options.num_fewshot, "limit": options.limit}
    return "".join(f"-{option}-{value}" for option, value in given.items() if value is not None)


def _named_after(tasks: list[str], settings: str) -> str:
    name = re.sub(r"[^\w.-]", "_", "-".join(tasks)) + settings
    if len(name) > 200:
        raise ValueError(f"{len(tasks)} tasks are too many to name the result after: give --name")
    return name


def _perplexity(decoder: Any, vocabulary: Any, name: str, options: Any) -> tuple[Results, dict[str, Any]]:
    from mhf_lightning.data.progress import say
    from mhf_lightning.data.sources import BadDocuments, read_documents, resolve_inputs
    from mhf_lightning.evaluation.perplexity import TextLoss, text_losses

    stride = options.stride if options.stride is not None else max(1, vocabulary.context_length // 2)
    bad = BadDocuments(options.skip_bad, say)
    documents = read_documents(resolve_inputs(options.perplexity), options.text_key, bad)
    losses = list(text_losses(decoder, vocabulary, documents, stride=stride, batch_size=options.batch_size))
    if not losses:
        raise ValueError(f"{', '.join(options.perplexity)}: there is no text in it")
    total = TextLoss.total(name, losses)
    details = {
        "files": list(options.perplexity),
        "context_length": vocabulary.context_length,
        "stride": stride,
        "tokens": total.tokens,
        "bytes": total.bytes,
        "bad_documents": bad.count,
        "documents": [{**asdict(loss), **loss.figures()} for loss in losses],
    }
    return {name: total.figures()}, details


def _report(trained: Trained, kind: str, name: str, results: Results, details: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from mhf_lightning.evaluation.results import write_results

    table = Table("", "metric", "value", title=f"step {trained.step:,}")
    for task, metrics in results.items():
        for metric, value in metrics.items():
            table.add_row(task, metric, f"{value:,.4f}")
    console = Console(highlight=False)
    console.print(table)
    path = write_results(trained, kind, name, results, details)
    console.print(f"wrote {path}" if path else "not written: the checkpoint lies in no run folder", soft_wrap=True)
