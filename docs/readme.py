"""Writes README.md from nbs/index.ipynb: its prose, its code and what the code gave."""

import base64
import re
from pathlib import Path

from fastcore.nbio import read_nb

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"


def shown(output, name):
    "One output as Markdown; an image is written beside the docs and pointed at"
    data = output.get("data", {})
    text = {k: "".join(v) if isinstance(v, list) else v for k, v in data.items()}
    if output.output_type == "stream": return fenced("".join(output.text)) if output.name == "stdout" else ""
    if "image/png" in text:
        IMAGES.mkdir(exist_ok=True)
        (IMAGES / f"{name}.png").write_bytes(base64.b64decode(text["image/png"]))
        return f"![{name}](docs/images/{name}.png)"
    if is_progress(text.get("text/html", "x")): return ""
    if "text/markdown" in text: return text["text/markdown"]
    return fenced(text.get("text/plain", ""))


def fenced(text, lang=""):
    "A block of code or of printed text"
    return f"```{lang}\n{text.strip(chr(10)).rstrip()}\n```" if text.strip() else ""


def is_progress(text):
    "A bar, its table of epochs, or what is left of them: the text after them says the same"
    return "fastprogress" in text or not re.sub(r"<[^>]*>|\s", "", text)


def as_markdown(cell, number):
    "A cell as Markdown; cells marked `hide` are left out"
    source = "".join(cell.source)
    if re.search(r"^#\|\s*hide\b", source, re.M): return ""
    if cell.cell_type == "markdown": return source
    outputs = [shown(o, f"index-{number}-{i}") for i, o in enumerate(cell.get("outputs", []))]
    return "\n\n".join(o for o in [fenced(re.sub(r"^#\|.*\n", "", source, flags=re.M), "python"), *outputs] if o)


def main():
    nb = read_nb(ROOT / "nbs" / "index.ipynb")
    for old in IMAGES.glob("index-*.png"): old.unlink()
    parts = [as_markdown(c, i) for i, c in enumerate(nb.cells)]
    (ROOT / "README.md").write_text("\n\n".join(p.strip() for p in parts if p.strip()) + "\n", encoding="utf-8")


if __name__ == "__main__": main()
