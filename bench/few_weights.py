"""How few weights must train? Norms and biases, LoRA adapters and all weights, from the same trained head.

All train by one cycle. `all` is what `fine_tune` does by default: its learning rate, a hundredth of it in the first
stage, the first half of the stages frozen; norms, biases and adapters have one learning rate in all stages. A row is
written as each run ends; what is there already is not run again.
"""

import copy
import resource
import time
from itertools import product

import torch
from batch_norm import data_of, fit, learner
from results import Results, arguments

from ftlib.lr.finder import WHOLE_LR


def begin(learn, way):
    "Choose what trains; learning rates of the groups as shares of the head's"
    n = len(learn.groups_table())
    if way == "norms": learn.freeze("norms")
    elif way == "lora": learn.add_lora()
    elif way == "all":
        learn.freeze_to(n // 2)
        return [100 ** (i / (n - 1) - 1) for i in range(n)]
    return [1.] * n


def sizes(learn, folder):
    "Shares and bytes of what has trained"
    tensors = [t for s in learn.opt.opt.state.values() for t in s.values() if torch.is_tensor(t)]
    ps = list(learn.model.parameters())
    trainable = sum(p.numel() for p in ps if p.requires_grad)
    learn.path = folder
    return dict(trainable=trainable, share=trainable / sum(p.numel() for p in ps),
                momenta=sum(t.numel() * t.element_size() for t in tensors),
                file=learn.save_trained("few").stat().st_size, whole=learn.save("whole", with_opt=False).stat().st_size)


def main():
    parser = arguments(__doc__, "few_weights.csv", ["pets3", "food3", "ants_bees"], [0, 1, 2], size=64, bs=32)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--ways", nargs="+", default=["all", "norms"])
    parser.add_argument("--lrs", nargs="+", type=float, default=[1e-3, 4e-3], help="for all ways but `all`, which has "
                        "its usual one")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--images", type=int, default=450, help="training images at most")
    parser.add_argument("--valid", type=int, default=153, help="validation images at most")
    args = parser.parse_args()
    results = Results(args.out, "set", "arch", "size", "seed", "way", "lr")
    for seed, name in product(args.seeds, args.sets):
        todo = [(way, lr) for way in args.ways for lr in ([WHOLE_LR] if way == "all" else args.lrs)
                if not results.has(name, args.arch, args.size, seed, way, lr)]
        if not todo: continue
        dls = data_of(name, args, seed)
        learn = learner(dls, args, seed)
        head = fit(learn, args.epochs, 2e-3).iloc[-1]
        start = copy.deepcopy(learn.model.state_dict())
        for way, lr in todo:
            learn = learner(dls, args, seed, cache="valid")
            learn.model.load_state_dict(start)
            shares = begin(learn, way)
            began = time.perf_counter()
            rows = fit(learn, args.epochs, [lr * s for s in shares], pct_start=.3, div=5.)
            steps = len(learn.dls.train) * args.epochs
            results.add(set=name, arch=args.arch, size=args.size, seed=seed, way=way, lr=lr,
                        accuracy=rows.accuracy.iloc[-1], loss=rows.valid_loss.iloc[-1], head=head.accuracy,
                        head_loss=head.valid_loss, step=(time.perf_counter() - began) / steps,
                        peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                        **sizes(learn, args.out.resolve().parent))
    print(results.table.groupby(["way", "lr"])[["accuracy", "head", "loss", "head_loss", "share"]].mean().round(4))


if __name__ == "__main__": main()
