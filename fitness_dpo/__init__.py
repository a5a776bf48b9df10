"""Turn a small chat model into a fitness question-answering bot with Direct Preference Optimization."""

import os
import sys

if sys.argv[:1] == ["-m"] and sys.path[:1] == [os.getcwd()]:  # noqa: PTH109 (pathlib could be the local one)
    # `python -m` puts the current folder first: a yaml.py that lies there would be imported in place of the library
    del sys.path[0]
    os.environ["PYTHONSAFEPATH"] = "1"  # and in the processes that are started from here
