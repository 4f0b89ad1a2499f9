"""From the notebooks in nbs/ to the pages that Sphinx reads, in docs/pages/.

nbdev's own processors do the work: exported and hidden cells go, and what they define is shown with its signature. On
top of that: a table of the arguments, an anchor for every name, links from prose to those anchors, and the site's
contents. Saved outputs are shown as they are; nothing is trained here.
"""

import configparser
import inspect
import re
import shutil
import sys
from pathlib import Path

import nbdev.processors as processors
from fastcore.docments import DocmentTbl, MarkdownRenderer
from fastcore.nbio import mk_cell, read_nb, write_nb

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "pages"
SKIPPED = {"FrontmatterProc", "insert_warning", "add_links", "add_fold", "clean_show_doc"}
GUIDES = """load_data learning_rate freeze_and_fine_tune stop_and_resume evaluate compare distil few_labels speed
    strategies     coming_from how_training_works extending""".split()
PACKAGES = {
    "data": "Data: from files to batches", "models": "Models: from a name to a network", "lr": "Learning rates",
    "train": "Training",
    "callbacks": "Callbacks", "teach": "Distillation, rotation, pseudo-labels", "evaluate": "Evaluation",
    "experiment": "Comparisons and cross-validation", "search": "Hyperparameter search",
    "parallel": "Several processes and machines",
    "deploy": "Prediction and export", "cli": "Command line",
}
INTERNALS = {
    "system": "Files, Ctrl-C, printed lines", "cache": "Cached features", "metrics": "Metrics and probabilities",
    "persist": "State and checkpoints",
}
IN_TABLE = str.maketrans({"|": "\\|", "<": "&lt;", "*": "\\*", "\n": " "})


class Described(MarkdownRenderer):
    "`show_doc` with one table of arguments in place of comments in the signature"

    def _repr_markdown_(self):
        kind = "class" if inspect.isclass(self.sym) else "def"
        shown = f"```python\n{kind} {self.nm}{_wrapped(_signature(self.sig))}\n```" if self.sig else ""
        text = inspect.cleandoc(self.docs) if self.docs else ""
        return "\n\n".join(o for o in (f"({self.nm})=\n### {self.nm}", text, shown, _table(self.sym)) if o)


def _signature(signature):
    "A signature as one would write it: no module paths, functions by name"
    # fastai lets one pass every event to any callback.
    events = [p for p in signature.parameters if re.match("(after|before)_", p)]
    own = signature.replace(parameters=[p for n, p in signature.parameters.items() if n not in events])
    text = re.sub(r"<(?:class|function|built-in function) '?([\w.]+)[^>]*>", r"\1", str(own))
    text = re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", text)
    return re.sub(r"<factory>", "...", text).removesuffix(" -> None")


def _wrapped(signature, width=88):
    "A signature that fits no line, one argument a line"
    if len(signature) <= width: return signature
    inside, depth, parts, last = signature[1:signature.rindex(")")], 0, [], 0
    for i, char in enumerate(inside):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and not depth:
            parts.append(inside[last:i].strip())
            last = i + 1
    parts.append(inside[last:].strip())
    return "(\n    " + ",\n    ".join(p for p in parts if p) + signature[signature.rindex(")"):].replace(")", ",\n)", 1)


def _table(sym):
    "The arguments of `sym` that have a comment, as a Markdown table"
    try: table = DocmentTbl(sym)
    except (ValueError, TypeError): return ""
    if not table.has_docment: return ""
    rows = [[f"`{name}`", _code(table.dm[name]["default"]), _cell(table.dm[name]["docment"])] for name in table.params]
    rows = [row for row in rows if any(row[1:])]
    back = table.dm.get("return", {}).get("docment", inspect.Parameter.empty)
    if back is not inspect.Parameter.empty: rows.append(["**gives**", "", _cell(back)])
    return "\n".join("| " + " | ".join(row) + " |" for row in [["argument", "default", "what it is"], ["---"] * 3,
        *rows])


def _cell(text):
    "Text that can stand in a table"
    return "" if text in (inspect.Parameter.empty, None) else str(text).translate(IN_TABLE)


def _code(default):
    "A default value as code, short"
    if default is inspect.Parameter.empty: return ""
    text = getattr(default, "__name__", None) or repr(default)
    return f"`{text if len(text) < 40 else text[:37] + '…'}`".replace("|", "\\|")


class describe_in_order(processors.add_show_docs):
    "nbdev's step that adds a description after an exported cell; here those of one cell in the order of the cell"

    def begin(self):
        super().begin()
        start = 0
        for i, cell in enumerate([*self.nb.cells, None]):
            if not getattr(cell, "has_sd", False):
                self.nb.cells[start:i] = self.nb.cells[start:i][::-1]
                start = i + 1


class run_show_docs(processors.exec_show_docs):
    "nbdev's step that runs `show_doc`, on what the module holds: no other cell is run"

    module = None  # set for each notebook: by now the processor has taken `default_exp` out

    def begin(self):
        super().begin()
        source = (f"import ftlib.{self.module} as here\nfor name in dir(here): globals().setdefault(name, "
                  f"getattr(here, name))\n")
        self.k.run_cell((source if self.module else "") + "from functools import partial\nfrom nbdev.showdoc import "
                                                          "show_doc\nfrom pages import Described\n"
                        "show_doc = partial(show_doc, renderer=Described)")

    def __call__(self, cell):
        if not is_described(cell): return
        self.k.cell(cell)
        if self.k.exc: raise RuntimeError(f"{cell.source}: {self.k.exc}") from self.k.exc


