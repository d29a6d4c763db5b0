"""Read the JUnit files that pytest wrote in CI.

python3 .ci/results.py summary .ci/skips.txt RESULTS    every skip with its reason, and the closing line
python3 .ci/results.py skipped-files FILE.xml           test files in which something was skipped
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree


def skips(path: Path) -> Iterator[tuple[str, str]]:
    """Test (dotted module and name) and reason of each skip in one JUnit file."""
    for case in ElementTree.parse(path).iter("testcase"):
        for skip in case.iter("skipped"):
            test = ".".join(filter(None, (case.get("classname"), case.get("name"))))
            yield test, re.sub(r"^.*?: Skipped: ", "", skip.get("message", ""))


def counts(path: Path) -> Counter[str]:
    """How many tests passed, failed and were skipped."""
    total: Counter[str] = Counter()
    for suite in ElementTree.parse(path).iter("testsuite"):
        tests, bad, skipped = (
            int(suite.get("tests", 0)),
            int(suite.get("failures", 0)) + int(suite.get("errors", 0)),
            int(suite.get("skipped", 0)),
        )
        total.update(passed=tests - bad - skipped, failed=bad, skipped=skipped)
    return total


def allowed_skips(path: Path) -> list[tuple[str, re.Pattern[str]]]:
    """Lines `PHASE REGULAR-EXPRESSION` of skips.txt; phase `any` stands for all."""
    rules = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            phase, expression = line.split(maxsplit=1)
            rules.append((phase, re.compile(expression)))
    return rules


def summary(allowed: Path, results: Path) -> int:
    """Print skips and totals; 1 if a skip is not allowed, a test failed or none ran, else 0."""
    rules = allowed_skips(allowed)
    total: Counter[str] = Counter()
    for path in sorted(results.glob("*.xml")):
        total.update(counts(path))
        for reason, number in Counter(reason for _, reason in skips(path)).items():
            if any(phase in ("any", path.stem) and rule.fullmatch(reason) for phase, rule in rules):
                print(f"{path.stem}: {number} skipped: {reason}")
            else:
                print(f"{path.stem}: {number} skipped, which {allowed.name} does not allow: {reason}")
                total.update(failed=number, skipped=-number)
    print(f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped")
    return int(total["failed"] > 0 or total["passed"] == 0)


def skipped_files(path: Path) -> list[str]:
    """Paths of the test files in which a test was skipped, from the root of the repository."""
    files = set()
    for test, _ in skips(path):
        parts = test.split("[")[0].split(".")
        while parts and not Path(*parts).with_suffix(".py").is_file():
            parts.pop()
        if not parts:
            raise SystemExit(f"no test file for {test}")
        files.add(str(Path(*parts).with_suffix(".py")))
    return sorted(files)


if __name__ == "__main__":
    command, *paths = sys.argv[1:]
    if command == "summary":
        sys.exit(summary(*map(Path, paths)))
    print(*skipped_files(Path(paths[0])), sep="\n")
