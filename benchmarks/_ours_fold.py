"""A whole fold in one process: init, every expert in order in one pass, export. Prints one line of JSON.

python _ours_fold.py BASE STATE OUT EXPERT... --method opcm --threads N
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("base")
parser.add_argument("state")
parser.add_argument("out")
parser.add_argument("experts", nargs="+")
parser.add_argument("--method", default="opcm")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--vector", action="append", default=[])
parser.add_argument("--float64", action="store_true")
args = parser.parse_args()

import torch  # noqa: E402

from merganser import Fold  # noqa: E402

settings = {"alpha": 0.5, "diagonal": "drop"} if args.method == "opcm" else {}

start = time.perf_counter()
fold = Fold.init(
    args.base,
    args.state,
    method=args.method,
    vector=args.vector,
    float64=args.float64,
    threads=args.threads,
    **settings,
)
began = time.perf_counter()
fold.add_all(args.experts, threads=args.threads)
added = time.perf_counter()
fold.export(args.out, dtype="F64" if args.float64 else None, threads=args.threads)
end = time.perf_counter()
print(
    json.dumps(
        {
            "inside_s": end - start,
            "init_s": began - start,
            "add_s": added - began,
            "export_s": end - added,
            "state_bytes": sum(path.stat().st_size for path in Path(args.state).rglob("*") if path.is_file()),
            "torch": torch.__version__,
        }
    )
)
