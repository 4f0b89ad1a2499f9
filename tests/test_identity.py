"""The name of what is remembered changes with everything that it reaches, and with nothing else."""

import os
import subprocess
import sys
import textwrap
import types

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.augment import Resize, aug_transforms
from fastai.vision.core import TensorImage
from fasttransform import Transform
from PIL import Image
from torch import nn

from ftlib.errors import IdentityError
from ftlib.data.images import image_data
from ftlib.cache.identity import identity
from ftlib.system.libraries import is_fastai_transform

# Each edit changes what `f` computes, without a change in the text of `f` itself
EDITS = [
    ("a global", "K = 1\ndef f(x): return x * K", "K = 1", "K = 2"),
    ("a global of another type", "K = 1\ndef f(x): return x / K", "K = 1", "K = 1.0"),
    ("a helper", "def h(x): return x\ndef f(x): return h(x)", "return x\n", "return -x\n"),
    ("a helper's helper", "def g(x): return x\ndef h(x): return g(x)\ndef f(x): return h(x)", "return x\n",
     "return x + 1\n"),
    ("functions that call each other", "def h(x, n): return x if n else f(x, 1)\ndef f(x, n=0): return h(x, n)",
     "x if n", "-x if n"),
    ("a class attribute", "class T:\n    k = 1\n    def go(self, x): return x * self.k\ndef f(x): return T().go(x)",
     "k = 1", "k = 3"),
    ("an inherited attribute", "class A:\n    k = 1\nclass T(A):\n    def go(self, x): return x * self.k\ndef f(x): "
                               "return T().go(x)", "k = 1", "k = 3"),
    ("a property", "class T:\n    @property\n    def k(self): return 1\ndef f(x): return x * T().k", "return 1",
     "return 2"),
    ("a cached property", "from functools import cached_property\nclass T:\n    @cached_property\n    def k(self): "
                          "return 1\ndef f(x): return x * T().k", "return 1", "return 2"),
    ("a static method", "class T:\n    @staticmethod\n    def k(): return 1\ndef f(x): return x * T.k()", "return 1",
     "return 2"),
    ("a class method", "class T:\n    @classmethod\n    def k(cls): return 1\ndef f(x): return x * T.k()", "return 1",
     "return 2"),
    ("a metaclass", "class M(type):\n    def __call__(cls, x): return x\nclass T(metaclass=M): pass\ndef f(x): return "
                    "T(x)", "return x\n", "return -x\n"),
    ("a special method", "class T:\n    def __mul__(self, x): return x\ndef f(x): return T() * x", "return x\n",
     "return -x\n"),
    ("an object's attribute", "class T: pass\nt = T()\nt.k = 1\ndef f(x): return x * t.k", "t.k = 1", "t.k = 2"),
    ("a slot", "class T: __slots__ = 'k',\nt = T()\nt.k = 1\ndef f(x): return x * t.k", "t.k = 1", "t.k = 2"),
    ("a dataclass", "from dataclasses import dataclass\n@dataclass\nclass C:\n    k: int = 1\nC0 = C()\ndef f(x): "
                    "return x * C0.k", "int = 1", "int = 2"),
    ("a named tuple", "from collections import namedtuple\nC = namedtuple('C', 'k')(1)\ndef f(x): return x * C.k",
     "(1)", "(2)"),
    ("an enumeration", "from enum import Enum\nclass E(Enum):\n    A = 1\ndef f(x): return x * E.A.value", "A = 1",
     "A = 2"),
    ("a dictionary in a list", "S = [dict(k=1)]\ndef f(x): return x * S[0]['k']", "k=1", "k=2"),
    ("the order of a dictionary", "S = dict(a=1, b=2)\ndef f(x): return list(S)", "a=1, b=2", "b=2, a=1"),
    ("a set", "S = {'a', 'b', 'c'}\ndef f(x): return x in S", "'c'", "'d'"),
    ("an array", "import numpy as np\nW = np.arange(9)\ndef f(x): return x @ W", "arange(9)", "arange(9)[::-1]"),
    ("a tensor", "import torch\nW = torch.ones(2)\ndef f(x): return x @ W", "torch.ones(2)", "torch.ones(2) * 2"),
    ("a table", "import pandas as pd\nW = pd.DataFrame(dict(a=[1, 2]))\ndef f(x): return W.a.sum()", "[1, 2]",
     "[1, 3]"),
    ("a regular expression", "import re\nR = re.compile('a')\ndef f(x): return R.sub('', x)", "'a'", "'b'"),
    ("a default", "def h(x, k=1): return x * k\ndef f(x): return h(x)", "k=1", "k=2"),
    ("a keyword's default", "def h(x, *, k=1): return x * k\ndef f(x): return h(x)", "k=1", "k=2"),
    ("a closure", "def make(k):\n    def h(x): return x * k\n    return h\nh = make(1)\ndef f(x): return h(x)",
     "make(1)", "make(2)"),
    ("a partial", "from functools import partial\ndef g(k, x): return k * x\nh = partial(g, 1)\ndef f(x): return h(x)",
     "g, 1", "g, 2"),
    ("a bound method", "class T:\n    def __init__(self, k): self.k = k\n    def go(self, x): return x * self.k\nh = "
                       "T(1).go\ndef f(x): return h(x)", "T(1)", "T(2)"),
    ("a function's attribute", "def f(x): return x * f.k\nf.k = 1", "f.k = 1", "f.k = 2"),
    ("a cached helper", "from functools import lru_cache\n@lru_cache\ndef h(x): return x\ndef f(x): return h(x)",
     "return x\n", "return -x\n"),
    ("a wrapped helper", "import functools\ndef d(g):\n    @functools.wraps(g)\n    def w(x): return g(x)\n    return "
                         "w\n@d\ndef h(x): return x\ndef f(x): return h(x)", "def h(x): return x",
                         "def h(x): return -x"),
    ("a wrapper", "import functools\ndef d(g):\n    @functools.wraps(g)\n    def w(x): return g(x)\n    return "
                  "w\n@d\ndef h(x): return x\ndef f(x): return h(x)", "return g(x)", "return -g(x)"),
    ("a helper without gradients", "import torch\n@torch.no_grad()\ndef h(x): return x\ndef f(x): return h(x)",
     "return x\n", "return -x\n"),
    ("a lambda in a list", "S = [lambda x: x, lambda x: x + 1]\ndef f(x): return S[1](x)", "x + 1", "x + 2"),
    ("a helper in a comprehension", "def h(x): return x\ndef f(x): return [h(y) for y in x]", "return x\n",
     "return -x\n"),
    ("a helper in an inner function", "def h(x): return x\ndef f(x):\n    def g(): return (lambda: h(x))()\n    return "
                                      "g()", "return x\n", "return -x\n"),
    ("an annotation that chooses", "from fastai.vision.core import PILImage, TensorImage\nfrom fasttransform import "
                                   "Transform\nclass T(Transform):\n    def encodes(self, x:TensorImage): return x * "
                                   "2\nf = T()", "x:TensorImage", "x:PILImage"),
    ("a transform's method", "from fasttransform import Transform\ndef h(x): return x\nclass T(Transform):\n    def "
                             "encodes(self, x): return h(x)\nf = T()", "return x\n", "return -x\n"),
    ("a function as a transform", "from fasttransform import Transform\nK = 1\ndef h(x): return x * K\nf = "
                                  "Transform(h)", "K = 1", "K = 2"),
    ("a pipeline", "from fasttransform import Pipeline\nK = 1\ndef h(x): return x * K\nf = Pipeline([h])", "K = 1",
     "K = 2"),
    ("a module's plain attribute", "from torch import nn\nclass N(nn.Module):\n    def __init__(self, k): "
                                   "super().__init__(); self.k = k\n    def forward(self, x): return x * self.k\nf = "
                                   "nn.Sequential(N(1))", "N(1)", "N(2)"),
    ("a module's code", "from torch import nn\nclass N(nn.Module):\n    def forward(self, x): return x * 1\nf = "
                        "nn.Sequential(N())", "x * 1", "x * 2"),
    ("what a traced network calls", "import torch\nfrom torch import nn\ndef h(x): return x\nclass N(nn.Module):\n    "
                                    "def forward(self, x): return x.relu()\nf = torch.fx.symbolic_trace(N())", "relu",
                                    "tanh"),
    ("a state of random numbers", "import random\nR = random.Random(1)\ndef f(x): return R.random()", "Random(1)",
     "Random(2)"),
]


