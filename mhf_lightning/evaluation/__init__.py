"""What a trained model scores: perplexity of texts, and the tasks of lm-eval.

- ``scoring.py``: log-likelihoods of token sequences.
- ``perplexity.py``: texts, token-weighted and per document.
- ``tasks.py``: lm-eval's interface; needs the extra ``eval``.
- ``results.py``: into the run folder and TensorBoard.
- ``cli.py``: ``mhf eval``.
"""
