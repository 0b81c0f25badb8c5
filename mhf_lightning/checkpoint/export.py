"""``mhf export``: a trained model as one file, or as a folder for others, from any sharded checkpoint.

Imports ``files.py`` and ``trained.py``, and ``mhf_lightning.hf`` for such a folder, when it runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mhf_lightning.errors import readable_errors
from mhf_lightning.parsing import SuggestingParser

if TYPE_CHECKING:
    from mhf_lightning.checkpoint.trained import Trained


def build_parser() -> SuggestingParser:
    """The options of ``mhf export``."""
    parser = SuggestingParser(prog="mhf export", description="Write a trained model for use elsewhere.")
    parser.add_argument("run", metavar="RUN", type=str, help="Folder of a run, or one of its checkpoints (.../step-N).")
    parser.add_argument("output", metavar="OUT", type=str, help="full: a .safetensors file; hf, authors: a folder.")
    parser.add_argument(
        "--to",
        choices=["full", "hf", "authors"],
        default="full",
        help="full: all weights in one file, as saved, and the architecture in a .json beside it. hf: a folder for "
        "transformers, with tokenizer and model card (pip install mhf-lightning[hf]). authors: a folder with the "
        "tensors as the paper's authors name them (needs the same).",
    )
    parser.add_argument(
        "--data", type=str | None, default=None, help="hf: dataset with the tokenizer; default that of the run."
    )
    parser.add_argument(
        "--dtype", choices=["saved", "bfloat16", "float16"], default="saved", help="hf: round the weights to this."
    )
    parser.add_argument("--max_shard_size", type=str, default="5GB", help="hf: largest safetensors file.")
    return parser


def export_full(trained: Trained, output: Path) -> None:
    """Write the weights to ``output``, a .safetensors file, and architecture, step and tokens to a .json beside it.

    The names are those of :class:`mhf_lightning.model.Decoder`, so that ``load_state_dict`` takes them.

    Raises:
        ValueError: ``output`` has another ending, or a file is there already, or cannot be written.
    """
    from mhf_lightning.checkpoint.files import appearing, write_json, write_tensors

    if output.suffix != ".safetensors":  # of flash-1.3b, with_suffix would make flash-1.json
        raise ValueError(f"OUT is {output}; give a file whose name ends in .safetensors, such as {output}.safetensors")
    about = output.with_suffix(".json")
    content = {"decoder": trained.config.to_dict(), "step": trained.step, "tokens_seen": trained.tokens_seen}
    with appearing(output) as weights, appearing(about) as text:
        write_tensors(weights, trained.weights)
        write_json(text, content)


def main(args: list[str]) -> int:
    """Run ``mhf export``; return the exit code."""
    options = build_parser().parse_args(args)
    with readable_errors():
        from mhf_lightning.checkpoint.trained import read_trained

        output = Path(options.output)
        if options.to == "full":
            trained = read_trained(Path(options.run))
            export_full(trained, output)
        else:
            try:
                from mhf_lightning.hf.authors import export_authors
                from mhf_lightning.hf.folder import export_hf
            except ImportError as error:
                raise ValueError(str(error)) from error
            trained = read_trained(Path(options.run))
            if options.to == "hf":
                data = Path(options.data) if options.data else None
                export_hf(trained, output, data=data, dtype=options.dtype, max_shard_size=options.max_shard_size)
            else:
                export_authors(trained, output)
        print(f"wrote {trained.checkpoint} to {output}")
    return 0
