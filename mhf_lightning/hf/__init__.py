"""Our models in Hugging Face transformers; importing this registers them with AutoConfig and AutoModelForCausalLM.

- ``model.py``: :class:`FlashMHFConfig`, :class:`FlashMHFForCausalLM`.
- ``folder.py``: a trained run as a folder for transformers, and such a folder as a start for training.
- ``card.py``: the model card.
- ``cli.py``: ``mhf import``; ``mhf export --to hf`` is in ``mhf_lightning/checkpoint/export.py``.

Needs the extra ``hf`` and Python 3.11. No code of a model folder is ever executed.
"""

try:
    import transformers

    from mhf_lightning.hf.model import FlashMHFConfig, FlashMHFForCausalLM
except ImportError as error:
    raise ImportError(
        f"mhf_lightning.hf needs transformers 5.24 or newer, and that Python 3.11 or newer ({error}): "
        "pip install 'mhf-lightning[hf]'"
    ) from error

transformers.AutoConfig.register(FlashMHFConfig.model_type, FlashMHFConfig)
transformers.AutoModelForCausalLM.register(FlashMHFConfig, FlashMHFForCausalLM)

__all__ = ["FlashMHFConfig", "FlashMHFForCausalLM"]
