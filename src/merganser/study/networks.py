"""Networks that a study can run: a checkpoint folder becomes an encoder, items go in, embeddings come out.

`config.json` says what a folder holds: `model_type` "merganser-vit" and "merganser-mlp" are the small networks of this
file, others of `small_networks`; CLIP and BERT-like ones are transformers'. No code that comes with one is run.
"""

from __future__ import annotations

import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from merganser.checkpoints import open_source
from merganser.checkpoints.hub import snapshot
from merganser.errors import MerganserError, MissingTensorError, ParameterError, RefError, ShapeError
from merganser.study.data import Items

#: Longest text in tokens; the rest is cut off.
MAX_TOKENS = 48


class Encoder(nn.Module, ABC):
    """Items to embeddings.

    Attributes:
        width: of an embedding.
    """

    width: int

    @abstractmethod
    def prepare(self, items: Items) -> list[Any]:
        """What the network reads of each item, so that many passes need it once."""

    @abstractmethod
    def embed(self, prepared: list[Any]) -> Tensor:
        """Embeddings, shape (n, width)."""

    def forward(self, prepared: list[Any]) -> Tensor:
        """Embeddings, as for `embed`."""
        return self.embed(prepared)

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """What `config.json` says of it."""


class PixelEncoder(Encoder):
    """Reads uint8 pictures of one size, or a tensor of their pixels."""

    image: int

    def prepare(self, items: Items) -> list[Any]:
        """A tensor a picture."""
        if isinstance(items, tuple) or items.shape[1:] != (self.image, self.image, 3):
            seen = "texts" if isinstance(items, tuple) else f"pictures of {items.shape[1]} x {items.shape[2]}"
            raise ParameterError(f"this network reads pictures of {self.image} x {self.image}, and the task has {seen}")
        return list(torch.from_numpy(np.ascontiguousarray(items)))

    def pixels(self, prepared: list[Any] | Tensor) -> Tensor:
        """Values in [-1, 1], shape (n, image, image, 3); a tensor is taken to hold them already."""
        if isinstance(prepared, Tensor):
            return prepared
        device = next(self.parameters()).device
        x: Tensor = torch.stack(prepared).to(device).float() / 127.5 - 1
        return x


