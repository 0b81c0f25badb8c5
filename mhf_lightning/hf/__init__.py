"""Our models in Hugging Face transformers; importing this registers them with AutoConfig and AutoModelForCausalLM.

- ``model.py``: :class:`FlashMHFConfig`, :class:`FlashMHFForCausalLM`.
- ``folder.py``: a trained run as a folder for transformers, and such a folder as a start for training.
- ``llama.py``, ``authors.py``: Llamas, and those of the paper's authors, by their names of tensors.
- ``card.py``: the model card.
- ``cli.py``: ``mhf import``; ``mhf export --to hf`` is in ``mhf_lightning/checkpoint/export.py``.

Needs the extra ``hf`` and Python 3.11. No code of a model folder is ever executed.
"""

import platform
import sys

_NEEDS = "mhf_lightning.hf needs transformers 5.24 or newer"
if sys.version_info < (3, 11):
    raise ImportError(f"{_NEEDS}, which needs Python 3.11 or newer; this is Python {platform.python_version()}")
try:
    import transformers
    from packaging.version import Version
except ImportError as error:
    raise ImportError(f"{_NEEDS}: pip install 'mhf-lightning[hf]'") from error
# An older one passes a model its keys and values under another name, which is noticed only when it generates.
if Version(transformers.__version__) < Version("5.24.0.dev0"):
    raise ImportError(f"{_NEEDS}; {transformers.__version__} is installed: pip install 'mhf-lightning[hf]'")

from mhf_lightning.hf.model import FlashMHFConfig, FlashMHFForCausalLM  # noqa: E402

transformers.AutoConfig.register(FlashMHFConfig.model_type, FlashMHFConfig)
transformers.AutoModelForCausalLM.register(FlashMHFConfig, FlashMHFForCausalLM)

__all__ = ["FlashMHFConfig", "FlashMHFForCausalLM"]
