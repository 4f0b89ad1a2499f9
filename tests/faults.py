"""Kills a training at random moments, lets it go on, and compares its last weights with those of one that nobody
killed (`make faults`).

A training is two fits, of the head and of everything, kept in a folder after each epoch, in some settings after each
two steps as well. It runs in a process of its own, which is sent SIGKILL, again and again until so many kills have
hit. Every one that ends must end on the same weights, momenta and history.
"""

import argparse
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from test_checkpoint import each_two_steps, learner, images, train

from ftlib.persist.checkpoint import Checkpoint

SETTINGS = {"features kept": {}, "images each time": dict(cache=False),
            "features, each two steps": dict(how=each_two_steps),
            "images, each two steps": dict(cache=False, how=each_two_steps)}


def digest(state):
    "Of tensors and a history"
    tensors, history = state
    h = hashlib.sha256(history.to_csv().encode())
    for t in tensors: h.update(np.ascontiguousarray(t.cpu().numpy()).tobytes())
    return h.hexdigest()


def begun(folder, place, told, cache=True, how=Checkpoint):
    "A process that trains, or goes on training, and writes the digest of what it ends on; its number"
    if child := os.fork(): return child
    try:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        warnings.simplefilter("ignore")
        told.write_text(digest(train(learner(folder, cache=cache), place, resume=True, how=how)))
    finally: os._exit(0)


def ended(child, seconds):
    "Waits so long; was it over by then? If not, it is killed"
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if os.waitpid(child, os.WNOHANG)[0]: return True
        time.sleep(.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    torch.set_num_threads(1)
    kills = runs = lost = 0
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        os.environ["FTLIB_CACHE"] = str(root / "cache")
        folder = images(root / "set")
        wanted, lasts = {}, {}
        for name, setting in SETTINGS.items():
            start, told = time.monotonic(), root / "whole"
            assert ended(begun(folder, root / f"whole {name}", told, **setting), 600)
            wanted[name], lasts[name] = told.read_text(), time.monotonic() - start
            told.unlink()
            print(f"{name}: {lasts[name]:.1f} s undisturbed, {wanted[name][:16]}", flush=True)
        while kills < args.kills:
            name = list(SETTINGS)[runs % len(SETTINGS)]
            place, told, here = root / f"run {runs}", root / "told", 0
            while not ended(begun(folder, place, told, **SETTINGS[name]),
                            random.uniform(0, lasts[name]) if here < 6 else 600):
                here += 1
            same = told.exists() and told.read_text() == wanted[name]
            told.unlink(missing_ok=True)
            kills, runs, lost = kills + here, runs + 1, lost + (not same)
            if not same: print(f"run {runs}, {name}: killed {here} times, it ended on other weights", flush=True)
            if runs % 10 == 0: print(f"{kills} kills, {runs} trainings, {lost} on other weights", flush=True)
    print(f"{kills} kills in {runs} trainings: {runs - lost} ended on the weights, momenta and history of one that was "
          f"not killed.")
    raise SystemExit(bool(lost))


if __name__ == "__main__": main()
