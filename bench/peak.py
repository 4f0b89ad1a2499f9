"""Which share of the processor's peak a training step reaches: plain torch beside ftlib's unfrozen epoch.

The peak is that of a large matrix product, in single precision and in bfloat16, measured in every round beside the
steps. A row is one way to train in one round: images/s, the floating-point operations a second of the convolutions and
linear layers (a multiplication and an addition are two: 10.65 GFLOP a training image for resnet18 at 224 pixels), and
their share of the peak in the same precision. `step` trains on a batch that is there already, `epoch` reads decoded
images, augments and normalises them.

Where other programs run on the machine, `--clock cpu` counts the processor time of this process (all its threads) in
place of seconds: compare its shares with one thread only (OMP_NUM_THREADS=1). Of the workers that load images it knows
nothing.
"""

import os
import tempfile
import time
from contextlib import nullcontext
from functools import partial

import torch
from fastai.data.core import DataLoaders
from learners import ftlib_learner
from results import Results, arguments
from speed import steps
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet18


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def peak(dtype, n, clock):
    "FLOP/s of a product of two n × n matrices: the best of three"
    a, b = (torch.randn(n, n).to(DTYPES[dtype]) for _ in range(2))
    a @ b
    return max(2 * n ** 3 / timed(lambda: a @ b, clock) for _ in range(3))


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def timed(call, clock):
    start = CLOCKS[clock]()
    call()
    return CLOCKS[clock]() - start


def flops_of(net, size):
    "Floating-point operations for a training image: of the forward and the backward pass"
    with FlopCounterMode(display=False) as counter: net.eval()(torch.zeros(1, 3, size, size)).sum().backward()
    net.zero_grad()
    return counter.get_total_flops()


def by_torch(batch, dtype, channels_last, n):
    "n steps of a network of torchvision with the optimizer that ftlib takes"
    net, (x, y) = resnet18(num_classes=10).train(), batch
    if channels_last: net, x = (o.to(memory_format=torch.channels_last) for o in (net, x))
    opt = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True)
    def run():
        for _ in range(n):
            with nullcontext() if dtype == "fp32" else torch.autocast("cpu", torch.bfloat16): out = net(x)
            nn.functional.cross_entropy(out.float(), y).backward()
            opt.step()
            opt.zero_grad()
    return run


class Same:
    "A loader that gives one batch again and again"
    device = torch.device("cpu")
    def __init__(self, batch, n): self.batch, self.n, self.bs, self.dataset = batch, n, len(batch[0]), range(n)
    def __iter__(self): return iter([self.batch] * self.n)
    def __len__(self): return self.n
    def to(self, device): return self


def unfrozen(args):
    learn = ftlib_learner(args.data / args.sets[0], args.weights, 0, args.size, args.bs)
    learn.unfreeze()
    learn.dls.train.decoded.ready()
    return learn


def by_ftlib(args, batch):
    "n steps on a batch that is there already"
    learn = unfrozen(args)
    learn.dls = DataLoaders(Same(batch, args.n), Same(batch, 1))
    return learn, partial(steps, learn, args.n)


def ways(args):
    "name → (learner or None, what runs n steps)"
    learn = unfrozen(args)
    x, y = learn.dls.train.one_batch()
    batch = x.as_subclass(torch.Tensor).clone(), y.as_subclass(torch.Tensor).clone() % 10
    for dtype, channels_last in (("fp32", False), ("fp32", True), ("bf16", True)):
        yield f"torch, step, {dtype}{', channels last' * channels_last}", dtype, None, by_torch(
            batch, dtype, channels_last, args.n)
    stepping, run = by_ftlib(args, batch)
    yield "ftlib, step", None, stepping, run
    yield "ftlib, epoch", None, learn, partial(steps, learn, args.n)


def main():
    parser = arguments(__doc__, "peak.csv", ["flowers5"], [0], size=224)
    parser.add_argument("--n", type=int, default=4, help="steps in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--matrix", type=int, default=4096, help="rows of the matrices")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="seconds, or processor time of this process")
    parser.add_argument("--beside", default="nothing", help="what else ran on the machine, for the table")
    args = parser.parse_args()
    os.environ["FTLIB_CACHE"] = tempfile.mkdtemp()
    os.environ.pop("FTLIB_PRECISION", None)
    results, made = Results(args.out, "round", "way"), list(ways(args))
    flops = flops_of(made[-1][2].model, args.size)
    for _, _, _, run in made: run()  # warm-up; ftlib chooses its precision
    for i in range(args.rounds):
        peaks = {dtype: peak(dtype, args.matrix, args.clock) for dtype in DTYPES}
        for name, dtype, learn, run in made:
            seconds = timed(run, args.clock)
            dtype = dtype or learn.precision_policy.dtype
            rate = args.n * args.bs / seconds
            results.add(round=i, way=name, precision=dtype, size=args.size, bs=args.bs, **{"images/s": rate},
                        gflops=flops * rate / 1e9, peak_gflops=peaks[dtype] / 1e9, share=flops * rate / peaks[dtype],
                        gflop_an_image=flops / 1e9, threads=torch.get_num_threads(), clock=args.clock,
                        beside=args.beside)
    print(summary(results.table).to_string())


def summary(table):
    "Medians over the rounds"
    table = table.groupby(["way", "precision"], sort=False)[["images/s", "gflops", "peak_gflops"]].median()
    return table.assign(share=table.gflops / table.peak_gflops)


if __name__ == "__main__": main()
