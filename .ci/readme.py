"""Print the shell commands of a README block, so that CI runs what the reader reads.

A block is marked by `<!-- ci:NAME -->` on the line before its fence.

    python3 .ci/readme.py README.md demo
"""

import re
import sys
from pathlib import Path

MARKED_BLOCK = r"^<!-- ci:{name} -->\n+```[a-z]*\n(.*?)^```$"


def block(text: str, name: str) -> str:
    """The lines between the fences of the block called `name`, which must exist once."""
    found = re.findall(MARKED_BLOCK.format(name=re.escape(name)), text, re.MULTILINE | re.DOTALL)
    if len(found) != 1:
        raise SystemExit(f"README: {len(found)} blocks marked <!-- ci:{name} -->, expected one")
    return str(found[0])


if __name__ == "__main__":
    path, wanted = sys.argv[1:]
    print(block(Path(path).read_text(encoding="utf-8"), wanted), end="")
