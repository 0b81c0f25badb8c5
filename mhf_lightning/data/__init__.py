"""From text to training batches: `mhf data prepare` writes a dataset, `TokenDataModule` feeds it to a Trainer.

Importing this package imports neither torch nor Lightning: the names below are loaded when they are first used, so that
`mhf data` starts quickly. The function behind the command is `mhf_lightning.data.prepare.prepare`.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "DataError": "errors",
    "GlobalOrderSampler": "sampler",
    "Manifest": "manifest",
    "TokenBlocks": "blocks",
    "TokenDataModule": "datamodule",
    "load_tokenizer": "tokenizer",
    "verify": "manifest",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
