"""Prints the closing line of CI: the tests of all stages, counted from their JUnit files."""

import argparse
import xml.etree.ElementTree as ElementTree
from pathlib import Path


def main() -> None:
    """Counts; a stage that failed without a failing test (it broke down, or has no tests) counts as one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="folder of <stage>.xml")
    parser.add_argument("--failed", nargs="*", default=[], help="stages that failed")
    arguments = parser.parse_args()

    total = skipped = 0
    failures = {}
    for file in arguments.results.glob("*.xml"):
        for suite in ElementTree.parse(file).iter("testsuite"):
            total += int(suite.get("tests"))
            skipped += int(suite.get("skipped"))
            failures[file.stem] = int(suite.get("failures")) + int(suite.get("errors"))
    failed_tests = sum(failures.values())
    broken_stages = sum(not failures.get(stage) for stage in arguments.failed)
    print(
        f"{total - failed_tests - skipped} passed, {failed_tests + broken_stages} failed, {skipped} skipped"
    )


if __name__ == "__main__":
    main()
