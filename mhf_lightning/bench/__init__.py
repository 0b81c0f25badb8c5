"""`mhf bench`: benchmarks with every alternative in the same run. Imports torch and mhf_kernels; never Lightning."""
