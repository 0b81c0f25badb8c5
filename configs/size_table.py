"""Writes the table of model sizes (configs/paper/SIZES.md) to standard output: `make sizes`.

Each file is built on the meta device and counted; a test fails when the committed table is not what this prints.
"""

from pathlib import Path

import torch
from jsonargparse import ArgumentParser

from mhf_lightning.model import Decoder, DecoderConfig, count_parameters

PAPER = Path(__file__).parent / "paper"
SIZES = ("128m", "370m", "1.3b")
TOLERANCE = 0.03


def decoder_config(path: Path) -> DecoderConfig:
    """Read the ``model.decoder`` part of a model file."""
    parser = ArgumentParser()
    parser.add_class_arguments(DecoderConfig, "model.decoder")
    parser.add_argument("--config", action="config")
    return parser.instantiate(parser.parse_path(path)).model.decoder


def count(config: DecoderConfig) -> tuple[int, int]:
    """Return all parameters, and those outside the embedding and the head, of a configuration."""
    with torch.device("meta"):
        return count_parameters(Decoder(config))


def table() -> str:
    """Return the table: the paper's sizes, then the small models of ``configs/model``."""
    lines = [
        "# Sizes of the models",
        "",
        "Made by `make sizes` from the files of this folder and of `configs/model`. *Against baseline* compares",
        f"the parameters outside embedding and head with the SwiGLU model of that size;"
        f" rows more than {TOLERANCE:.0%} off are bold: the",
        "paper's own widths and layer counts miss by that much.",
        "",
        "| size | file | layers | d_h | E x d_e | d_ff | parameters | without embeddings | against baseline |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for folder in (*(PAPER / size for size in SIZES), PAPER.parent / "model"):
        _, baseline = count(decoder_config(folder / "swiglu.yaml"))
        for path in sorted(folder.glob("*.yaml")):
            if path.stem == "recipe":
                continue
            config = decoder_config(path)
            total, non_embedding = count(config)
            ffn = config.ffn
            ratio = non_embedding / baseline - 1
            versus = f"{ratio:+.1%}" if abs(ratio) <= TOLERANCE else f"**{ratio:+.1%}**"
            d_h = str(config.d_model // ffn.num_heads) if ffn.num_heads else "-"
            gated = f"{ffn.num_subnetworks} x {ffn.d_e}" if ffn.num_subnetworks else "-"
            d_ff = ffn.d_ff or (ffn.num_subnetworks or 0) * (ffn.d_e or 0)
            lines.append(
                f"| {folder.name} | {path.stem} | {config.num_layers} | {d_h} | {gated} | {d_ff:,} "
                f"| {total:,} | {non_embedding:,} | {versus} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
