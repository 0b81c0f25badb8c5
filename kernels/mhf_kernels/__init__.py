"""The FlashMHF op and layer."""
