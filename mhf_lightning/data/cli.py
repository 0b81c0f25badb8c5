"""`mhf data prepare | inspect | verify`. Exit codes: 0 well, 1 `verify` found a bad file, 2 wrong use or bad input."""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import Namespace

from mhf_lightning.data.errors import DataError
from mhf_lightning.data.manifest import SPLITS, Manifest, verify
from mhf_lightning.data.prepare import prepare
from mhf_lightning.data.progress import say
from mhf_lightning.parsing import SuggestingParser

_SAMPLE_CHARACTERS = 600


def build_parser() -> SuggestingParser:
    """The parser of `mhf data`, for shell completion too."""
    parser = SuggestingParser(
        prog="mhf data", description="Make a dataset for training from text, look at it, check it."
    )
    add_data_commands(parser.add_subcommands(dest="command", required=True))
    return parser


def add_data_commands(subcommands: Any) -> None:
    """Add prepare, inspect and verify to the subcommands of a jsonargparse parser."""
    parser = SuggestingParser(description="Tokenise a corpus and pack it into blocks for training.")
    parser.add_argument("--config", action="config", help="YAML file with any of the options below, and inputs.")
    # Suppressed, since jsonargparse would put the default, an empty list, over the inputs of a config file.
    parser.add_argument(
        "inputs", nargs="*", type=str, default=argparse.SUPPRESS, metavar="INPUT", help="What to read: see below."
    )
    parser.add_function_arguments(prepare, skip={"inputs"})
    parser.epilog = (
        "INPUT: a file (.txt, .jsonl, .jsonl.zst, .parquet; any other is one plain-text document), a folder of them, "
        "a glob such as 'src/**/*.py', hf://NAME[@CONFIG][:SPLIT] for a Hugging Face dataset, or python-stdlib for "
        "the sources of Python's standard library."
    )
    subcommands.add_subcommand("prepare", parser, help="tokenise and pack a corpus")

    parser = SuggestingParser(description="Show counts, document lengths and decoded samples of a prepared dataset.")
    parser.add_argument("dir", metavar="DIR", type=str, help="A prepared dataset.")
    parser.add_argument(
        "--samples", type=int, default=3, help="Decoded blocks to show, evenly over the training split."
    )
    subcommands.add_subcommand("inspect", parser, help="show counts, lengths and samples")

    parser = SuggestingParser(description="Hash every file of a prepared dataset again; exit code 1 if one is bad.")
    parser.add_argument("dir", metavar="DIR", type=str, help="A prepared dataset.")
    subcommands.add_subcommand("verify", parser, help="hash every file again")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mhf data` with the arguments after "data"; returns the exit code. Errors are one message on stderr."""
    arguments = [_underscored(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    config = build_parser().parse_args(arguments)
    commands: dict[str, Callable[[Namespace], int]] = {"prepare": _prepare, "inspect": _inspect, "verify": _verify}
    try:
        return commands[config.command](config[config.command])
    except (DataError, OSError) as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say("interrupted; nothing was written")
        return 130


def _underscored(argument: str) -> str:
    """Accept --skip-bad for --skip_bad."""
    return re.sub(r"^--[^=]*", lambda match: "--" + match[0][2:].replace("-", "_"), argument)


def _prepare(config: Namespace) -> int:
    arguments = {name: value for name, value in config.as_dict().items() if name != "config"}
    # SIGTERM (a cancelled job) must remove the temporary folder as Ctrl-C does.
    previous = signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    try:
        manifest = prepare(**{"inputs": [], **arguments})
    finally:
        signal.signal(signal.SIGTERM, previous)
    for name in SPLITS:
        split = manifest.splits[name]
        print(f"{name}: {split.documents:,} documents, {split.tokens:,} tokens, {split.blocks:,} blocks")
    print(f"vocabulary: {manifest.vocab_size:,} tokens (model.decoder.vocab_size must be at least this)")
    print(f"ready: {config.out}")
    return 0


def _verify(config: Namespace) -> int:
    Manifest.load(config.dir)  # a folder that is no dataset is wrong use: exit code 2
    try:
        manifest = verify(config.dir, on_file=lambda entry: print(f"ok  {entry.file}  {entry.bytes:,} bytes"))
    except DataError as error:
        say(f"bad: {error}")
        return 1
    print(f"{len(manifest.files())} files match manifest.json")
    return 0


def _inspect(config: Namespace) -> int:
    from rich.console import Console

    manifest = Manifest.load(config.dir)
    console = Console()
    for table in _tables(manifest):
        console.print(table)
    for title, text in _samples(config.dir, manifest, config.samples):
        console.rule(title)
        console.print(text, markup=False, highlight=False)
    return 0


def _tables(manifest: Manifest) -> list[Any]:
    from rich.table import Table

    about = Table("", "value", title="dataset")
    for name in ("context_length", "vocab_size", "largest_token_id", "eos_token", "eos_id", "token_dtype"):
        about.add_row(name, str(getattr(manifest, name)))
    about.add_row("inputs", ", ".join(manifest.inputs))
    about.add_row("skipped documents", f"{manifest.empty_documents} empty, {manifest.bad_documents} bad")
    about.add_row("fingerprint", manifest.fingerprint[:16])

    splits = [manifest.splits[name] for name in SPLITS]
    counts = Table("", *SPLITS, title="splits")
    for name in ("documents", "tokens", "text_bytes", "blocks"):
        counts.add_row(name, *(f"{getattr(split, name):,}" for split in splits))
    counts.add_row("bytes per token", *(f"{split.text_bytes / split.tokens:.3f}" for split in splits))
    counts.add_row("shards", *(str(len(split.shards)) for split in splits))

    lengths = Table("", *SPLITS, title="document lengths in tokens, with EOS; then documents per bin")
    for name in ("min", "mean", "max"):
        lengths.add_row(name, *(f"{getattr(split.lengths, name):,}" for split in splits))
    for percent in splits[0].lengths.quantiles:
        lengths.add_row(f"{percent}%", *(f"{split.lengths.quantiles[percent]:,}" for split in splits))
    lengths.add_section()
    for edge in sorted({int(edge) for split in splits for edge in split.lengths.histogram}):
        row = (f"{split.lengths.histogram.get(str(edge), 0):,}" for split in splits)
        lengths.add_row(f"{edge:,} to {2 * edge - 1:,}", *row)
    return [about, counts, lengths]


def _samples(folder: str, manifest: Manifest, count: int) -> list[tuple[str, str]]:
    """Titles and decoded beginnings of `count` training blocks, evenly spread."""
    import datasets

    from mhf_lightning.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder, manifest.eos_token)
    split = manifest.splits["train"]
    samples = []
    for block in sorted({number * split.blocks // count for number in range(count)}):
        row = block
        for shard in split.shards:
            if row < shard.rows:
                tokens = datasets.Dataset.from_file(f"{folder}/{shard.file}")[row]["tokens"]
                text = tokenizer.decode(tokens, skip_special_tokens=False)
                more = " ..." if len(text) > _SAMPLE_CHARACTERS else ""
                samples.append((f"train block {block}", text[:_SAMPLE_CHARACTERS] + more))
                break
            row -= shard.rows
    return samples


if __name__ == "__main__":
    sys.exit(main())
