"""Images a second of the training loader: from shards, from the folder, and from the cache of decoded images.

The same images go through the same crop and augmentation in one pass of each loader, in turn, `--rounds` times; what
counts are the medians. `shards` reads tar files from the disk, `http` the same files from a server on this machine,
`folder` decodes each file, `cache` reads decoded images. The files are in the system's
page cache after the first round, which is not counted.
"""

import functools
import http.server
import os
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

from results import Results, arguments

import ftlib


class Quiet(http.server.SimpleHTTPRequestHandler):
    "A server of files that prints nothing"
    def log_message(self, *args): pass


class Server(http.server.ThreadingHTTPServer):
    "One that says nothing of a reader that stops in the middle of a file"
    def handle_error(self, request, client_address): pass


def served(folder):
    "Address of a server of the folder, in a thread"
    server = Server(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


def loaders(args, source, workers, folder):
    "A training loader for each way"
    kw = dict(size=args.size, bs=args.bs, num_workers=workers, seed=0)
    pattern = Path(folder) / "train-%05d.tar"
    if not (Path(folder) / "train-index.json").exists():
        ftlib.write_shards(source, pattern, images_per_shard=args.per_shard, split="train")
    folder_dls, cached = (ftlib.image_data(source, **kw, cache=cache) for cache in (False, True))
    cached.train.decoded.ready()
    return {"shards": ftlib.stream_data(pattern, **kw).train,
            "http": ftlib.stream_data(f"{served(folder)}/train-%05d.tar", **kw).train,
            "folder": folder_dls.train, "cache": cached.train}


def timed(dl):
    "Seconds of a pass, and its images"
    start = time.perf_counter()
    n = sum(len(y) for _, y in dl)
    return time.perf_counter() - start, n


def main():
    parser = arguments(__doc__, "stream.csv", ["flowers5"], [0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--per-shard", type=int, default=500, help="images in a shard")
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2], help="worker processes")
    args = parser.parse_args()
    os.environ["FTLIB_CACHE"] = tempfile.mkdtemp()
    results = Results(args.out, "set", "way", "workers")
    for name in args.sets:
        with tempfile.TemporaryDirectory() as folder:
            for workers in args.workers:
                made = {k: dl for k, dl in loaders(args, args.data / name, workers, folder).items()
                        if not results.has(name, k, workers)}
                for dl in made.values(): timed(dl)
                rounds = [{k: timed(dl) for k, dl in made.items()} for _ in range(args.rounds)]
                for k in made:
                    seconds, n = median(r[k][0] for r in rounds), rounds[0][k][1]
                    results.add(set=name, way=k, workers=workers, size=args.size, bs=args.bs, images=n,
                                seconds=seconds, **{"images/s": n / seconds}, rounds=args.rounds)
    print(results.table.round(2).to_string(index=False))


if __name__ == "__main__": main()
