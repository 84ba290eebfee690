"""Names the tests that were skipped or not reached in every one of CI's runs, given the folder of their junit reports."""

import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path


def tests_that_ran(folder):
    """{class.name} of every test case that a report calls neither skipped nor left out."""
    cases = [case for path in Path(folder).glob("*.xml") for case in xml.parse(path).iter("testcase")]
    return {f"{case.get('classname')}.{case.get('name')}" for case in cases if case.find("skipped") is None}


def tests_that_exist():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", "-n", "0"]
    out = subprocess.run(command, capture_output=True, text=True).stdout
    lines = [line.partition(".py::") for line in out.splitlines() if "::" in line]
    return [f"{path.replace('/', '.')}.{name}" for path, _, name in lines]


if __name__ == "__main__":
    ran = tests_that_ran(sys.argv[1])
    never = [name for name in tests_that_exist() if name not in ran]
    print(f"{len(never)} tests ran nowhere: {', '.join(never) or 'none'}")
