"""What is not collected without the extra, and on Python 3.10, which has no transformers that is new enough."""

import sys

from extras import is_missing

collect_ignore_glob = ["test_*.py"] if sys.version_info < (3, 11) or is_missing("transformers") else []