def run(source):
    module = types.ModuleType("mine")
    exec(compile(source, "<cell>", "exec"), vars(module))
    return module.f


@pytest.mark.parametrize("source, before, after", [e[1:] for e in EDITS], ids=[e[0] for e in EDITS])
def test_an_edit_of_what_is_reached_is_seen(source, before, after):
    source += "\n"
    assert before in source
    first = identity(run(source))
    assert identity(run(source)) == first  # written once more
    # elsewhere in the file, otherwise indented
    assert identity(run("UNUSED = 5\n\n\n" + source.replace("    ", "  "))) == first
    assert identity(run(source.replace(before, after))) != first


def test_the_same_in_another_process(tmp_path):
    "Addresses, orders of sets, file names and numbers of cells are no part of it"
    script = tmp_path / "script.py"
    sources = [e[1] for e in EDITS]
    script.write_text(textwrap.dedent(f"""
        import sys, types
        from ftlib.cache.identity import identity
        for source in {sources!r}:
            module = types.ModuleType("mine")
            exec(compile(source, sys.argv[1], "exec"), vars(module))
            print(identity(module.f))
    """))
    found = [subprocess.run([sys.executable, "-W", "ignore", script, name], env=os.environ | {"PYTHONHASHSEED": seed},
                            capture_output=True, text=True, check=True).stdout.split()
             for name, seed in (("a", "1"), ("b", "2"))]
    assert found[0] == found[1] and len(found[0]) == len(EDITS)


