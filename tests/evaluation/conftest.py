"""What is not collected without the extra; perplexity does not need it."""

from extras import is_missing

collect_ignore = ["test_eval_command.py"] if is_missing("lm_eval") else []
