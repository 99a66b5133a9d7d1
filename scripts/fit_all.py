"""Writes the tables of docs/fit.md: every file in configs/ that names a topology in its first line, compiled for it.

python scripts/fit_all.py           all of them (the large ones take minutes each)
python scripts/fit_all.py WORD ...  those whose name has one of the words; the other tables stay as they are
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "fit.md"
MARK = "<!-- written by scripts/fit_all.py -->"


def main(words: list[str]) -> None:
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        topology = re.search(r"--topology (\S+)", path.read_text(encoding="utf-8").partition("\n")[0])
        if topology is None or (words and not any(word in path.name for word in words)):
            continue
        command = [sys.executable, "-m", "rlhf_jax", "fit", f"configs/{path.name}", "--topology", topology.group(1)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode > 1:
            sys.exit(f"{' '.join(command[2:])}\n{done.stderr}")
        write(path.name, done.stdout.strip())


def write(name: str, table: str) -> None:
    """Puts one table into the page and leaves the rest as it is now, whatever was written meanwhile."""
    head, _, below = PAGE.read_text(encoding="utf-8").partition(MARK)
    sections = dict(re.findall(r"^## configs/(\S+)\n\n(.*?)(?=^## |\Z)", below, re.MULTILINE | re.DOTALL))
    sections[name] = table
    there = sorted(each for each in sections if (ROOT / "configs" / each).is_file())
    text = "".join(f"## configs/{each}\n\n{sections[each].rstrip()}\n\n" for each in there)
    PAGE.write_text(f"{head}{MARK}\n\n{text.rstrip()}\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
