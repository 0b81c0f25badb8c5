"""`mhf eval`: local tasks with known answers, perplexity of files, where results go, and what is refused."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
import yaml
from made_run import CONTEXT, VOCAB, build, make_run, mhf, one_line
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_scoring import log_likelihoods

from mhf_lightning.checkpoint.trained import read_trained, read_vocabulary
from mhf_lightning.evaluation import tasks as module
from mhf_lightning.evaluation.results import write_results

QUESTIONS = [
    {"question": f"def f{i}(", "choices": [" self", " x, y", " *args):\n    return"], "answer": i % 3}
    for i in range(12)
]
TEXTS = ["import json\n" * 12, "x = 1\n", "class A:\n    pass\n" * 5]


def write_task(folder, name: str, rows: list[dict], **config) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, "test_split": "test", **config}))


@pytest.fixture
def tasks(tmp_path):
    """Three local tasks, one of each kind of request."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    choice = {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}"}
    choice |= {"target_delimiter": "", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
    write_task(folder, "choose", QUESTIONS, doc_to_target="answer", **choice)
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    rolling["metric_list"] = [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}]
    write_task(folder, "roll", [{"text": text} for text in TEXTS], **rolling)
    return folder


def values(run, tag: str) -> dict[int, float]:
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def test_tasks_score_what_the_model_says(made_run, tasks, capsys):
    encode = read_vocabulary(read_trained(made_run)).tokenizer.encode
    right = normed = 0
    for row in QUESTIONS:
        sums = []
        for choice in row["choices"]:
            ids, context = encode(row["question"] + choice).ids, encode(row["question"]).ids
            sums.append(float(log_likelihoods(build(), ids)[len(context) - 1 :].sum()))
        right += sums.index(max(sums)) == row["answer"]
        by_length = [one / len(choice) for one, choice in zip(sums, row["choices"], strict=True)]
        normed += by_length.index(max(by_length)) == row["answer"]
    assert 0 < right < 12
    out, _ = mhf(capsys, "eval", str(made_run), "--tasks", "choose,roll", "--task_dir", str(tasks))
    found = json.loads((made_run / "eval/choose-roll-step-7.json").read_text())
    assert (found["kind"], found["step"], found["tokens_seen"], found["checkpoint"]) == ("tasks", 7, 700, "step-7")
    assert found["results"]["choose"]["acc"] == pytest.approx(right / 12)
    assert found["results"]["choose"]["acc_norm"] == pytest.approx(normed / 12)
    share = right / 12
    assert found["results"]["choose"]["acc_stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 11))
    assert found["samples"]["choose"]["effective"] == 12
    assert values(made_run, "eval/choose/acc") == {6: pytest.approx(share)}
    assert f"{share:.4f}" in out

    # lm-eval's rolling likelihood, and the perplexity of the same texts without overlap, are the same number.
    (tasks / "texts.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    options = ("--perplexity", str(tasks / "texts.jsonl"), "--text_key", "body", "--stride", str(CONTEXT))
    mhf(capsys, "eval", str(made_run), *options)
    text = json.loads((made_run / "eval/perplexity-step-7.json").read_text())
    bits = text["results"]["perplexity"]["bits_per_byte"]
    assert found["results"]["roll"]["bits_per_byte"] == pytest.approx(bits, rel=1e-6)


def test_generated_answers_stop_where_the_task_says(made_run, tasks, capsys):
    """The expected answers come from uncached greedy forwards; the stop is a text that one of them holds."""
    tokenizer = read_vocabulary(read_trained(made_run)).tokenizer
    prompts, answers = ["def f(", "import", "class A", "return x" * 30], []
    for prompt in prompts:
        ids = tokenizer.encode(prompt).ids[-(CONTEXT - 6) :]
        start = len(ids)
        with torch.no_grad():
            for _ in range(6):
                ids = [*ids, int(build()(torch.tensor([ids]))[0, -1].argmax())]
        answers.append(tokenizer.decode(ids[start:]))
    stop = answers[0][2]
    expected = [answer.split(stop)[0] for answer in answers]
    assert expected[0] != answers[0]
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, expected, strict=True)]
    rows[1]["answer"] += "wrong"
    options = {"output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": "{{answer}}"}
    options["generation_kwargs"] = {"until": [stop], "max_gen_toks": 6, "do_sample": False}
    write_task(tasks, "write", rows, metric_list=[{"metric": "exact_match"}], **options)
    mhf(capsys, "eval", str(made_run), "--tasks", "write", "--task_dir", str(tasks))
    found = json.loads((made_run / "eval/write-step-7.json").read_text())
    assert found["results"]["write"]["exact_match"] == pytest.approx(3 / 4)


