"""`python3 benchmarks/on_gpu`: Python runs this file when it is given the folder."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

if sys.version_info < (3, 11):  # noqa: UP036 (make does not choose this Python)
    sys.exit(f"on_gpu: Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}")

from on_gpu.command import main  # noqa: E402


sys.exit(main())
