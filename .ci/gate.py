"""Are the notebooks clean, the modules and README.md what the notebooks say, and the rules of ruff kept?

Cleans, exports and writes README.md anew; then nothing may have changed. Where something has, it is in step afterwards:
look at it and commit it. In a fresh clone this is the same as an empty `git status`.
"""

import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
WATCHED = ("nbs", "ftlib")


def files():
    "Every file under watch with the hash of its bytes"
    found = [p for d in WATCHED for p in (ROOT / d).rglob("*") if p.is_file() and p.suffix in (".ipynb", ".py", ".txt")]
    found = [p for p in found if not {"__pycache__", ".ipynb_checkpoints"} & set(p.parts)]
    return {p.relative_to(ROOT): hashlib.sha256(p.read_bytes()).hexdigest() for p in [*found, ROOT / "README.md"]
            if p.exists()}


def main():
    before = files()
    if not any(p.suffix == ".ipynb" for p in before): sys.exit("gate: no notebook under nbs/: nothing was checked")
    for command in (["nbdev-clean"], ["nbdev-export"], ["python", "docs/readme.py"]):
        subprocess.run([BIN / command[0], *command[1:]], cwd=ROOT, check=True)
    after = files()
    changed = sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    if changed:
        sys.exit("gate: not in step with the notebooks (put right now: look, and commit):\n"
                 + "\n".join(f"  {p}" for p in changed))
    checked = "ftlib", "nbs", "tests", "bench", "docs", ".ci"
    if subprocess.run([BIN / "ruff", "check", "--quiet", *checked], cwd=ROOT, check=False).returncode:
        sys.exit("gate: the lines above break a rule of pyproject.toml")
    print(f"gate: {sum(p.suffix == '.ipynb' for p in after)} notebooks clean, modules and README.md in step")


if __name__ == "__main__": main()
