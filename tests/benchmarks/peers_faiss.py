"""What the interpreter of `.venv-peers` runs for `codes`: faiss's residual quantizer, trained and timed on vectors from files.

peers_faiss.py <folder> <levels> <bits>: trains on train.npy, then for each line "<beam>" of the input encodes items.npy with
one thread and prints the seconds of CPU and the mean squared error. It imports nothing of ours.
"""

import json
import sys
import time

import faiss
import numpy as np


def main() -> None:
    folder, levels, bits = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    faiss.omp_set_num_threads(1)
    train, items = np.load(f"{folder}/train.npy"), np.load(f"{folder}/items.npy")
    quantizer = faiss.ResidualQuantizer(train.shape[1], levels, bits)
    default = quantizer.max_beam_size
    started = time.process_time()
    quantizer.train(train)
    print(json.dumps({"version": faiss.__version__, "beam": default, "train": time.process_time() - started}), flush=True)
    for line in sys.stdin:
        quantizer.max_beam_size = int(line)
        started = time.process_time()
        codes = quantizer.compute_codes(items)
        seconds = time.process_time() - started
        error = float(np.square(quantizer.decode(codes) - items).sum(1).mean())
        print(json.dumps({"seconds": seconds, "error": error}), flush=True)


if __name__ == "__main__":
    main()