class ForSphinx(processors.FilterDefaults):
    "nbdev's processors without those that write for Quarto, and with ours"

    def base_procs(self):
        ours = {"add_show_docs": describe_in_order, "exec_show_docs": run_show_docs}
        return [ours.get(p.__name__, p) for p in super().base_procs() if p.__name__ not in SKIPPED]


def page_name(path):
    "`nbs/45_lr.schedule.ipynb` → `lr.schedule`; folders are kept"
    path = Path(path).relative_to(ROOT / "nbs")
    return path.with_name(re.sub(r"^\d+[a-z]?_", "", path.stem)).as_posix()


def is_described(cell):
    "Did nbdev add this cell to show a definition?"
    return cell.cell_type == "code" and cell.source.lstrip().startswith("show_doc(")


def as_page(path, anchors):
    "The notebook at `path` as Sphinx shall read it"
    nb = read_nb(path)
    run_show_docs.module = processors._default_exp(nb)
    ForSphinx()(nb)
    cells = [described(c) if is_described(c) else c for c in nb.cells]
    nb.cells = [tidy(c, anchors) for c in cells if c is not None and c.source.strip()]
    nb.metadata["language_info"] = dict(name="python", pygments_lexer="ipython3")  # knows `!` and `%`
    return nb


def described(cell):
    "A `show_doc` cell as the Markdown that it gave, or nothing where it gave none"
    texts = [o["data"]["text/markdown"] for o in cell.outputs if "text/markdown" in o.get("data", {})]
    return mk_cell("".join(texts[0]), "markdown") if texts else None


def tidy(cell, anchors):
    "Without directives for nbdev; names in prose that have an anchor become links to it"
    cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M) if cell.cell_type == "code" else cell.source
    if cell.cell_type == "markdown":
        parts = re.split(r"(```.*?```|^#.*$|^\|.*$)", cell.source, flags=re.M | re.S)
        cell.source = "".join(linked(p, anchors) if i % 2 == 0 else p for i, p in enumerate(parts))
    cell.metadata.pop("language", None)
    return cell


def linked(text, anchors):
    "`name` in backticks, outside a link, becomes a link where the site has that name"
    def swap(found): return f"[`{found[1]}`](#{found[1]})" if found[1] in anchors else found[0]
    return re.sub(r"(?<!\[)`([A-Za-z_][\w.]*)(?:\(\))?`(?!\])", swap, text)


def documented(nb):
    "The names that a processed notebook gives an anchor"
    return {m for c in nb.cells if c.cell_type == "markdown" for m in re.findall(r"^\(([\w.]+)\)=$", c.source, re.M)}


def contents(names):
    "The site's table of contents in five parts"
    tutorials = [n for n in names if n.startswith("tutorials/") and n != "tutorials/measured"]
    missing = {n for n in names if n.startswith("guides/")} - {f"guides/{g}" for g in ["get_started", *GUIDES]}
    assert not missing, f"docs/pages.py does not place {missing}"
    return "\n\n".join([
        toctree("Get started", ["guides/get_started"]), toctree("Guides", [f"guides/{g}" for g in GUIDES]),
        toctree("Tutorials", tutorials), toctree("API reference",
                                                 [*(f"api/{p}" for p in PACKAGES), "errors", "api/internals"]),
        toctree("Measured", ["tutorials/measured"]),
    ])


def package_pages(names):
    "A page for each package, which lists its modules; internal packages share one"
    def listed(package):
        return "\n".join(["```{toctree}", ":maxdepth: 1", "",
                          *(f"../{n}" for n in names if n.rpartition(".")[0] == package and "/" not in n), "```"])
    pages = {p: f"# {title}\n\n{listed(p)}\n" for p, title in PACKAGES.items()}
    parts = "\n\n".join(f"## {title}\n\n{listed(p)}" for p, title in INTERNALS.items())
    return pages | {"internals": f"# Internals\n\nWhat the other packages stand on. Nothing of it is needed to use "
                    f"ftlib.\n\n{parts}\n"}


def colab_badge(path, address):
    "Markdown of a badge that opens the notebook at `path` in Colab, from the repository at `address` on GitHub"
    owner = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?", address)
    if owner is None: raise ValueError(f"url = {address} in setup.cfg: Colab opens notebooks of https://github.com/…")
    opened = f"https://colab.research.google.com/github/{owner[1]}/blob/main/{path}"
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({opened})"


def address():
    "The project's address by setup.cfg; empty as long as it has none, and tutorials no badge"
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg")
    return metadata.get("metadata", "url", fallback="")


def toctree(caption, names):
    "One part of the contents"
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *names, "```"])


def main():
    sys.path.insert(0, str(ROOT / "docs"))
    shutil.rmtree(PAGES, ignore_errors=True)
    sources = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    pages = {page_name(p): as_page(p, set()) for p in sources}
    anchors = set().union(*map(documented, pages.values()))
    for path in sources if address() else []:
        if path.parent.name == "tutorials":
            badge = colab_badge(path.relative_to(ROOT).as_posix(), address())
            pages[page_name(path)].cells.insert(1, mk_cell(badge, "markdown"))
    pages["index"].cells.append(mk_cell(contents([n for n in pages if n != "index"]), "markdown"))
    (PAGES / "api").mkdir(parents=True)
    for name, text in package_pages(pages).items(): (PAGES / "api" / f"{name}.md").write_text(text, encoding="utf-8")
    for name, nb in pages.items():
        nb.cells = [tidy(c, anchors) for c in nb.cells]
        target = PAGES / f"{name}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_nb(nb, target)
    print(f"docs: {len(pages)} pages, {len(anchors)} names described")


if __name__ == "__main__": main()
