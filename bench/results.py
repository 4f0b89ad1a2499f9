"""What the benches share: their arguments, and a table that goes on where a run was cut short."""

import argparse
import warnings
from pathlib import Path

import pandas as pd

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


def arguments(doc, out, sets, seeds, size=128, bs=32):
    "A parser with what every bench takes"
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED / "data",
                        help="folder of sets, each with train and valid folders")
    parser.add_argument("--weights", type=Path, default=SHARED / "weights" / "resnet18-f37072fd.pth",
                        help="a file for resnet18")
    parser.add_argument("--sets", nargs="+", default=sets)
    parser.add_argument("--seeds", nargs="+", type=int, default=seeds)
    parser.add_argument("--size", type=int, default=size, help="pixels per side")
    parser.add_argument("--bs", type=int, default=bs, help="images in a batch")
    parser.add_argument("--out", type=Path, default=Path("runs") / out,
                        help="the table; what it holds already is not run again")
    warnings.simplefilter("ignore")
    return parser


class Results:
    "Rows of a CSV, written as they come; `keys` tell a row from others"
    def __init__(self, path, *keys):
        self.path, self.keys = Path(path), keys
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = pd.read_csv(path).to_dict("records") if self.path.exists() else []

    def has(self, *values): return any(tuple(r[k] for k in self.keys) == values for r in self.rows)

    def add(self, **row):
        self.rows.append(row)
        print({k: f"{v:.2g}" if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        self.table.to_csv(self.path, index=False)

    @property
    def table(self): return pd.DataFrame(self.rows)
