"""FlashMHF: the paper's layer, from the kernels package, with the decoder's configuration."""

from dataclasses import asdict

from mhf_kernels import FlashMHF, InitGains

from mhf_lightning.model.config import DecoderConfig


def flash_mhf_from_config(config: DecoderConfig) -> FlashMHF:
    """Build the layer.

    Options: ``num_heads``, ``num_subnetworks``, ``d_e``, ``num_kuv_heads``, ``query_norm``, ``skip_linear``,
    ``gate``, ``recompute_queries``, ``gains``.
    """
    options = config.ffn.take(
        required=("num_heads", "num_subnetworks", "d_e"),
        optional={
            "num_kuv_heads": None,
            "query_norm": True,
            "skip_linear": False,
            "gate": "sigmoid",
            "recompute_queries": False,
            "gains": None,
        },
    )
    gains = options.pop("gains")
    return FlashMHF(
        config.d_model,
        **options,
        norm_eps=config.norm_eps,
        initialization=config.initialization,
        gains=InitGains(**asdict(gains)) if gains is not None else None,
    )
