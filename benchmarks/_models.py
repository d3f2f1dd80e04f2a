"""Checkpoints of the size of CLIP ViT-B/32's vision tower, and the comparison of merges of them.

    python benchmarks/_models.py generate DIR --experts 8 [--small]
    python benchmarks/_models.py compare BASE EXPERT... --merged DIR...

Runs in a process of its own, so that its memory is never mistaken for the measured one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FULL = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
SMALL = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 3, "num_attention_heads": 3}
RANK, LOW_RANK_ENERGY = 16, 0.7
LAYER = "vision_model.encoder.layers."
CONV = "vision_model.embeddings.patch_embedding.weight"
CLASS = "vision_model.embeddings.class_embedding"


def model_config(small: bool) -> dict[str, object]:
    """config.json from which transformers builds the module."""
    sizes = SMALL if small else FULL
    fixed = {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"], "hidden_act": "quick_gelu"}
    return fixed | sizes | {"image_size": 224, "patch_size": 32, "num_channels": 3, "torch_dtype": "float32"}


def tensor_shapes(config: dict[str, object]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of transformers' CLIPVisionModel, in file order."""
    d, m, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    shapes = {CLASS: (d,), CONV: (d, 3, 32, 32), "vision_model.embeddings.position_embedding.weight": (50, d)}
    linear = {f"self_attn.{p}_proj": (d, d) for p in "qkv"} | {"self_attn.out_proj": (d, d)}
    linear |= {"mlp.fc1": (m, d), "mlp.fc2": (d, m)}
    norms = ["vision_model.pre_layrnorm", "vision_model.post_layernorm"]
    for i in range(layers):
        shapes |= {f"{LAYER}{i}.{name}.weight": shape for name, shape in linear.items()}
        shapes |= {f"{LAYER}{i}.{name}.bias": shape[:1] for name, shape in linear.items()}
        norms += [f"{LAYER}{i}.layer_norm{j}" for j in (1, 2)]
    return shapes | {f"{norm}.{part}": (d,) for norm in norms for part in ("weight", "bias")}


def noise(key: str, *shape: int) -> Tensor:
    """Normal noise that depends on the key alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))


def base_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """A pre-trained tensor: gains near 1, everything else with standard deviation 0.02."""
    is_gain = "norm" in name and name.endswith("weight")
    return 1 + 0.1 * noise(name, *shape) if is_gain else 0.02 * noise(name, *shape)


def change(model: str, name: str, base: Tensor) -> Tensor:
    """A fine-tuning change: a decaying low-rank part plus dense noise, 1 to 5 % of the base's norm."""
    key = f"{model}/{name}"
    strength = 0.01 * 5 ** (zlib.crc32(model.encode()) / 2**32) * math.exp(0.2 * float(noise(f"{key}/strength")))
    dense = noise(f"{key}/noise", *base.shape)
    delta = dense / dense.norm()
    if base.ndim > 1:
        rows, columns = base.flatten(1).shape
        decay = 1 / torch.arange(1, RANK + 1)
        low = (noise(f"{key}/u", rows, RANK) * decay) @ noise(f"{key}/v", RANK, columns)
        low = (low / low.norm()).view_as(base)
        delta = math.sqrt(LOW_RANK_ENERGY) * low + math.sqrt(1 - LOW_RANK_ENERGY) * delta
    return strength * base.norm() * delta


