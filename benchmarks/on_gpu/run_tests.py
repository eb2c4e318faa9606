"""Runs the tests that need a GPU, and writes their number after each test: `run_tests.py FILE`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


class Counts:
    """Numbers of tests by outcome, and the first failure."""

    def __init__(self, file: Path):
        self._file = file
        self._found: dict[str, int | str] = {"passed": 0, "failed": 0, "skipped": 0}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test's result is in its call. Failures and skips may also come from its fixtures.
        if report.when == "call" or not report.passed:
            self._found[report.outcome] += 1
        if report.failed:
            error = str(getattr(report.longrepr, "reprcrash", None) or report.longreprtext).strip().splitlines()[0]
            self._found.setdefault("first_failure", f"{report.nodeid.split('/')[-1]}: {error}"[:300])
        if report.when == "teardown":
            self._file.write_text(json.dumps(self._found))


def main() -> int:
    """Run them. The exit code is pytest's."""
    options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "-o", "addopts="]
    return int(pytest.main([*options, str(ROOT / "tests" / "trainer" / "test_gpu.py")], [Counts(Path(sys.argv[1]))]))


if __name__ == "__main__":
    sys.exit(main())
