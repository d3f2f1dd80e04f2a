"""adapter_config.json, read strictly: a LoRA whose meaning is known, or a refusal that names the setting."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from merganser.errors import AdapterError, CheckpointError

CONFIG_NAME = "adapter_config.json"

#: Settings that change nothing about what is added to the base: they chose what to train, or how to start.
WITHOUT_EFFECT = (
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "peft_type", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
)  # fmt: skip

#: Settings that make the adapter something other than a low-rank sum, and why it cannot be folded.
REFUSED: Mapping[str, str] = {
    "alora_invocation_tokens": "an activated LoRA applies from one token on, which no merged weight can do",
    "arrow_config": "Arrow chooses experts token by token, which no merged weight can do",
    "kasa_config": "KaSA truncates the base's weights before it trains",
    "layer_replication": "it builds a deeper model than the base",
    "megatron_config": "it belongs to Megatron's parallel layers",
    "monteclora_config": "Monte Carlo LoRA samples its weights",
    "target_parameters": "it adapts parameters of expert layers, whose layout the adapter does not tell",
    "trainable_token_indices": "it trains single rows of an embedding",
    "use_bdlora": "block-diagonal factors are not read",
    "use_qalora": "it belongs to group-wise quantised layers",
    "velora_config": "VeLoRA's projections are not read",
}

STARTS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What adapter_config.json says about the sum W + s B A.

    Attributes:
        r: rank, where no pattern says otherwise.
        lora_alpha: numerator of the scaling s, where no pattern says otherwise.
        rank_pattern: (regular expression of a module's name, rank), the first that matches counts.
        alpha_pattern: (regular expression of a module's name, alpha), the first that matches counts.
        use_rslora: divide by sqrt(r) and not by r.
        use_dora: rescale every output to a learned norm.
        lora_bias: B has a bias.
        fan_in_fan_out: weights are stored as (in, out).
    """

    r: int
    lora_alpha: float
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    fan_in_fan_out: bool = False

    def rank(self, module: str) -> int:
        """Rank of a module.

        >>> LoraConfig(r=8, lora_alpha=16, rank_pattern=(("q_proj", 2),)).rank("layers.0.q_proj")
        2
        """
        return _first_match(self.rank_pattern, module, self.r)

    def scaling(self, module: str) -> float:
        """Factor of B A for a module.

        >>> LoraConfig(r=4, lora_alpha=8, use_rslora=True).scaling("layers.0.q_proj")
        4.0
        """
        alpha, rank = _first_match(self.alpha_pattern, module, self.lora_alpha), self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def canonical(self) -> str:
        """One line that two configs share exactly when they mean the same."""
        return json.dumps(asdict(self), sort_keys=True)


def read_config(path: Path) -> LoraConfig:
    """Read and check an adapter_config.json.

    Raises:
        CheckpointError: If it is missing or not sound JSON.
        AdapterError: If it is not a LoRA, or one with settings that cannot be folded faithfully.
    """
    try:
        settings = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not sound JSON: {error}") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    if settings.get("peft_type") != "LORA":
        raise AdapterError(
            f"{path}: peft_type is {settings.get('peft_type')!r}; only LORA can be applied",
            "merge it with the library that trained it, and give the merged model",
        )
    _refuse_variants(settings, path)
    return LoraConfig(
        r=_rank(settings.get("r"), "r", path),
        lora_alpha=_number(settings.get("lora_alpha"), "lora_alpha", path),
        rank_pattern=tuple((k, _rank(v, f"rank_pattern of {k!r}", path)) for k, v in _pattern(settings, "rank", path)),
        alpha_pattern=tuple(
            (k, _number(v, f"alpha_pattern of {k!r}", path)) for k, v in _pattern(settings, "alpha", path)
        ),
        **{name: _flag(settings, name, path) for name in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out")},
    )


def _refuse_variants(settings: Mapping[str, Any], path: Path) -> None:
    for name, value in settings.items():
        if name in REFUSED and value not in (None, False, [], {}):
            raise AdapterError(f"{path} sets {name}: {REFUSED[name]}")
        known = name in WITHOUT_EFFECT or name in REFUSED or name in LoraConfig.__slots__
        if not known and value:
            raise AdapterError(f"{path} sets {name}, whose effect on the weights is not known")
    start = str(settings.get("init_lora_weights", True)).lower()
    if start not in STARTS:
        raise AdapterError(
            f"{path}: init_lora_weights is {start!r}, which changes the base's weights before training",
            "convert the adapter where it was trained: save_pretrained(path_initial_model_for_weight_conversion=...)",
        )


def _number(value: object, name: str, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise AdapterError(f"{path}: {name} is {value!r}; it is a number")
    return float(value)


def _rank(value: object, name: str, path: Path) -> int:
    number = _number(value, name, path)
    if number < 1 or number != int(number):
        raise AdapterError(f"{path}: {name} is {value!r}; a rank is a whole number from 1")
    return int(number)


def _flag(settings: Mapping[str, Any], name: str, path: Path) -> bool:
    value = settings.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise AdapterError(f"{path}: {name} is {value!r}; it is true or false")
    return value


def _pattern(settings: Mapping[str, Any], what: str, path: Path) -> list[tuple[str, object]]:
    pattern = settings.get(f"{what}_pattern") or {}
    if not isinstance(pattern, dict):
        raise AdapterError(f"{path}: {what}_pattern is not a map of module names")
    for key in pattern:
        try:
            re.compile(key)
        except re.error as error:
            raise AdapterError(f"{path}: {what}_pattern has {key!r}, no regular expression: {error}") from error
    return list(pattern.items())


_Value = TypeVar("_Value")


def _first_match(pattern: tuple[tuple[str, _Value], ...], module: str, default: _Value) -> _Value:
    """Value of the first expression that matches the module's whole name, or the end of it after a dot."""
    return next((value for key, value in pattern if re.match(rf"(.*\.)?({key})$", module)), default)
