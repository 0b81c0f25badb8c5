"""`mhf bench COMMAND`; each command has a module of its own. Torch is imported only by the command that runs."""

from __future__ import annotations

import sys

HELP = """usage: mhf bench COMMAND [options]

  mhf bench layer      time and memory of the feed-forward layer, all kinds side by side; table, CSV, plot
  mhf bench model      latency, training speed and memory of whole models; table, CSV, plot
  mhf bench generate   speed of reading a prompt and of generating, token by token; table, CSV
  mhf bench scaling    training on several GPUs: speed, memory, parity, checkpoints; tables, CSV, plot

  mhf bench COMMAND --help     all options
"""


def main(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    if args[:1] == ["layer"]:
        from mhf_lightning.bench.layer import main as layer

        return layer(args[1:])
    if args[:1] == ["model"]:
        from mhf_lightning.bench.model import main as model

        return model(args[1:])
    if args[:1] == ["generate"]:
        from mhf_lightning.bench.generate import main as generate

        return generate(args[1:])
    if args[:1] == ["scaling"]:
        from mhf_lightning.bench.scaling.command import main as scaling

        return scaling(args[1:])
    asked = not args or args[0] in ("-h", "--help")
    print(HELP if asked else f"error: unknown command {args[0]}\n{HELP}", end="", file=None if asked else sys.stderr)
    return 0 if asked else 2