def test_an_answer_longer_than_the_context_leaves_the_question_whole(made_run, tasks, capsys, monkeypatch):
    prompts = []

    def recorded(decoder, sequences, count, **options):
        prompts.append((len(sequences[0]), count))
        return generate(decoder, sequences, count, **options)

    generate = module.generate
    monkeypatch.setattr(module, "generate", recorded)
    options = {"output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": "x"}
    options["generation_kwargs"] = {"until": ["\n\n\n"], "max_gen_toks": 256, "do_sample": False}
    rows = [{"prompt": "import json"}, {"prompt": "x = 1\n" * 200}]
    write_task(tasks, "long", rows, metric_list=[{"metric": "exact_match"}], **options)
    mhf(capsys, "eval", str(made_run), "--tasks", "long", "--task_dir", str(tasks))
    encode = read_vocabulary(read_trained(made_run)).tokenizer.encode
    short = len(encode(rows[0]["prompt"]).ids)
    assert short < CONTEXT // 2 < len(encode(rows[1]["prompt"]).ids)
    assert prompts == [(short, CONTEXT - short), (CONTEXT - CONTEXT // 2, CONTEXT // 2)]


def test_results_of_other_tasks_and_settings_do_not_replace_each_other(made_run, tasks, capsys):
    options = ("eval", str(made_run), "--task_dir", str(tasks), "--tasks")
    mhf(capsys, *options, "choose")
    whole = values(made_run, "eval/choose/acc")
    mhf(capsys, *options, "roll")
    mhf(capsys, *options, "choose", "--limit", "2")
    mhf(capsys, *options, "choose", "--num_fewshot", "1", "--limit", "3")
    mhf(capsys, *options, "choose", "--limit", "1", "--name", "trial")
    names = ("choose", "roll", "choose-limit-2", "choose-fewshot-1-limit-3", "trial-limit-1")
    assert {path.name for path in (made_run / "eval").iterdir()} == {f"{name}-step-7.json" for name in names}
    files = {name: json.loads((made_run / f"eval/{name}-step-7.json").read_text()) for name in names}
    assert [files[name]["limit"] for name in names] == [None, None, 2, 3, 1]
    assert [files[name]["name"] for name in names] == list(names)
    assert list(files["trial-limit-1"]["results"]) == ["choose-limit-1"]
    assert values(made_run, "eval/choose/acc") == whole
    assert len(values(made_run, "eval/choose-limit-2/acc")) == 1


def test_bad_documents_are_left_out_where_that_is_asked_for(made_run, tmp_path, capsys):
    (tmp_path / "texts.jsonl").write_text('{"text": "x = 1"}\n{"text": \n{"text": "y = 2"}\n')
    options = ("eval", str(made_run), "--perplexity", str(tmp_path / "texts.jsonl"))
    assert "with --skip_bad N" in one_line(mhf(capsys, *options, code=2))
    mhf(capsys, *options, "--skip_bad", "1")
    found = json.loads((made_run / "eval/perplexity-step-7.json").read_text())
    assert (len(found["documents"]), found["bad_documents"]) == (2, 1)


def test_perplexity_of_files_is_written_by_document(made_run, made_corpus, tmp_path, capsys):
    decoder = build(tie_embeddings=False)
    torch.nn.init.zeros_(decoder.head.weight)
    make_run(made_run, decoder, made_corpus, step=9)
    for name, text in zip("abc", TEXTS, strict=True):
        (tmp_path / f"{name}.txt").write_text(text)
    out, _ = mhf(capsys, "eval", str(made_run), "--perplexity", str(tmp_path / "*.txt"), "--name", "mine")
    found = json.loads((made_run / "eval/mine-step-9.json").read_text())
    assert found["results"]["mine"]["perplexity"] == pytest.approx(VOCAB, rel=1e-5)
    assert found["stride"] == CONTEXT // 2
    assert found["bytes"] == sum(map(len, TEXTS))
    assert [document["bytes"] for document in found["documents"]] == list(map(len, TEXTS))
    assert found["tokens"] == sum(document["tokens"] for document in found["documents"])
    assert values(made_run, "eval/mine/perplexity") == {8: pytest.approx(VOCAB, rel=1e-5)}
    assert str(VOCAB) in out
    assert "eval/mine-step-9.json" in out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "nothing to evaluate"),
        (("--tasks", "chose"), "knows no task 'chose'; did you mean 'choose'?"),
        (("--tasks", "lost"), "lost.jsonl"),
        (("--tasks", "long"), f"cannot be scored in a context of {CONTEXT}"),
        (("--perplexity", "nowhere.txt"), "'nowhere.txt' does not exist"),
        (("--perplexity", "{empty}"), "there is no text in it"),
        (("--perplexity", "{empty}", "--stride", "99"), "stride is 99"),
        (("--perplexity", "{empty}", "--name", "a/b"), "--name is 'a/b'"),
        (("--perplexity", "{empty}", "--batch_size", "0"), "--batch_size is 0"),
        (("--perplexity", "{empty}", "--tasks", "choose", "--name", "a"), "in two calls, or no name"),
        (("--tasks", "choose", "--limit", "0"), "--limit is 0; it must be at least 1"),
        (("--tasks", "choose", "--num_fewshot", "-1"), "--num_fewshot is -1; it must be at least 0"),
        (("--tasks", ",".join(["choose"] * 40)), "40 tasks are too many to name the result after: give --name"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(args, words, made_run, tasks, tmp_path, capsys):
    choice = {"output_type": "multiple_choice", "doc_to_text": "q", "doc_to_choice": "{{choices}}", "doc_to_target": 0}
    write_task(tasks, "lost", [], **choice)
    (tasks / "lost.jsonl").unlink()
    write_task(tasks, "long", [{"choices": ["x" * 300, "y"]}], **choice)
    (tmp_path / "empty.txt").write_text("")
    args = [arg.format(empty=tmp_path / "empty.txt") for arg in args]
    printed = mhf(capsys, "eval", str(made_run), "--task_dir", str(tasks), *args, code=2)
    error = printed[1].strip().splitlines()[-1]
    assert error.startswith("mhf: error: ")
    assert words in error
    assert "Traceback" not in printed[1]
    assert not (made_run / "eval").exists()


def test_a_task_without_data_is_noticed_before_texts_are_scored(made_run, tasks, capsys, monkeypatch):
    monkeypatch.setattr("mhf_lightning.checkpoint.trained.read_trained", None)  # no weights are read either
    (tasks / "choose.jsonl").unlink()
    options = ("--tasks", "choose", "--task_dir", str(tasks), "--perplexity", __file__)
    printed = mhf(capsys, "eval", str(made_run), *options, code=2)
    assert "the data of the task 'choose' could not be read" in printed[1].splitlines()[-1]


def test_without_the_package_the_way_out_is_named_before_texts_are_scored(made_run, capsys, monkeypatch):
    monkeypatch.setattr("mhf_lightning.checkpoint.trained.read_trained", None)
    monkeypatch.delitem(sys.modules, "mhf_lightning.evaluation.tasks", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    options = ("--tasks", "hellaswag", "--perplexity", __file__)
    error = one_line(mhf(capsys, "eval", str(made_run), *options, code=2))
    assert "pip install 'mhf-lightning[eval]'" in error


@pytest.mark.slow
def test_lm_eval_has_the_tasks_of_the_paper():
    from lm_eval.tasks import TaskManager

    paper = {"hellaswag", "social_iqa", "piqa", "openbookqa", "winogrande", "race"}
    assert paper <= set(TaskManager().all_tasks)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["hellaswag", "race"])
def test_a_task_whose_data_is_absent_says_how_to_get_it(task, made_run, tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mhf_lightning.cli", "eval", str(made_run), "--tasks", task]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    error = done.stderr.strip().splitlines()[-1]
    assert f"the data of the task {task!r} could not be read" in error
    assert f"HF_HOME=FOLDER mhf eval RUN --tasks {task} --limit 1" in error
    assert "Traceback" not in done.stderr


def test_a_run_folder_that_takes_nothing_is_named_before_the_work(made_run, tmp_path, capsys):
    (made_run / "eval").write_text("in the way")
    (tmp_path / "a.txt").write_text("x = 1")
    printed = mhf(capsys, "eval", str(made_run), "--perplexity", str(tmp_path / "a.txt"), code=2)
    assert "results cannot be written to" in one_line(printed)
    assert "wrote" not in printed[0]


def test_what_is_no_number_is_null_everywhere(made_run):
    trained = read_trained(made_run)
    path = write_results(trained, "tasks", "odd", {"a": {"nll": math.nan}}, {"documents": [{"nll": math.inf, "n": 2}]})
    content = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert (content["results"], content["documents"]) == ({"a": {"nll": None}}, [{"nll": None, "n": 2}])
