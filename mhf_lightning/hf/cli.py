"""``mhf import``: a Hugging Face folder as the start of a run."""

from __future__ import annotations

from pathlib import Path

from mhf_lightning.errors import readable_errors
from mhf_lightning.parsing import SuggestingParser


def build_parser() -> SuggestingParser:
    """The options of ``mhf import``."""
    parser = SuggestingParser(
        prog="mhf import",
        description="Bring a model into training: one of ours for transformers, a Llama, or one of the paper's authors "
        "(a Llama with their FlashMHF module, known by its tensors' names). OUT gets model.safetensors, model.yaml for "
        "mhf fit --config, and tokenizer.json for mhf data prepare --tokenizer.",
    )
    parser.add_argument("folder", metavar="HF_DIR", type=str, help="Folder with config.json and safetensors.")
    parser.add_argument("output", metavar="OUT", type=str, help="Folder to write.")
    return parser


def main(args: list[str]) -> int:
    """Run ``mhf import``; return the exit code."""
    options = build_parser().parse_args(args)
    with readable_errors():
        try:
            from mhf_lightning.hf.folder import import_hf
        except ImportError as error:
            raise ValueError(str(error)) from error
        config, name = import_hf(Path(options.folder), Path(options.output))
        print(
            f"read {options.folder} as {name} ({config.ffn.name}, {config.num_layers} layers, d_model "
            f"{config.d_model}), wrote {options.output}; train it with mhf fit --config {options.output}/model.yaml"
        )
    return 0
