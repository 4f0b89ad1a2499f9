"""`ftlib predict` over many files, some of them broken: images a second beside the forward pass alone, and the most
memory it took.

Links to the images of a set are made in a temporary folder, as many as `--files`, of which `--broken` lead to files
that are no images. Each way runs in a process of its own: `forward` is the network on batches that are ready,
`decode` the preparation alone, `predict` the command, which also writes the CSV. `predict` runs with a tenth of the
files too: with constant memory, both take the same.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from results import Results, arguments


def peak():
    "The most memory that this process took, in MB; of its own, not inherited from the one that started it"
    try:
        return int(next(line for line in Path("/proc/self/status").read_text().splitlines()
                        if line.startswith("VmHWM")).split()[1]) / 1024
    except (OSError, StopIteration): return float("nan")


def linked(folder, images, files, broken):
    "A folder of links to images, every so often one that is none"
    folder.mkdir()
    (folder.parent / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    for i in range(files):
        bad = broken and i % (files // broken) == 0 and i // (files // broken) < broken
        # the target of several links is listed once, so that images are copied where there are too few
        target = folder / f"{i:06}.jpg"
        if bad: target.write_bytes(b"\xff\xd8\xff\xe0 no image " + str(i).encode())
        else:
            image = images[i % len(images)]
            target.write_bytes(image.read_bytes()) if i >= len(images) else target.symlink_to(image.resolve())
    return folder


def bundle_of(args, folder, path):
    "A bundle of a network with a new head: what is timed does not depend on training"
    import ftlib
    from fastai.vision.all import accuracy
    dls = ftlib.image_data(folder, size=args.size, bs=args.bs, num_workers=0, seed=0, cache=False)
    learn = ftlib.vision_learner(dls, args.arch, weights=args.weights, metrics=accuracy, seed=0)
    with learn.no_bar(): ftlib.save_bundle(learn, path)


def forward(model, folder, bs, n):
    "Images a second of the network alone"
    x = torch.randint(0, 256, (bs, 3, model.prepare.size, model.prepare.size), dtype=torch.uint8)
    model.probabilities(x)
    start, steps = time.perf_counter(), max(3, min(n, 1024) // bs)
    for _ in range(steps): model.probabilities(x)
    return dict(images=steps * bs, seconds=time.perf_counter() - start, errors=0)


def decode(model, folder, bs, n):
    "Images a second of decoding and resizing alone, with as many threads as `predict` has"
    import os
    from ftlib.deploy.predict import _prepared, find_images
    start, found = time.perf_counter(), [error is None for _, _,
                                         error in _prepared(model.prepare, find_images(folder), os.cpu_count() or 1,
                                                            2 * bs)]
    return dict(images=sum(found), seconds=time.perf_counter() - start, errors=found.count(False))


def predict(path, folder, bs, out):
    "The command of the shell"
    import pandas as pd
    from ftlib.cli.parser import main
    start = time.perf_counter()
    code = main(["predict", str(folder), "--model", str(path), "--csv", str(out), "--bs", str(bs)])
    if code: raise SystemExit(code)
    seconds, table = time.perf_counter() - start, pd.read_csv(out)
    return dict(images=int(table["error"].isna().sum()), seconds=seconds, errors=int(table["error"].notna().sum()))


def one(way, path, folder, bs, n):
    "Times one way; prints a line of JSON"
    import ftlib  # noqa: F401  is not timed
    from ftlib.deploy.bundle import load_bundle
    if way == "predict":
        with tempfile.TemporaryDirectory() as place: found = predict(path, folder, bs, Path(place) / "classes.csv")
    else: found = {"forward": forward, "decode": decode}[way](load_bundle(path), folder, bs, n)
    print("\n" + json.dumps(found | dict(peak=peak())))


def main():
    if sys.argv[1:2] == ["--one"]: return one(sys.argv[2], *map(Path, sys.argv[3:5]), *map(int, sys.argv[5:7]))
    parser = arguments(__doc__, "predict.csv", ["pets3"], [0], size=224, bs=64)
    parser.add_argument("--arch", default="resnet18", help="a torchvision classifier; --weights is a file for it")
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument("--broken", type=int, default=5, help="files among them that are no images")
    args = parser.parse_args()
    results = Results(args.out, "set", "way", "files")
    with tempfile.TemporaryDirectory() as place:
        for name in args.sets:
            bundle_of(args, args.data / name, path := Path(place) / f"{name}.ftl")
            images = [p for p in sorted((args.data / name).glob("*/*/*")) if p.is_file()]
            for way, files in (("forward", args.files), ("decode", args.files), ("predict", max(args.files // 10, 1)),
                               ("predict", args.files)):
                if results.has(name, way, files): continue
                folder = Path(place) / f"{name}-{files}"
                if not folder.exists(): linked(folder, images, files, min(args.broken, files))
                done = subprocess.run([sys.executable, "-W", "ignore", __file__, "--one", way, str(path), str(folder),
                                       str(args.bs), str(files)], capture_output=True, text=True)
                if done.returncode: raise SystemExit(done.stderr[-2000:])
                found = json.loads(done.stdout.strip().splitlines()[-1])
                results.add(set=name, way=way, files=files, size=args.size, bs=args.bs, **found,
                            **{"images/s": found["images"] / found["seconds"]})
    print(results.table.round(1).to_string(index=False))


if __name__ == "__main__": main()
