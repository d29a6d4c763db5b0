"""Print requirements of pyproject.toml, one a line: those of the extras named, or of `build-system`.

python .ci/extras.py lint parity
"""

import sys
import tomllib
from pathlib import Path

settings = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
groups = settings["project"]["optional-dependencies"] | {"build-system": settings["build-system"]["requires"]}
for name in sys.argv[1:]:
    print(*groups[name], sep="\n")