@pytest.fixture
def own_modules(tmp_path, monkeypatch):
    "Writes modules of the user's own, and gives one function of a main module afresh"
    monkeypatch.syspath_prepend(str(tmp_path))
    names = []
    def load(main, **files):
        for n in ("main_", *names): sys.modules.pop(n, None)
        names[:] = files
        for n, text in files.items(): (tmp_path / f"{n}.py").write_text(text)
        sys.path_importer_cache.clear()
        module = types.ModuleType("main_")
        sys.dont_write_bytecode = True
        exec(main, vars(module))
        return module.f
    yield load
    sys.dont_write_bytecode = False
    for n in names: sys.modules.pop(n, None)


@pytest.mark.parametrize("main", [
    "import helpers_\ndef f(x): return helpers_.h(x)", "from helpers_ import h\ndef f(x): return h(x)",
    "import helpers_ as m\nf = lambda x: getattr(m, 'h')(x)",
    "import helpers_ as m\nclass T:\n    def __init__(self): self.m = m\n    def f(self, x): return self.m.h(x)\nf = "
    "T().f",
    "def f(x):\n    import helpers_\n    return helpers_.h(x)",
    "def f(x):\n    from helpers_ import h\n    return h(x)"])
@pytest.mark.parametrize("edit", ["helpers_", "deeper_"])
def test_modules_of_the_users_own(own_modules, main, edit):
    files = dict(helpers_="import deeper_\nOTHER = 1\ndef h(x): return deeper_.g(x)\n",
                 deeper_="K = 1\ndef g(x): return x * K\n")
    first = identity(own_modules(main, **files))
    assert identity(own_modules(main, **files)) == first
    # what is not imported yet is known by its file
    if edit == "deeper_" and "\n    import" in main or "\n    from" in main: __import__("helpers_")
    first = identity(own_modules(main, **files)) if "helpers_" not in sys.modules else identity(run_loaded(main))
    changed = files | ({"helpers_": files["helpers_"].replace("g(x)", "g(x) + 1")} if edit == "helpers_"
                       else {"deeper_": "K = 2\ndef g(x): return x * K\n"})
    f = own_modules(main, **changed)
    if "\n    import" in main or "\n    from" in main: __import__("helpers_")
    assert identity(f) != first


def run_loaded(main):
    module = types.ModuleType("main_")
    exec(main, vars(module))
    return module.f


@pytest.mark.parametrize("what", [open(os.devnull), (i for i in range(3)), __import__("threading").Lock(),
                                  __import__("weakref").ref(EDITS.__class__), sys._getframe()])
def test_what_cannot_be_told_is_an_error(what):
    def f(x): return what
    for o in (what, f, [f], dict(a=f)):
        with pytest.raises(IdentityError): identity(o)


def test_a_library_is_its_name_and_version(monkeypatch):
    net, transform = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), Resize(64)
    first, plain = identity([net, transform]), identity([net, transform], versions=False)
    monkeypatch.setattr(torch, "__version__", "99")
    assert identity([net, transform]) != first and identity([net, transform], versions=False) == plain


def test_state_that_moves_is_no_part_of_it(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(8):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(tmp_path / "ab"[i % 2] / f"{i}.png")
    dls, tfms = image_data(tmp_path, size=16, bs=2, num_workers=0, valid=.5, cache=False), aug_transforms(size=16)
    first = identity([dls, tfms])
    for x, _ in dls.train: [t(TensorImage(x), split_idx=0) for t in tfms]
    assert identity([dls, tfms]) == first
    (tmp_path / "a" / "0.png").write_bytes((tmp_path / "b" / "1.png").read_bytes())
    assert identity(dls) != first


def test_whose_code_a_transform_is():
    def mine(x): return x
    class Mine(Transform):
        def encodes(self, x): return x
    class Subclass(Resize): pass
    assert [is_fastai_transform(o) for o in (Resize(8), *aug_transforms(), Mine(), Transform(mine),
        Transform(mine, split_idx=0), Subclass(8), mine, Transform(lambda x: x))] == \
        [True] * (1 + len(aug_transforms())) + [False] * 6


def test_large_and_deep_objects_take_no_minutes():
    deep = []
    for _ in range(100_000): deep = [deep]
    with pytest.raises(IdentityError): identity(deep)
    table = pd.DataFrame(dict(a=range(10_000)))
    assert identity(table) == identity(table.copy())
