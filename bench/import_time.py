"""What `from ftlib import *` costs beside `from fastai.vision.all import *`: fresh processes in turn, the least of
several.

The least, because whatever else the machine does can only add to it.
"""

import argparse
import subprocess
import sys
import time

LINES = {"fastai": "from fastai.vision.all import *", "ftlib": "from ftlib import *"}


def seconds(line):
    "Wall time of a Python process that runs `line`, start-up included"
    start = time.perf_counter()
    subprocess.run([sys.executable, "-W", "ignore", "-c", line], check=True)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="processes for each of the two (default: 7)")
    rounds = parser.parse_args().rounds
    times = {name: [] for name in LINES}
    for line in LINES.values(): seconds(line)  # files into the page cache
    for _ in range(rounds):
        for name, line in LINES.items(): times[name].append(seconds(line))
    least = {name: min(t) for name, t in times.items()}
    for name, line in LINES.items(): print(f"{line:36} {least[name]:6.2f} s  (of {rounds})")
    print(f"ftlib / fastai {least['ftlib'] / least['fastai']:.3f}  (to reach: at most 1.10)")


if __name__ == "__main__": main()
