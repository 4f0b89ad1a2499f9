"""The house itself: what the wheel holds, what `from ftlib import *` brings, that each module has its notebook."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from email.parser import HeaderParser
from zipfile import ZipFile

import pytest

BY_HAND = {"__init__.py", "__main__.py", "_modidx.py"}


def python(code, cwd, **env):
    "What a fresh Python prints when it runs `code` in the folder `cwd`"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=cwd, env=env or None, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def notebooks(root):
    "Every notebook of the project"
    return [p for p in sorted((root / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]


def code_cells(path):
    "The code cells of a notebook, each with its source as one text"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [{**c, "source": "".join(c["source"])} for c in cells if c["cell_type"] == "code"]


def exported_to(path):
    "The module that a notebook writes, or None"
    found = [re.search(r"^#\|\s*default_exp\s+(\S+)", c["source"], re.M) for c in code_cells(path)]
    return next((m[1] for m in found if m), None)


# ---- the wheel

@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory):
    "The wheel, built from the source distribution as a user's pip would"
    out = tmp_path_factory.mktemp("wheel")
    done = subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, root], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def metadata(wheel):
    "The wheel's METADATA"
    with ZipFile(wheel) as z:
        return HeaderParser().parsestr(z.read(next(n for n in z.namelist() if n.endswith("METADATA"))).decode())


def test_metadata_is_whole(metadata, root):
    version = re.search(r'__version__ = "(.+)"', (root / "ftlib/__init__.py").read_text())[1]
    assert (metadata["Name"], metadata["Version"]) == ("ftlib", version)
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Author"] == "The ftlib authors"
    assert "Apache-2.0" in (metadata["License"], metadata["License-Expression"])
    assert metadata["Summary"] and metadata["Keywords"] and len(metadata.get_all("Classifier")) >= 5
    assert metadata.get_payload().startswith("# ftlib"), "README.md is the long description"


def test_dependencies_have_lower_bounds(metadata):
    needs = metadata.get_all("Requires-Dist")
    base = {re.match(r"[\w-]+", n)[0] for n in needs if "extra ==" not in n}
    assert base == {"fastai", "timm", "safetensors"}
    assert all(">=" in n for n in needs), [n for n in needs if ">=" not in n]
    assert {"demo", "offline", "dev"} <= set(metadata.get_all("Provides-Extra"))
    assert any(n.startswith("elpv-dataset") and 'extra == "demo"' in n for n in needs)


def test_wheel_holds_every_module(wheel, root):
    with ZipFile(wheel) as z:
        held = {n for n in z.namelist() if n.startswith("ftlib/")}
        entry = z.read(next(n for n in z.namelist() if n.endswith("entry_points.txt"))).decode()
        assert any("licenses/LICENSE" in n for n in z.namelist())
    assert held == {p.relative_to(root).as_posix() for p in (root / "ftlib").rglob("*.py")}
    assert "ftlib = ftlib.cli:main" in entry


def test_installed_elsewhere_it_works(wheel, tmp_path):
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel], check=True)
    shown = python(f"import sys; sys.path.insert(0, {str(target)!r}); from ftlib import *; import ftlib; "
                   "print(ftlib.__file__, vision_learner.__module__)", elsewhere)
    assert shown == f"{target}/ftlib/__init__.py ftlib.train.vision"


# ---- drop-in

def test_all_of_fastai_is_there_and_ours_wins(root):
    shown = python(
        "import fastai.vision.all as theirs\nfrom ftlib import *\n"
        "print(sorted(n for n in vars(theirs) if not n.startswith('_') and n not in globals()))\n"
        "print(vision_learner.__module__, Learner.__module__, image_data.__module__)", root)
    assert shown.splitlines() == ["[]", "ftlib.train.vision ftlib.train.learner ftlib.data.images"]


def test_importing_loads_nothing_that_fastai_does_not(root):
    heavy = ("timm", "safetensors", "sklearn.datasets", "sklearn.manifold", "nbdev", "elpv_dataset")
    loaded = "print([m for m in %r if m in sys.modules])" % (heavy,)
    alone = python(f"import sys\nfrom fastai.vision.all import *\n{loaded}", root)
    assert python(f"import sys\nfrom ftlib import *\n{loaded}", root) == alone


def test_the_shell_waits_for_no_torch(root):
    assert python("import sys, ftlib.cli.parser; print([m for m in ('torch', 'fastai', 'pandas') if m in sys.modules])",
                  root) == "[]"


def test_of_fastais_names_only_those_meant_are_replaced(root):
    shown = python("import fastai.vision.all as theirs, ftlib\n"
                   "print(sorted(n for n in ftlib.__all__ if getattr(theirs, n, ftlib) not in (ftlib, getattr(ftlib, "
                   "n))))", root)
    ours = ['CSVLogger', 'Int', 'Learner', 'Recorder', 'ReduceLROnPlateau', 'SaveModelCallback', 'load_learner',
            'unet_learner',
            'vision_learner']
    assert shown == str(ours)


def test_ours_are_subclasses_or_take_what_fastais_take(root):
    shown = python("import fastai.vision.all as theirs, ftlib, inspect\n"
                   "def names(f): return set(inspect.signature(f).parameters)\n"
                   "print(issubclass(ftlib.Learner, theirs.Learner), issubclass(ftlib.ImageData, theirs.DataLoaders))\n"
                   "print(sorted(names(theirs.vision_learner) - names(ftlib.vision_learner) - "
                   "names(ftlib.create_network) - {'kwargs'}))\n"
                   "ours = 'CSVLogger', 'ReduceLROnPlateau', 'SaveModelCallback', 'load_learner'\n"
                   "print([sorted(names(getattr(theirs, n)) - names(getattr(ftlib, n))) for n in ours])", root)
    assert shown.splitlines() == ["True True", "[]", "[[], [], [], []]"]


def test_changes_name_what_there_is(root):
    "Every name of ours is told, and what is told exists (the commands of the shell aside)"
    shown = python("import ftlib; print(*(n for room in ftlib._ROOMS.values() for n in room.split())); "
                   "print(*ftlib.__all__)", root)
    ours, every = (set(line.split()) for line in shown.splitlines())
    told = set(re.findall(r"`([A-Za-z_]+)`", (root / "CHANGELOG.md").read_text()))
    assert ours <= told and told - every == {"train", "evaluate", "cv", "cache"}, (sorted(ours - told),
        sorted(told - every))


def test_a_missing_name_is_an_attribute_error(root):
    assert python("import ftlib\ntry: ftlib.no_such_name\nexcept AttributeError as e: print(e)", root) \
        == "module 'ftlib' has no attribute 'no_such_name'"


# ---- notebooks

def test_every_module_has_one_notebook(root):
    wanted = [f"ftlib/{m.replace('.', '/')}.py" for m in map(exported_to, notebooks(root)) if m]
    assert len(wanted) == len(set(wanted)), "two notebooks write one module"
    there = {p.relative_to(root).as_posix() for p in (root / "ftlib").rglob("*.py") if p.name not in BY_HAND}
    assert there == set(wanted), "modules that no notebook writes, or the other way round"


def test_only_pages_write_no_module(root):
    pages = [p.relative_to(root / "nbs").as_posix() for p in notebooks(root) if not exported_to(p)]
    assert all(p == "index.ipynb" or p.startswith(("tutorials/", "guides/")) for p in pages), pages


def test_notebooks_are_numbered_as_their_modules(root):
    for path in notebooks(root):
        module = exported_to(path)
        if module: assert re.fullmatch(rf"\d\d[a-z]?_{re.escape(module)}", path.stem), f"{path.name} writes {module}"


def test_rooms_import_only_from_rooms_before(root):
    order = {name: i for i, name in enumerate(["errors", "system", "data", "models", "cache", "metrics", "persist",
                                               "lr", "callbacks", "train", "teach", "evaluate", "deploy", "parallel",
                                               "experiment", "search", "cli"])}
    for path in (root / "ftlib").rglob("*/*.py"):
        # what a learner's methods hand over to, as each is called
        if path.relative_to(root / "ftlib").as_posix() == "train/methods.py": continue
        mine = order[path.relative_to(root / "ftlib").parts[0]]
        for other in re.findall(r"(?:from|import) (?:ftlib\.|\.\.)(\w+)", path.read_text()):
            assert order.get(other, 99) <= mine, f"{path.relative_to(root)} imports ftlib.{other}"


def test_imports_within_functions_find_what_they_name(root):
    found = []
    for path in (root / "ftlib").rglob("*.py"):
        package = ".".join(path.relative_to(root).with_suffix("").parts[:-1])
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom): continue
            module = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            if module.split(".")[0] == "ftlib" and module != "ftlib":
                found += [(str(path.relative_to(root)), module, a.name) for a in node.names]
    assert len(found) > 300
    def is_there(module, name):
        there = importlib.import_module(module)
        return hasattr(there, name) or hasattr(there, "__path__") and importlib.util.find_spec(f"{module}.{name}")
    assert [f for f in found if not is_there(*f[1:])] == []


def test_rooms_stay_small(root):
    for path in (root / "ftlib").rglob("*.py"):
        lines = [l for l in path.read_text().splitlines() if l.strip() and not l.lstrip().startswith("#")]
        if path.name != "_modidx.py":
            assert len(lines) <= 260, f"{path.relative_to(root)}: {len(lines)} lines of code; make it two rooms"


def test_slow_cells_are_marked_for_both_runners(root):
    for path in notebooks(root):
        for cell in code_cells(path):
            slow = bool(re.search(r"^#\|\s*slow\b", cell["source"], re.M))
            skipped = "skip-execution" in cell["metadata"].get("tags", [])
            assert slow == skipped, f"{path.name}: '#| slow' needs the tag skip-execution:\n{cell['source'][:200]}"


def test_saved_outputs_hold_no_error(root):
    for path in notebooks(root):
        for cell in code_cells(path):
            assert not [o for o in cell["outputs"]
                        if o["output_type"] == "error"], f"{path.name}: {cell['source'][:200]}"


def test_text_keeps_to_the_project(root):
    "No unfinished work, no path of one machine, no line too long to read"
    unfinished, someones = re.compile(r"\b(TO" r"DO|FIX" r"ME|X" r"XX)\b"), re.compile(r"/(?:home|Users|root|work)/\w")
    for folder, kinds in {"ftlib": (".py",), "tests": (".py",), "docs": (".py",), "bench": (".py",), ".ci": (".py",),
                          "nbs": (".ipynb",)}.items():
        for path in (p for p in (root / folder).rglob("*") if p.suffix in kinds
                     and not {"_build", "pages"} & set(p.parts)):
            text, name = re.sub(r'"image/png": "[^"]*"', "", path.read_text(encoding="utf-8")), path.relative_to(root)
            assert not unfinished.search(text), f"{name}: {unfinished.search(text)[0]}"
            found = someones.search(text)
            assert not found, f"{name}: {text[max(0, found.start() - 60):found.end() + 60]!r}"
            bare = re.search(r"^\s*except\s*:", text, re.M)
            assert not bare, f"{name}: a bare except"


def test_the_badge_of_a_tutorial_leads_to_colab(root, monkeypatch):
    "Tutorials have it once setup.cfg names the project's address"
    monkeypatch.syspath_prepend(root / "docs")
    from pages import colab_badge
    for url in ("https://github.com/me/ftlib", "https://github.com/me/ftlib.git", "https://github.com/me/ftlib/"):
        badge = colab_badge("nbs/tutorials/ship.ipynb", url)
        assert badge.endswith("(https://colab.research.google.com/github/me/ftlib/blob/main/nbs/tutorials/ship.ipynb)")
    for url in ("https://example.com/me/ftlib", "github.com/me/ftlib", "https://github.com/me"):
        with pytest.raises(ValueError, match="url ="): colab_badge("nbs/tutorials/ship.ipynb", url)
