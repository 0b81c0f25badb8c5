"""``mhf generate``: continue a prompt with a run's newest checkpoint, as the tokens come."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from mhf_lightning.errors import readable_errors
from mhf_lightning.parsing import SuggestingParser


def build_parser() -> SuggestingParser:
    """The options of ``mhf generate``."""
    parser = SuggestingParser(
        prog="mhf generate",
        description="Continue a prompt. Text goes to stdout as it comes, speed to stderr. Uses a GPU where there is "
        "one, in bfloat16, else the CPU in float32.",
    )
    parser.add_argument("run", metavar="RUN", type=str, help="Folder of a run, or one of its checkpoints (.../step-N).")
    parser.add_argument("--prompt", type=str, required=True, help="Text to continue; may be empty.")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="Tokens to add at most.")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the most likely token.")
    parser.add_argument("--top_p", type=float, default=0.95, help="Draw among the likeliest that hold this much.")
    parser.add_argument("--seed", type=int, default=0, help="Of the drawing.")
    parser.add_argument(
        "--data", type=str | None, default=None, help="Dataset with the tokenizer; default that of the run."
    )
    return parser


def main(args: list[str]) -> int:
    """Run ``mhf generate``; return the exit code."""
    options = build_parser().parse_args(args)
    with readable_errors():
        import torch
        from tokenizers.decoders import DecodeStream

        from mhf_lightning.checkpoint.trained import read_trained, read_vocabulary
        from mhf_lightning.model.generate import generate

        try:
            options.prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError("the prompt is not UTF-8") from error
        if options.max_new_tokens < 1:
            raise ValueError(f"--max_new_tokens is {options.max_new_tokens}; it must be at least 1")
        trained = read_trained(Path(options.run))
        vocabulary = read_vocabulary(trained, Path(options.data) if options.data else None)
        tokenizer, context = vocabulary.tokenizer, vocabulary.context_length
        ids = tokenizer.encode(options.prompt).ids or [vocabulary.eos_id]
        if len(ids) >= context:
            raise ValueError(f"the prompt has {len(ids)} tokens; the model's context is {context}, so give fewer")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        decoder = trained.decoder(device, torch.bfloat16 if device.type == "cuda" else torch.float32)

        stream = DecodeStream(ids, skip_special_tokens=True)
        started = time.perf_counter()
        times: list[float] = []
        try:
            for token in generate(
                decoder,
                [torch.tensor(ids, device=device)],
                min(options.max_new_tokens, context - len(ids)),
                temperature=options.temperature,
                top_p=options.top_p,
                stop_id=vocabulary.eos_id,
                generator=torch.Generator().manual_seed(options.seed),
            ):
                if not times:
                    print(options.prompt, end="")
                times.append(time.perf_counter())
                text = stream.step(tokenizer, int(token))
                print(text or "", end="", flush=True)
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            return 130
        print(flush=True)
        # The prompt gives the first token; each later one is a step.
        prefill, decode = times[0] - started, times[-1] - times[0]
        speed = f"prefill {len(ids)} tokens in {prefill:.3f} s, {len(ids) / prefill:,.0f} tokens/s"
        if len(times) > 1:
            speed += f"; decode {len(times) - 1} tokens in {decode:.3f} s, {(len(times) - 1) / decode:,.1f} tokens/s"
        print(f"{trained.checkpoint}: {speed}", file=sys.stderr)
        if len(ids) + len(times) == context:
            print(f"stopped at the end of the model's context, {context} tokens", file=sys.stderr)
    return 0
