"""`mhf evidence`: the comparison of configs/evidence, from the corpus over a list of runs to its table."""