def write_model(folder: Path, model: str, small: bool) -> None:
    """Write one safetensors folder, a tensor at a time; the folder appears only when it is whole."""
    if folder.exists():
        return
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config = model_config(small)
    shapes = tensor_shapes(config)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (partial / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            tensor = base_tensor(name, shape)
            if model != "base":
                tensor += change(model, name, tensor)
            file.write(tensor.numpy())
    (partial / "config.json").write_text(json.dumps(config, indent=2))
    os.replace(partial, folder)


def open_model(folder: Path) -> dict[str, np.ndarray]:
    """Map every tensor of a safetensors folder (one file or shards) without reading it."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        data = np.memmap(path, np.uint8, "r", offset=8 + length)
        for name, info in header.items():
            start, end = info["data_offsets"]
            dtype = {"F32": np.float32, "F64": np.float64}[info["dtype"]]
            tensors[name] = data[start:end].view(dtype).reshape(info["shape"])
    return tensors


def compare(base_folder: Path, expert_folders: list[Path], merged_folders: list[Path]) -> dict[str, object]:
    """Relative differences of merged changes, each against the last: the peer's own code run in float64.

    Ours ran with the patch convolution as a vector, because the peer cleans `nn.Linear` alone. What is left:

    - the class embedding belongs to a module with children, which the peer's loop over leaf modules never meets: it
      keeps the first expert's value, shrunk in every step. Left out here; its cosine with the first expert's is given;
    - the peer's norms are float32 over one vector of all parameters: one wrong factor for every tensor. Vectors show
      the factor, since their change is factor * sum of the experts' changes and nothing else;
    - dropping the diagonal takes single singular pairs, and pairs of close values turn with any rounding of the sum.
      Each step hands the difference to the next, two or three times larger. So float32 runs part in a few matrices,
      and only float64 against float64 shows whether two programs compute the same.

    The one factor is divided out of the differences and given on its own.

    Args:
        base_folder: the base.
        expert_folders: the experts in their order.
        merged_folders: the merged models: ours, the peer's second, the judge last.
    """
    base, experts = open_model(base_folder), [open_model(folder) for folder in expert_folders]
    models = [open_model(folder) for folder in merged_folders]
    if any(model.keys() != base.keys() for model in models):
        raise SystemExit("the merged models do not have the tensors of the base")
    rows = []  # by tensor and model: <change, change>, <change, judge>, <judge, judge>
    expert_squares, base_squares = np.zeros(len(experts)), 0.0
    fits = np.zeros(len(models))  # <change, sum of the experts' changes> over vectors
    for name, stored in base.items():
        b = stored.astype(np.float64)
        merged = [model[name] - b for model in models]
        deltas = [expert[name] - b for expert in experts]
        expert_squares += [np.vdot(d, d) for d in deltas]
        base_squares += float(np.vdot(b, b))
        if name == CLASS:
            theirs, first = merged[1], deltas[0]
            cosine = float(np.vdot(theirs, first) / np.sqrt(np.vdot(theirs, theirs) * np.vdot(first, first)))
            continue
        judge = merged[-1]
        rows.append([[np.vdot(x, x), np.vdot(x, judge), np.vdot(judge, judge)] for x in merged[:-1]])
        if not is_linear(name):
            total = sum(deltas)
            fits += [np.vdot(x, total) for x in merged]
    factor = fits[:-1] / fits[-1]
    own, cross, judged = np.moveaxis(np.array(rows), 2, 0)
    squares = np.maximum(0, own / factor**2 - 2 * cross / factor + judged)  # good to 1e-16 of judged
    return {
        "all": np.sqrt(squares.sum(0) / judged.sum(0)).tolist(),
        "median": np.median(np.sqrt(squares / judged), 0).tolist(),
        "worst": np.sqrt(squares / judged).max(0).tolist(),
        "factor": (factor - 1).tolist(),
        "class_cosine": cosine,
        "strength": np.sqrt(expert_squares / base_squares).tolist(),
    }


def is_linear(name: str) -> bool:
    """Whether transformers holds the tensor as the weight of an nn.Linear."""
    return name.endswith(("_proj.weight", "fc1.weight", "fc2.weight"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser("generate")
    generate.add_argument("folder", type=Path)
    generate.add_argument("--experts", type=int, default=8)
    generate.add_argument("--small", action="store_true")
    check = commands.add_parser("compare")
    check.add_argument("base", type=Path)
    check.add_argument("experts", type=Path, nargs="+")
    check.add_argument("--merged", type=Path, nargs="+", required=True)
    args = parser.parse_args()
    if args.command == "compare":
        print(json.dumps(compare(args.base, args.experts, args.merged)))
        return
    for model in ["base", *(f"expert-{i:02d}" for i in range(1, args.experts + 1))]:
        write_model(args.folder / model, model, args.small)


if __name__ == "__main__":
    main()
