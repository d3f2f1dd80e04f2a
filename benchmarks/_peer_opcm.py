"""FusionBench's OPCM over folders of CLIP vision towers; run by the interpreter of its own environment.

    python _peer_opcm.py BASE OUT EXPERT... --threads N [--float64]

Its own pool class reads one model at a time when the algorithm asks for it; nothing is logged, evaluated or
saved on the way. `.diagonal().fill_(0)` does drop the diagonal in 0.2.33, so ours runs with `--diagonal drop`.
Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time

parser = argparse.ArgumentParser()
parser.add_argument("base")
parser.add_argument("out")
parser.add_argument("experts", nargs="+")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--float64", action="store_true", help="load and merge in float64, write float64")
args = parser.parse_args()
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}

import lightning  # noqa: E402
import torch  # noqa: E402
from fusion_bench.method.opcm.opcm_general import OPCM  # noqa: E402
from fusion_bench.modelpool.base_pool import BaseModelPool  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import CLIPVisionModel  # noqa: E402, F401  (the pool finds it by name: pay for the import here)

torch.set_num_threads(args.threads)


def loader(folder: str) -> dict[str, str]:
    return {
        "_target_": "transformers.CLIPVisionModel.from_pretrained",
        "pretrained_model_name_or_path": folder,
        "torch_dtype": "float64" if args.float64 else "float32",
    }


pool = BaseModelPool(
    {"_pretrained_": loader(args.base)} | {f"expert_{i}": loader(x) for i, x in enumerate(args.experts)}
)
algorithm = OPCM(alpha=0.5, shuffle_order=False, seed=0, save_on_every_step=False, evaluate_on_every_step=False)
algorithm.fabric = lightning.Fabric(accelerator="cpu", devices=1)

start = time.perf_counter()
merged = algorithm.run(pool)
merge_s = time.perf_counter() - start
os.makedirs(args.out, exist_ok=True)
save_file({name: x.contiguous() for name, x in merged.state_dict().items()}, f"{args.out}/model.safetensors")
inside_s = time.perf_counter() - start
print(json.dumps({"merge_s": merge_s, "inside_s": inside_s, "torch": torch.__version__}))