def check_sizes(**sizes: int) -> None:
    """Refuse a size that is no whole number of at least 1."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ParameterError(f"{name} is {size!r}; it is a whole number of at least 1")


class _Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend, then transform; x is (n, tokens, width)."""
        z = self.norm1(x)
        q, k, v = (f(z).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y: Tensor = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return y


class VisionTransformer(PixelEncoder):
    """A small ViT with mean pooling and a projection to the prototypes' width.

    Args:
        image: side of the pictures in pixels.
        patch: side of a patch in pixels.
        hidden: width of the tokens.
        depth: number of blocks.
        heads: of each attention.
        width: of the embedding.
    """

    def __init__(
        self, image: int = 32, patch: int = 8, hidden: int = 192, depth: int = 6, heads: int = 3, width: int = 384
    ) -> None:
        super().__init__()
        check_sizes(image=image, patch=patch, hidden=hidden, depth=depth, heads=heads, width=width)
        if image % patch or hidden % heads:
            raise ParameterError(f"patch {patch} must divide image {image}, and heads {heads} hidden {hidden}")
        self.image, self.patch, self.width = image, patch, width
        self._sizes = {"image": image, "patch": patch, "hidden": hidden, "depth": depth, "heads": heads, "width": width}
        self.embed_patches = nn.Linear(3 * patch * patch, hidden)
        self.position = nn.Parameter(0.02 * torch.randn((image // patch) ** 2, hidden))
        self.blocks = nn.ModuleList(_Block(hidden, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(hidden)
        self.project = nn.Linear(hidden, width)

    def embed(self, prepared: list[Any] | Tensor) -> Tensor:
        """Cut into patches, transform, pool, project."""
        x, p = self.pixels(prepared), self.patch
        n, side = len(x), self.image // p
        x = x.reshape(n, side, p, side, p, 3).swapaxes(2, 3).reshape(n, side * side, 3 * p * p)
        x = self.embed_patches(x) + self.position
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.project(self.norm(x).mean(1))
        return y

    def config(self) -> dict[str, Any]:
        """Sizes."""
        return {"model_type": "merganser-vit", **self._sizes}


class ResidualMlp(PixelEncoder):
    """A residual MLP over all pixels, for tiny grey pictures: the network of the demo."""

    def __init__(self, image: int = 8, hidden: int = 192, depth: int = 3, width: int = 64) -> None:
        super().__init__()
        check_sizes(image=image, hidden=hidden, depth=depth, width=width)
        self.image, self.width = image, width
        self._sizes = {"image": image, "hidden": hidden, "depth": depth, "width": width}
        self.stem = nn.Linear(image * image, hidden)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(depth))
        self.ups = nn.ModuleList(nn.Linear(hidden, 2 * hidden) for _ in range(depth))
        self.downs = nn.ModuleList(nn.Linear(2 * hidden, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(hidden)
        self.project = nn.Linear(hidden, width)

    def embed(self, prepared: list[Any] | Tensor) -> Tensor:
        """Flatten, transform, project."""
        x = self.stem(self.pixels(prepared).mean(-1).flatten(1))
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            x = x + down(functional.gelu(up(norm(x))))
        y: Tensor = self.project(self.norm(x))
        return y

    def config(self) -> dict[str, Any]:
        """Sizes."""
        return {"model_type": "merganser-mlp", **self._sizes}


class SentenceEncoder(Encoder):
    """A BERT-like encoder of transformers with mean pooling over tokens, as sentence-transformers does."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        transformers = _transformers()
        if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model")):
            raise RefError(f"{folder} has no tokenizer", "copy the tokenizer's files of the base there")
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        pooled = config.model_type in ("bert", "roberta", "xlm-roberta", "mpnet")  # the others have no such layer
        self.model = transformers.AutoModel.from_config(config, **({"add_pooling_layer": False} if pooled else {}))
        self.width = self.model.config.hidden_size

    def prepare(self, items: Items) -> list[Any]:
        """Token numbers, cut at `MAX_TOKENS`."""
        if not isinstance(items, tuple):
            raise ParameterError("this network reads texts, and the task has pictures")
        return list(self.tokenizer(list(items), truncation=True, max_length=MAX_TOKENS)["input_ids"])

    def embed(self, prepared: list[Any]) -> Tensor:
        """Pad to the longest, transform, take the mean over real tokens."""
        device = next(self.parameters()).device
        longest = max(map(len, prepared))
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([x + [pad] * (longest - len(x)) for x in prepared], device=device)
        mask = torch.tensor([[1] * len(x) + [0] * (longest - len(x)) for x in prepared], device=device)
        y: Tensor = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        weights = mask.unsqueeze(-1).float()
        return (y * weights).sum(1) / weights.sum(1)

    def config(self) -> dict[str, Any]:
        """That of transformers."""
        content: dict[str, Any] = self.model.config.to_dict()
        return content


class ClipVision(Encoder):
    """CLIP's vision tower with its projection."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        transformers = _transformers()
        if not (folder / "preprocessor_config.json").is_file():
            raise RefError(f"{folder} has no processor: preprocessor_config.json", "copy that of the base there")
        self.processor = transformers.CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        config = getattr(config, "vision_config", config)
        self.model = transformers.CLIPVisionModelWithProjection(config)
        self.width = config.projection_dim

    def prepare(self, items: Items) -> list[Any]:
        """Pictures as they are."""
        if isinstance(items, tuple):
            raise ParameterError("this network reads pictures, and the task has texts")
        return list(items)

    def embed(self, prepared: list[Any]) -> Tensor:
        """Resize, normalise, transform, project."""
        device = next(self.parameters()).device
        pixels = self.processor(images=prepared, return_tensors="pt")["pixel_values"].to(device)
        y: Tensor = self.model(pixel_values=pixels).image_embeds
        return y

    def config(self) -> dict[str, Any]:
        """That of transformers."""
        content: dict[str, Any] = self.model.config.to_dict()
        return content


OURS: dict[str, type[PixelEncoder]] = {"merganser-vit": VisionTransformer, "merganser-mlp": ResidualMlp}


def _ours() -> dict[str, type[PixelEncoder]]:
    """By `model_type`, those of this file and those that are trained apart."""
    from merganser.study.small_networks import SMALL

    return {**OURS, **SMALL}


def new_encoder(network: Mapping[str, Any]) -> Encoder:
    """An untrained encoder from a node such as {"kind": "vit", "hidden": 192}.

    Raises:
        ParameterError: If the kind or a size is unknown.
    """
    sizes, ours = dict(network), _ours()
    kind = ours.get(f"merganser-{sizes.pop('kind', None)}")
    if kind is None:
        known = ", ".join(name.removeprefix("merganser-") for name in ours)
        raise ParameterError(f"network kind is {network.get('kind')!r}; it is one of {known}")
    try:
        return kind(**sizes)
    except TypeError as error:
        raise ParameterError(f"network {dict(network)}: {error}") from error


def load_encoder(folder: Path, *, expert: Path | None = None) -> Encoder:
    """The encoder of a checkpoint folder, in evaluation mode.

    Args:
        folder: with `config.json`, and the tokenizer or processor where the network needs one.
        expert: a folder whose tensors replace those of the same name; it may hold a part of the network alone.

    Raises:
        RefError: If the folder has no configuration.
        ParameterError: If no network here is of its type.
        MissingTensorError: If tensors are missing, or the expert has none of the network's.
        ShapeError: If a tensor has another shape than the configuration says.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
        kind = str(config.get("model_type"))
    except (OSError, ValueError, AttributeError) as error:
        raise RefError(f"{path} does not tell which network this is: {error}") from error
    ours = _ours()
    if kind in ours:
        sizes = signature(ours[kind]).parameters
        encoder: Encoder = ours[kind](**{k: v for k, v in config.items() if k in sizes})
    elif kind.startswith("clip"):
        encoder = ClipVision(folder)
    elif kind in ("bert", "roberta", "mpnet", "distilbert", "electra", "xlm-roberta"):
        encoder = SentenceEncoder(folder)
    else:
        raise ParameterError(
            f"{folder} is a {kind}; a study can run {', '.join(ours)}, BERT-like and CLIP vision networks"
        )
    network = getattr(encoder, "model", encoder)
    wanted = network.state_dict()
    found = _tensors(folder, wanted) | (_tensors(expert, wanted) if expert is not None else {})
    missing = [name for name in wanted if name not in found and not name.endswith(("position_ids", "token_type_ids"))]
    if missing:
        more = f", {missing[1]}, ... ({len(missing)} tensors)" if len(missing) > 1 else ""
        raise MissingTensorError(f"{folder} lacks {missing[0]}{more} of its network")
    for name, x in found.items():
        if x.shape != wanted[name].shape:
            shapes = f"{tuple(x.shape)}, and its configuration says {tuple(wanted[name].shape)}"
            raise ShapeError(f"{name} of {expert or folder} is {shapes}")
    network.load_state_dict(found, strict=False)
    return encoder.eval()


def _tensors(folder: Path, wanted: Iterable[str]) -> dict[str, Tensor]:
    """Those tensors of a folder that a network wants, by its names."""
    source = open_source(folder)
    stored = {name: name for name in source.infos} | dict(source.aliases)
    found = {name: source.read(stored[name]) for name in wanted if name in stored}
    if not found:
        raise MissingTensorError(f"{folder} has no tensor of this network")
    return found


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MerganserError("this network needs transformers", 'pip install "merganser[study]"') from error
    return transformers


def resolve(ref: str) -> str:
    """A reference as it is, or the folder that `package:NAME/FOLDER` means.

    Raises:
        RefError: If the package is not installed, or has no such folder.
    """
    if not ref.startswith("package:"):
        return ref
    name, _, inside = ref.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise RefError(f"{ref}: the package {name} is not installed", f"pip install {name.replace('_', '-')}")
    folder = Path(next(iter(spec.submodule_search_locations))) / inside
    if not folder.is_dir():
        raise RefError(f"{ref}: the package has no folder {inside}")
    return str(folder)


def folder_of(ref: str) -> Path:
    """The local folder of a reference; a hub repository is fetched into the cache.

    Raises:
        RefError: If it cannot be had.
    """
    path = resolve(ref)
    if not path.startswith("hf:"):
        return Path(path)
    name, _, revision = path.removeprefix("hf:").partition("@")
    return snapshot(name, revision or None)
