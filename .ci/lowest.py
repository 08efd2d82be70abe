"""Prints the lowest versions that pyproject.toml promises for some extras, as constraints for pip.

python .ci/lowest.py EXTRA...
"""

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def requirements(project, extras):
    """Those of the base install and of these extras, the extras' own extras included."""
    yield from project["dependencies"]
    for extra in extras:
        for requirement in project["optional-dependencies"][extra]:
            inner = re.fullmatch(r"edgeskip\[(.*)\]", requirement)
            yield from requirements(project, inner[1].split(",")) if inner else [requirement]


if __name__ == "__main__":
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for requirement in dict.fromkeys(requirements(project, sys.argv[1:])):
        name, extras, version, marker = re.fullmatch(r"([\w.-]+)(\[.*\])?>=([\w.]+)[^;]*(;.*)?", requirement).groups()
        print(f"{name}=={version} {marker or ''}".strip())
