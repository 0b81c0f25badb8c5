"""The tasks of lm-eval: its interface to a model, over a decoder and the tokenizer of its dataset."""

from __future__ import annotations

import difflib
import logging
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from rich.progress import track

from mhf_lightning.checkpoint.trained import Vocabulary
from mhf_lightning.evaluation.results import Results
from mhf_lightning.evaluation.scoring import score, windows
from mhf_lightning.model import Decoder
from mhf_lightning.model.generate import generate


class DecoderLM(TemplateLM):
    """A decoder as lm-eval sees it: text in, log-likelihoods and text out."""

    def __init__(self, decoder: Decoder, vocabulary: Vocabulary, batch_size: int) -> None:
        super().__init__()
        self.decoder, self.vocabulary, self.batch_size = decoder, vocabulary, batch_size

    @property
    def eot_token_id(self) -> int:
        """The token that ends documents; empty contexts begin with it."""
        return self.vocabulary.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Encode a text; our tokenizers never add a special token."""
        return self.vocabulary.tokenizer.encode(string).ids

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        room = self.vocabulary.context_length + 1  # the last token is not read
        sequences = []
        for (_, continuation), context_ids, ids in requests:
            if not 1 <= len(ids) < room:
                raise ValueError(
                    f"a continuation of {len(ids)} tokens cannot be scored in a context of {room - 1}: "
                    f"{continuation[:60]!r}"
                )
            sequences.append(((context_ids + ids)[-room:], len(ids)))
        # In pieces, for the progress bar, and so that each holds sequences of many lengths.
        pieces = [sequences[start : start + 1024] for start in range(0, len(sequences), 1024)]
        shown = track(pieces, "log-likelihoods", transient=True, disable=disable_tqdm)
        return [
            (one.log_likelihood, one.is_greedy)
            for piece in shown
            for one in score(self.decoder, piece, self.batch_size)
        ]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, in windows that each have as much context as the model reads."""
        context, totals = self.vocabulary.context_length, []
        for request in requests:
            ids = [self.eot_token_id, *self.tok_encode(request.args[0])]
            cut = [(ids[start:end], count) for start, end, count in windows(len(ids), context, context)]
            totals.append(sum(one.log_likelihood for one in score(self.decoder, cut, self.batch_size)))
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Continue texts until one of the task's stop strings; a long text loses its beginning.

        At most half of the context is kept free for what the task wants written: its wish may be longer than all of it.
        """
        texts = []
        device = self.decoder.embedding.weight.device
        for request in track(requests, "generating", transient=True, disable=disable_tqdm):
            text, options = request.args
            wanted = normalize_gen_kwargs(options)
            ids, context = self.tok_encode(text) or [self.eot_token_id], self.vocabulary.context_length
            count = min(wanted["max_gen_toks"], max(context - len(ids), context // 2))
            ids, new, written = ids[-(context - count) :], [], ""
            for token in generate(
                self.decoder,
                [torch.tensor(ids, device=device)],
                count,
                temperature=wanted.get("temperature", 0.0),
                top_p=wanted.get("top_p", 1.0),
                stop_id=self.eot_token_id,
            ):
                new.append(int(token))
                written = self.vocabulary.tokenizer.decode(new)
                if any(stop in written for stop in wanted["until"]):
                    break
            texts.append(postprocess_generated_text(written, wanted["until"], None))
        return texts


def find_tasks(tasks: list[str], task_dir: Path | None) -> TaskManager:
    """Find tasks or groups by name, in lm-eval and ``task_dir``, and see that their data can be read.

    Raises:
        ValueError: A task is unknown, or its data is not there.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _manager(tasks, task_dir)
    for task in tasks:
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"lm-eval knows no task {task!r}{hint} (--task_dir adds a folder of task files)")
        try:
            manager.load([task])
        except Exception as error:  # whatever reading a data set of the Hub, of files or of a script can raise
            raise ValueError(_absent(task, error)) from error
    return manager


def evaluate_tasks(
    decoder: Decoder,
    vocabulary: Vocabulary,
    tasks: list[str],
    manager: TaskManager,
    *,
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int,
) -> tuple[Results, dict[str, Any]]:
    """Run tasks of lm-eval.

    Args:
        decoder: In evaluation mode.
        vocabulary: Its tokenizer and context.
        tasks: Names of tasks or groups.
        manager: Of :func:`find_tasks`.
        num_fewshot: Examples before each question; None is each task's own number.
        limit: Questions of each task at most.
        batch_size: Sequences of a forward.

    Returns:
        Metrics by task, standard errors as ``METRIC_stderr``; and lm-eval's version, the settings and numbers of
        questions.
    """
    found: Any = lm_eval.simple_evaluate(
        DecoderLM(decoder, vocabulary, batch_size),
        tasks=list(tasks),
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        log_samples=False,
        bootstrap_iters=1000,  # of metrics whose error has no formula
    )
    results = {
        task: {
            key.removesuffix(",none").replace(",", "_"): float(value)
            for key, value in metrics.items()
            if isinstance(value, int | float) and key != "sample_len"
        }
        for task, metrics in found["results"].items()
    }
    return results, {
        "lm_eval": lm_eval.__version__,
        "samples": found["n-samples"],
        "num_fewshot": found["n-shot"],
        "limit": limit,
    }


def _manager(tasks: list[str], task_dir: Path | None) -> TaskManager:
    """Index the task files; lm-eval's own, thousands, only where one's own do not suffice."""
    if task_dir is None:
        return TaskManager()
    if not task_dir.is_dir():
        raise ValueError(f"--task_dir {task_dir} is no folder")
    own = TaskManager(include_path=str(task_dir), include_defaults=False)
    return own if set(tasks) <= set(own.all_subtasks) else TaskManager(include_path=str(task_dir))


def _absent(task: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"the data of the task {task!r} could not be read ({reason}). Where there is a network, run "
        f"'HF_HOME=FOLDER mhf eval RUN --tasks {task} --limit 1'; then bring FOLDER here, and set HF_HOME=FOLDER and "
        f"HF_HUB_OFFLINE=1"
    )
