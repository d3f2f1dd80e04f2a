"""What does merging cost beside training, at ResNet-20 of width 1, and what does Ray cost on one machine?

    python benchmarks/decentral.py [--items 1000] [--epochs 2] [--rounds 3] [--ray] [--out FILE]

Five agents on a ring train on pictures of 32 x 32 that are drawn, and merge: times depend on sizes, not on what is to
be seen. Overhead of a round is all that is neither training nor judging: sending, matching, merging, statistics of
BatchNorm taken again, checkpoints; as a share of training, median over rounds after the first (in which agents may
take over an order of units). Statistics and matching look at so many pictures of a shard and no more, so the overhead
is said for larger shards, too.

With --ray the same rounds run with a process for every agent as well, and models are compared bit by bit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from merganser.decentral.rounds import run, together
from merganser.decentral.torch_learner import Labelled, TorchLearner
from merganser.decentral.words import RunConfig, read_config
from merganser.study.agents import Classifier
from merganser.study.networks import new_encoder

AGENTS, CLASSES, BATCH = 5, 10, 50
#: Sizes of shards that the overhead is also said for; 10,000 is a fifth of CIFAR.
SHARDS = (1_000, 2_000, 5_000, 10_000)
SPENT = ("train", "merge", "evaluate")
RULES: dict[str, dict[str, Any]] = {
    "WA + BN": {"rule": "plain"},
    "aligned once, then WA + BN": {"rule": "aligned_once", "match": {"images": 500}},
    "DIMAT, 250 pictures": {"rule": "aligned", "match": {"images": 250}},
    "DIMAT, 1,000 pictures": {"rule": "aligned", "match": {"images": 1000}},
}


class Drawn:
    """Makes learners with pictures that are drawn; it can be sent to another process."""

    def __init__(self, config: RunConfig, items: int) -> None:
        self.config, self.items = config, items

    def __call__(self, agent: int) -> TorchLearner:
        """The learner of an agent."""
        torch.manual_seed(agent)
        sizes = {"kind": "resnet", "image": 32, "channels": 16, "blocks": 3, "width": 64}
        network = Classifier(new_encoder(sizes), CLASSES)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(agent)

        def pictures(count: int) -> Labelled:
            x = torch.rand(count, 32, 32, 3, generator=generator) * 2 - 1
            return Labelled(x, torch.arange(count) % CLASSES)

        shard, test = pictures(self.items), pictures(50)
        return TorchLearner(
            network, shard, test, agent=agent, batch=BATCH, images=self.config.merge.match.images,
            optimizer=self.config.optimizer, augment=self.config.augment,
        )  # fmt: skip


def config_of(merge: dict[str, Any], rounds: int, epochs: float) -> RunConfig:
    """A run on a ring."""
    words = {"agents": AGENTS, "rounds": rounds, "local_epochs": epochs, "batch": BATCH, "merge": merge}
    more = {"augment": {"flip": True, "crop": 4}, "network": {}, "data": {"source": {}}, "deadline_s": 3600.0}
    return read_config({**words, **more})


def overheads(lines: Sequence[dict[str, Any]], trained: float) -> dict[str, float]:
    """Seconds of a round over all agents, medians after the first, by what they were spent on.

    Args:
        lines: the journal of a run in one process.
        trained: pictures that all agents train on in a round.
    """
    rows = []
    for line in lines[1:]:
        spent = {what: sum(agent["seconds"][what] for agent in line["agents"]) for what in SPENT}
        rest = line["seconds"] - spent["train"] - spent["evaluate"]
        rows.append((spent["train"], spent["merge"], rest))
    train, merge, rest = (statistics.median(column) for column in zip(*rows, strict=True))
    return {"train": train, "merge": merge, "rest": rest, "pictures_a_second": trained / train}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1000, help="pictures of an agent")
    parser.add_argument("--epochs", type=float, default=2.0, help="passes over them in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rules", default="", help="parts of names, with commas between")
    parser.add_argument("--ray", action="store_true", help="with a process for every agent, too")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = options.rules.split(",")
    found: dict[str, Any] = {"torch": torch.__version__, "items": options.items, "epochs": options.epochs}
    trained = AGENTS * BATCH * max(1, round(options.epochs * options.items / BATCH))
    heads = "".join(f"{n:>9,}" for n in SHARDS)
    print(f"{'':28} {'train s':>8} {'merge s':>8} {'rest s':>8} {'overhead':>9}   two epochs on a shard of{heads}")
    for name, merge in RULES.items():
        if not any(part in name for part in parts):
            continue
        config = config_of(merge, options.rounds, options.epochs)
        with tempfile.TemporaryDirectory() as folder:
            crew = together(config, Drawn(config, options.items), folder=Path(folder), aligned=False)
            numbers = overheads(run(config, crew, Path(folder)), trained)
        share = numbers["rest"] / numbers["train"]
        shards = {n: numbers["rest"] * numbers["pictures_a_second"] / (AGENTS * 2 * n) for n in SHARDS}
        found[name] = {**numbers, "overhead": share, "overhead_by_shard": shards}
        tail = "".join(f"{100 * x:8.1f}%" for x in shards.values())
        print(
            f"{name:28} {numbers['train']:8.2f} {numbers['merge']:8.2f} {numbers['rest']:8.2f} {100 * share:8.1f}%"
            f"   {'':24}{tail}",
            flush=True,
        )
    if options.ray:
        found["ray"] = against_ray(options)
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def against_ray(options: argparse.Namespace) -> dict[str, Any]:
    """The same rounds in one process and with one for every agent: seconds of a round, and whether bits differ."""
    from merganser.decentral.ray_crew import on_ray
    from merganser.merging.cluster_ray import connected

    config = config_of(RULES["WA + BN"], options.rounds, options.epochs)
    make = Drawn(config, options.items)
    seconds: dict[str, float] = {}
    models: dict[str, list[bytes]] = {}
    with tempfile.TemporaryDirectory() as root:
        one, many = Path(root) / "one", Path(root) / "many"
        lines = {"one process": run(config, together(config, make, folder=one, aligned=False), one)}
        began = time.perf_counter()
        with connected("local"), on_ray(config, make, many, aligned=False) as crew:
            started = time.perf_counter() - began
            lines["Ray"] = run(config, crew, many)
        for name, folder in (("one process", one), ("Ray", many)):
            seconds[name] = statistics.median(line["seconds"] for line in lines[name][1:])
            models[name] = [path.read_bytes() for path in sorted((folder / "models").glob("*.safetensors"))]
    same = models["one process"] == models["Ray"]
    print(
        f"a round: {seconds['one process']:.2f} s in one process, {seconds['Ray']:.2f} s over Ray with {AGENTS} "
        f"processes on this machine, which began in {started:.1f} s; models "
        f"{'are the same bit for bit' if same else 'DIFFER'}"
    )
    return {"seconds": seconds, "started": started, "same_bits": same}


if __name__ == "__main__":
    main()
