"""libtpu is no dependency of the other tests: `make test-tpu` brings it, and these tests are its own."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("libtpu") else ["test_*.py"]
