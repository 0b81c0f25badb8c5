"""mhf-lightning: pretraining of language models whose feed-forward layers are FlashMHF."""

__version__ = "0.1.0"
