"""`mhf plan`: parameters, memory per GPU, FLOPs and days of a run, worked out without a GPU and without data."""
