"""`mhf bench scaling`: training on several GPUs of one host, by the strategies and the Trainer of `mhf fit`.

- ``cases.py``: what is measured: strategy, processes, batch; the cases of each stage. Standard library only.
- ``processes.py``: starts the ranks of cases on disjoint GPUs, and ends them when one dies or time is up.
- ``rank.py``: what one rank does. The only module that imports Lightning.
- ``results.py``: from what ranks wrote to the rows of the CSV files.
- ``report.py``: tables, the figures of `mhf plan` beside the measured ones, plot.
- ``command.py``: the command.
"""
