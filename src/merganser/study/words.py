"""The words of a study's configuration: what a YAML node may say, checked before any work.

Hydra composes the groups of `merganser/conf`; these classes are what the composed nodes must be. An unknown key or a
value of another kind is an error that names the place.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StrictFloat,
    StrictInt,
    StrictStr,
    model_serializer,
    model_validator,
)

Share = Annotated[float, Field(ge=0, lt=1)]
Settings = dict[str, StrictFloat | StrictInt | StrictStr]
Positive = Annotated[int, Field(gt=0)]


class Node(BaseModel):
    """A node of a configuration: nothing but its own keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PackedSource(Node):
    """A file of a data folder: `NAME.npz` for images, `text/NAME.parquet` for text (`--data DIR`).

    Attributes:
        file: its name, without an ending.
        domain: of images that come from several: those of one alone.
    """

    kind: Literal["packed"] = "packed"
    file: str
    domain: str | None = None

    @model_serializer(mode="wrap")
    def _said(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without a domain as before there were any, so that what was trained then is known again."""
        found: dict[str, Any] = plain(self)
        return found if self.domain is not None else {key: x for key, x in found.items() if key != "domain"}


class DigitsSource(Node):
    """scikit-learn's digits, their patches of 2 x 2 pixels in a fixed order; `shuffle` 0 leaves them where they are."""

    kind: Literal["digits"]
    shuffle: Annotated[int, Field(ge=0)] = 0


class FolderSource(Node):
    """Images as DIR/SPLIT/CLASS/*; all are cropped to a square and resized to `size` x `size`."""

    kind: Literal["folder"]
    path: str
    size: Positive = 32
    train: str = "train"
    test: str = "test"


class TableSource(Node):
    """Text in CSV or parquet files, one a split; classes are the sorted label names."""

    kind: Literal["table"]
    train: str
    test: str
    text: str = "text"
    label: str = "label"


class HubSource(Node):
    """A data set of the Hugging Face hub, or a folder that `datasets` can load."""

    kind: Literal["hub"]
    path: str
    config: str | None = None
    train: str = "train"
    test: str = "test"
    item: str = "image"
    label: str = "label"
    size: Positive = 224


Source = Annotated[PackedSource | DigitsSource | FolderSource | TableSource | HubSource, Field(discriminator="kind")]


class PrototypeHead(Node):
    """Fixed prototypes: an encoder's embeddings of the class names in a template; logits are scale * cosine.

    Attributes:
        encoder: reference of a sentence encoder; `package:NAME/FOLDER` is a folder inside an installed package.
        file: a safetensors file with `prototypes` of shape (classes, width), instead of an encoder.
        template: with one {} for the class name.
        names: words for class names that say little, such as NUM.
        scale: factor of the cosines.
    """

    kind: Literal["prototypes"] = "prototypes"
    encoder: str | None = None
    file: str | None = None
    template: str = "{}"
    names: dict[str, str] = {}
    scale: Annotated[float, Field(gt=0)] = 20.0

    @model_validator(mode="after")
    def _one_origin(self) -> PrototypeHead:
        if (self.encoder is None) == (self.file is None):
            raise ValueError("name either an encoder or a file")
        _check_template(self.template)
        return self


def _check_template(template: str) -> None:
    if template.count("{}") != 1:
        raise ValueError(f"template {template!r} needs one {{}} for the class name")


class LinearHead(Node):
    """A linear layer, `weight` (classes, width) and `bias`, stored in a safetensors file or beside each expert.

    Attributes:
        file: path, or a bare name that is looked for in the folder of the task's own expert.
    """

    kind: Literal["linear"]
    file: str = "head.safetensors"


class ClipHead(Node):
    """CLIP's zero-shot head: its text tower's embeddings of the class names in a template, or the mean over several."""

    kind: Literal["clip"]
    model: str
    template: str | Annotated[tuple[str, ...], Field(min_length=1)] = "a photo of a {}."
    names: dict[str, str] = {}

    @model_validator(mode="after")
    def _templates(self) -> ClipHead:
        for template in (self.template,) if isinstance(self.template, str) else self.template:
            _check_template(template)
        return self


Head = Annotated[PrototypeHead | LinearHead | ClipHead, Field(discriminator="kind")]


class Task(Node):
    """A task: data, head and metric.

    Attributes:
        data: where the examples come from.
        head: turns embeddings into logits.
        metric: "accuracy", or "macro_f1".
        classes: names of the classes, where the data do not tell or tell them badly.
    """

    data: Source
    head: Head
    metric: Literal["accuracy", "macro_f1"] = "accuracy"
    classes: tuple[str, ...] | None = None


class TaskPool(Node):
    """Tasks by name, in the order of the published protocol where there is one."""

    name: str
    tasks: Annotated[dict[str, Task], Field(min_length=1)]
    needs: str | None = None


class ModelPool(Node):
    """Models by name, and the base that all were tuned from.

    Attributes:
        base: reference of the base.
        models: references by the name of the task that each was tuned on.
        zoo: name in the group `zoo` that trains these models, where there is one.
        zoo_folder: where that zoo is.
        freeze: patterns of tensors of the base that stay as they are.
        ignore: patterns of tensors that no expert has or is asked for.
        needs: what a machine must have or reach, in one line.
    """

    name: str
    base: str
    models: Annotated[dict[str, str], Field(min_length=1)]
    zoo: str | None = None
    zoo_folder: str | None = None
    freeze: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    needs: str | None = None


class MethodNode(Node):
    """A method of the table with its settings.

    Attributes:
        method: name in the table.
        settings: given at init; for methods of sums at export.
        label: in tables and plots.
        source: where the settings come from: a paper, or a choice on validation splits.
        fold: options of `Fold.init`, such as {"vector": ["*embed*"]}.
    """

    method: str
    label: str
    settings: Settings = {}
    source: str = ""
    fold: dict[str, Any] = {}


class Training(Node):
    """How one model is trained: AdamW, linear warm-up over a twentieth, cosine decay to zero."""

    epochs: Positive
    lr: Annotated[float, Field(gt=0)]
    batch: Positive = 128
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    items: Positive | None = None
    label_smoothing: Share = 0.0
    shift: Annotated[int, Field(ge=0)] = 0
    flip: bool = False
    freeze: tuple[str, ...] = ()
    bfloat16: bool = False


class Pretraining(Node):
    """How the base is made.

    Attributes:
        tasks: what it learns from all of.
        little: tasks of the pool that it sees a few examples of, so that it knows what they are about.
        little_items: how many of each.
        training: how.
    """

    tasks: dict[str, Task]
    little: tuple[str, ...] = ()
    little_items: Positive = 100
    training: Training


class Zoo(Node):
    """Models to train from data: a base and one expert a task.

    Attributes:
        taskpool: name in the group `taskpool` of the tasks, one expert each.
        network: of a base that is made here: {"kind": "vit", ...} or {"kind": "mlp", ...}.
        start: reference of a base that is there already, instead.
        pretraining: of a base that is made here.
        finetuning: of every expert.
        changes: of the fine-tuning of some experts, by task, such as {"sst2": {"lr": 4.0e-4}}.
    """

    name: str
    taskpool: str
    network: dict[str, Any] | None = None
    start: str | None = None
    pretraining: Pretraining | None = None
    finetuning: Training
    changes: dict[str, dict[str, Any]] = {}

    def finetuning_of(self, task: str) -> Training:
        """How the expert of a task is trained."""
        return Training.model_validate(self.finetuning.model_dump() | self.changes.get(task, {}))

    @model_validator(mode="after")
    def _changes(self) -> Zoo:
        for task in self.changes:
            self.finetuning_of(task)
        return self

    @model_validator(mode="after")
    def _one_start(self) -> Zoo:
        if (self.start is None) == (self.network is None):
            raise ValueError("name either a network or a start")
        if (self.network is None) != (self.pretraining is None):
            raise ValueError("a network needs pretraining, and a start has none")
        return self


class Variant(Node):
    """A method of the study with other settings.

    Attributes:
        of: a name in the group `method`.
        settings: over those of that method.
        fold: options of `Fold.init` over those of that method.
        label: in tables; by default that of the method with the settings behind it.
    """

    of: str
    settings: Settings = {}
    fold: dict[str, Any] = {}
    label: str | None = None


class StudyNode(Node):
    """What is compared.

    Attributes:
        kind: experts arrive one by one; `words_apart` has the others.
        methods: names in the group `method`, or of variants.
        variants: methods with other settings, by name.
        seeds: orders of arrival: `random.Random(seed).shuffle` of the pool's order, as in the published protocol, whose
            seeds are 42 to 51.
        curve_items: test items a task for the curve; the diagonal and the last row of R use all of them.
    """

    kind: Literal["fold"] = "fold"
    name: str
    title: str
    methods: Annotated[tuple[str, ...], Field(min_length=1)]
    variants: dict[str, Variant] = {}
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2)
    curve_items: Annotated[int, Field(ge=0)] = 200
    split: Literal["validation", "test"] = "test"
