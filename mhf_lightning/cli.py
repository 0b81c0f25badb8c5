"""The ``mhf`` command: ``fit``, ``validate``, ``test``, ``predict`` by LightningCLI, and ``data`` for corpora.

Torch and Lightning are imported only by the commands that need them, so that ``mhf --help`` answers at once.
"""

import difflib
import sys
from importlib import import_module

from mhf_lightning import __version__
from mhf_lightning.output import flush, leave_closed_pipe
from mhf_lightning.signals import block_stop_signals

HELP = f"""mhf {__version__}: pretrain language models with FlashMHF feed-forward layers

usage: mhf COMMAND [options]

  mhf data prepare     tokenise and pack a corpus (text, jsonl, parquet, Hub datasets)
  mhf data inspect     show what a prepared corpus holds
  mhf data verify      check a prepared corpus against its hashes
  mhf fit              train; --ckpt_path auto starts a run or continues it
  mhf validate         loss and perplexity on the validation split
  mhf test             the same, logged as test
  mhf predict          loss of every validation block, as predictions.jsonl in the run folder
  mhf export           a trained model as one safetensors file, or as a Hugging Face folder
  mhf import           a Hugging Face folder (ours, a Llama, or the authors') as the start of a run
  mhf generate         continue a prompt with a trained model
  mhf eval             perplexity of texts and tasks of lm-eval, into the run folder
  mhf runs             one line per run of a folder: state, steps, loss, restarts, goodput, last checkpoint
  mhf plan             memory per GPU, FLOPs and days of a run, worked out without GPU and data
  mhf bench layer      time and memory of FlashMHF, SwiGLU and others; table, CSV, plot
  mhf bench model      latency, training step and memory of whole models
  mhf bench generate   speed of reading a prompt and of generating, token by token
  mhf bench scaling    training on several GPUs: speed, memory, parity, checkpoints
  mhf report           compare runs on one HTML page: curves, speed, memory, router, configuration
  mhf evidence         the project's own comparison of the variants: corpus, list of runs, table

  mhf COMMAND --help               all options of a command
  mhf fit --print_config           all options with the values they would have
  mhf fit --allow-import PREFIX    let configs name classes of this package too (class_path, callables)
  mhf --print_completion=shtab-bash   completion script (also shtab-zsh, shtab-fish); source its output
  mhf --version

Options come from the command line and from any number of --config files; what stands later wins.
"""

# Module of each command that is not LightningCLI's; its main(arguments) returns the exit code.
COMMANDS = {
    "data": "mhf_lightning.data.cli",
    "export": "mhf_lightning.checkpoint.export",
    "import": "mhf_lightning.hf.cli",
    "generate": "mhf_lightning.generation.cli",
    "eval": "mhf_lightning.evaluation.cli",
    "runs": "mhf_lightning.runs.cli",
    "plan": "mhf_lightning.plan.cli",
    "bench": "mhf_lightning.bench.cli",
    "report": "mhf_lightning.report.cli",
    "evidence": "mhf_lightning.evidence.cli",
}
LIGHTNING_COMMANDS = ("fit", "validate", "test", "predict")


def main(args: list[str] | None = None) -> None:
    """Run the command line; errors that a user can mend end with a message and exit code 2."""
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP, end="")
    elif args[0] == "--version":
        print(f"mhf-lightning {__version__}")
    elif args[0] in COMMANDS:
        try:
            code = import_module(COMMANDS[args[0]]).main(args[1:])
            sys.stdout.flush()
            sys.exit(code)
        except KeyboardInterrupt:
            print("\nmhf: interrupted", file=sys.stderr)
            sys.exit(130)
        except BrokenPipeError as error:  # mhf runs | head
            leave_closed_pipe(error, sys.stdout.fileno())
            sys.exit(1)
    elif args[0] not in LIGHTNING_COMMANDS and not args[0].startswith("-"):
        commands = (*COMMANDS, *LIGHTNING_COMMANDS)
        near = difflib.get_close_matches(args[0], commands, n=1)
        meant = f"did you mean mhf {near[0]}?" if near else "see mhf --help"
        print(f"mhf: error: there is no command {args[0]!r} ({', '.join(sorted(commands))}); {meant}", file=sys.stderr)
        sys.exit(2)
    else:
        if args[0] == "fit":
            block_stop_signals()
        try:
            from mhf_lightning.training.cli import run
        except KeyboardInterrupt:  # the import takes seconds
            sys.exit("mhf: interrupted before anything was begun")
        try:
            run(args)
        finally:
            flush()


if __name__ == "__main__":
    main()
