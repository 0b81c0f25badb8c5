"""``mhf export``: one safetensors file with the whole model, and its configuration, from any sharded checkpoint.

Imports ``files.py``, ``folder.py``, ``shards.py`` and ``state.py``, the last two when it runs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mhf_lightning.parsing import SuggestingParser


def add_export_options(parser: Any) -> None:
    """Add the options of ``mhf export``."""
    parser.add_argument("--run_dir", type=str | None, default=None, help="Folder of the run, whose newest is taken.")
    parser.add_argument("--checkpoint", type=str | None, default=None, help="Checkpoint folder (.../step-N) instead.")
    parser.add_argument("--to", choices=["full"], default="full", help="full: all weights in one file, as saved.")
    parser.add_argument("--output", type=str, default="model.safetensors", help="File to write, and a .json beside it.")


def export(checkpoint: Path, output: Path) -> int:
    """Write the weights of a checkpoint to ``output`` and the decoder's configuration to the same name with .json.

    The names are those of :class:`mhf_lightning.model.Decoder`, so that ``load_state_dict`` takes them.

    Returns:
        Number of tensors.

    Raises:
        ValueError: A file is there already, or the checkpoint is damaged or DeepSpeed's.
    """
    import torch

    from mhf_lightning.checkpoint.files import CheckpointError, write_json, write_tensors
    from mhf_lightning.checkpoint.folder import verify
    from mhf_lightning.checkpoint.shards import Reader, read_trainer

    config = output.with_suffix(".json")
    for path in (output, config):
        if path.exists():
            raise ValueError(f"{path} exists; move it away, or give another --output")
    manifest = verify(checkpoint)
    if manifest.kind != "sharded":
        raise CheckpointError(
            f"{checkpoint} is a {manifest.kind} checkpoint, which only DeepSpeed reads: "
            f"run python {checkpoint}/zero_to_fp32.py {checkpoint} OUTPUT --tag checkpoint"
        )
    reader, trainer = Reader(checkpoint), read_trainer(checkpoint)
    prefix = "model/decoder."
    weights = {name: torch.empty(like.shape, dtype=like.dtype) for name, like in sorted(reader.shapes(prefix).items())}
    reader.load({prefix + name: tensor for name, tensor in weights.items()})
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(output.name + ".tmp")
    unfinished.unlink(missing_ok=True)
    write_tensors(unfinished, weights)
    write_json(
        config,
        {"decoder": trainer["decoder_config"], "step": manifest.step, "tokens_seen": trainer.get("tokens_seen")},
    )
    unfinished.rename(output)
    return len(weights)


def main(args: list[str]) -> int:
    """Run ``mhf export``; return the exit code."""
    parser = SuggestingParser(prog="mhf export", description="Write a trained model as one safetensors file.")
    add_export_options(parser)
    options = parser.parse_args(args)
    if (options.run_dir is None) == (options.checkpoint is None):
        parser.error("give either --run_dir or --checkpoint")
    from mhf_lightning.checkpoint.folder import newest

    try:
        path = Path(options.checkpoint) if options.checkpoint else newest(Path(options.run_dir) / "checkpoints")
        count = export(path, Path(options.output))
    except (ValueError, OSError) as error:
        print(f"mhf: error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {count} tensors of {path} to {options.output}, the configuration beside it")
    return 0
