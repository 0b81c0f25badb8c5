"""The LightningModule, its optimiser and schedule, and the training commands."""
