"""``mhf generate``: text from a trained model; the model's part is ``mhf_lightning.model.generate``."""
