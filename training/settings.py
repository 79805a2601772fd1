"""How a model is trained: the settings of a run, their defaults, and what they may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from .errors import TrainingError

MODES = ("full", "lora", "depth")

# Peak learning rate of the decoder in a run that names none, by what is trained. `"full"` is the best of four for
# examples/tiny-qwen3 (docs/evidence.md), and `"scratch"` is what that model was trained with. LoRA was not studied.
LEARNING_RATES = {"full": 1e-4, "lora": 2e-4, "depth": 0.0, "scratch": 4e-3}
# The depth parameters of a retrofit have the decoder's rate where a depth head has this many dimensions, and in inverse
# proportion more or less elsewhere: AdamW moves each element of a query by its rate, so a logit by rate x dimensions.
# It is near the best rates of examples/tiny-qwen3 and of SmolLM2-135M-Instruct (docs/evidence.md).
HEAD_WIDTH = 192
DEPTH_ALONE = 3e-3  # the most where nothing else is trained; one look, one seed

SEQUENCE_LENGTH = 1024

CHOICES: dict[str, tuple[str, ...]] = {
    "optimizer": ("adamw", "muon"),
    "schedule": ("cosine", "warmup_stable_decay"),
    "packing": ("auto", "wrapped", "bfd", "none"),
    "precision": ("auto", "bf16", "fp32"),
}
# The smallest and the largest value of each number, and whether it is whole.
RANGES: dict[str, tuple[float, float, bool]] = {
    "steps": (1, 10**9, True),
    "epochs": (0, 10**4, False),
    "batch_size": (1, 2**20, True),
    "accumulation": (1, 2**20, True),
    "sequence_length": (2, 2**24, True),
    "learning_rate": (0, 10, False),
    "depth_learning_rate": (0, 10, False),
    "weight_decay": (0, 10, False),
    "warmup": (0, 1, False),
    "decay": (0, 1, False),
    "max_grad_norm": (0, 10**6, False),
    "lora_rank": (1, 2**16, True),
    "lora_alpha": (1, 2**20, True),
    "lora_dropout": (0, 0.99, False),
    "eval_every": (1, 10**9, True),
    "save_every": (1, 10**9, True),
    "log_every": (1, 10**9, True),
    "pipeline": (1, 2**16, True),
    "virtual_stages": (1, 2**10, True),
    "seed": (0, 2**32 - 1, True),
}
OPTIONAL = ("steps", "sequence_length", "learning_rate", "depth_learning_rate", "eval_every", "completion_only")
# These change what is shown and kept, not what is learned, so a resumed run may have others.
FREE_TO_CHANGE = ("tensorboard", "keep_checkpoints", "pipeline", "virtual_stages")


@dataclass(frozen=True)
class TrainingSettings:
    """How a model is trained. Counts of tokens and steps are per optimizer step, sizes of batches per device.

    Attributes:
        steps (`int`, *optional*): optimizer steps; by default as many as make `epochs`.
        epochs (`float`, defaults to 1): passes over the data, if there are no `steps`.
        batch_size (`int`, defaults to 8): sequences per device and forward.
        accumulation (`int`, defaults to 1): forwards per optimizer step.
        sequence_length (`int`, *optional*): tokens in a sequence; by default 1024, or the model's positions if fewer.
        packing (`str`, defaults to `"auto"`):
            `"wrapped"` cuts one long stream of tokens into sequences, `"bfd"` puts whole examples together that do not
            see each other (TRL's best fit decreasing), `"none"` pads. `"auto"` wraps plain text and pads the rest.
        completion_only (`bool`, *optional*): loss on completions alone; by default where data have prompts.
        assistant_only (`bool`, defaults to `False`): loss on the assistant's turns of dialogues alone.
        optimizer (`str`, defaults to `"adamw"`):
            `"adamw"`, or `"muon"`: `torch.optim.Muon` for the matrices of decoder layers, AdamW for the rest.
        learning_rate (`float`, *optional*): peak, of all but the depth parameters; see `LEARNING_RATES`.
        depth_learning_rate (`float`, *optional*):
            Peak, of the depth parameters. By default `learning_rate` from scratch, and in a retrofit
            `learning_rate * 192 / (hidden_size / num_heads)`. Beside LoRA 1e-4 takes the place of `learning_rate`
            there. Where depth parameters learn alone it is 3e-3, and less by the same factor if that is below one.
        weight_decay (`float`, defaults to 0.01): of matrices; depth parameters, norms and biases have none.
        schedule (`str`, defaults to `"cosine"`): `"cosine"` to zero, or `"warmup_stable_decay"`.
        warmup (`float`, defaults to 0.05): share of the steps in which the learning rates rise from zero.
        decay (`float`, defaults to 0.2): share of the steps in which `"warmup_stable_decay"` lets them fall to zero.
        max_grad_norm (`float`, defaults to 1): gradients are scaled down to this norm; 0 leaves them as they are.
        precision (`str`, defaults to `"auto"`):
            `"bf16"`: float32 weights (those that are not trained: bfloat16) under autocast; `"fp32"`: float32 alone.
            `"auto"` is `"bf16"` on accelerators that have it, else `"fp32"`.
        gradient_checkpointing (`bool`, defaults to `False`): compute activations again in the backward.
        lora_rank, lora_alpha, lora_dropout (`int`, `int`, `float`, default to 16, 32, 0): of the adapter.
        eval_every (`int`, *optional*): steps between evaluations; by default only before the first and after the last.
        save_every (`int`, defaults to 500): steps between checkpoints; a multiple of `log_every`.
        log_every (`int`, defaults to 10): steps that a logged loss is the mean of.
        seed (`int`, defaults to 42): of the order of the data, of new weights and of dropout.
        tensorboard (`bool`, defaults to `True`): write logs for TensorBoard to `runs` in the output.
        keep_checkpoints (`bool`, defaults to `False`): keep the states of the optimizer after the last step.
        pipeline (`int`, defaults to 1):
            Processes that hold one model together, each a stage. The forwards of `accumulation` are its microbatches.
        virtual_stages (`int`, defaults to 1): stages on each of these processes.

    Raises:
        TrainingError: a value is out of range; the message names the field, the value and what is allowed.
    """

    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 8
    accumulation: int = 1
    sequence_length: int | None = None
    packing: str = "auto"
    completion_only: bool | None = None
    assistant_only: bool = False
    optimizer: str = "adamw"
    learning_rate: float | None = None
    depth_learning_rate: float | None = None
    weight_decay: float = 0.01
    schedule: str = "cosine"
    warmup: float = 0.05
    decay: float = 0.2
    max_grad_norm: float = 1.0
    precision: str = "auto"
    gradient_checkpointing: bool = False
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    eval_every: int | None = None
    save_every: int = 500
    log_every: int = 10
    seed: int = 42
    tensorboard: bool = True
    keep_checkpoints: bool = False
    pipeline: int = 1
    virtual_stages: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            self._check(field.name, getattr(self, field.name))
        if self.steps is None and self.epochs == 0:
            raise TrainingError("epochs=0 trains nothing; give steps, or a number of epochs above 0.")
        if self.warmup + self.decay > 1 and self.schedule == "warmup_stable_decay":
            raise TrainingError(f"warmup={self.warmup} and decay={self.decay} make more than all steps; lower one.")
        for name in ("save_every", "eval_every"):
            every = getattr(self, name)
            if every is not None and every % self.log_every:
                raise TrainingError(
                    f"{name}={every} is no multiple of log_every={self.log_every}, so a resumed run would log other "
                    "means; change one of the two."
                )
        if self.assistant_only and self.packing == "wrapped":
            raise TrainingError('assistant_only and packing="wrapped" do not go together: dialogues would be cut.')
        self._check_pipeline()

    def _check_pipeline(self) -> None:
        if self.pipeline == 1:
            if self.virtual_stages > 1:
                raise TrainingError(f"virtual_stages={self.virtual_stages} is for a pipeline; give pipeline, too.")
            return
        is_interleaved = self.virtual_stages > 1
        if self.accumulation % self.pipeline if is_interleaved else self.accumulation < self.pipeline:
            raise TrainingError(
                f"accumulation={self.accumulation}: the forwards of a step are the microbatches of the pipeline, and "
                f"pipeline={self.pipeline} needs {'a multiple of' if is_interleaved else 'at least'} {self.pipeline}. "
                "Raise accumulation, and lower batch_size as much."
            )
        if self.packing == "bfd":
            raise TrainingError('packing="bfd" makes batches of many shapes, and a pipeline needs one; choose another.')

    def _check(self, name: str, value: Any) -> None:
        if value is None and name in OPTIONAL:
            return
        if name in CHOICES:
            if value not in CHOICES[name]:
                allowed = ", ".join(map(repr, CHOICES[name]))
                raise TrainingError(f"{name}={value!r} is not allowed; choose one of {allowed}.")
        elif name in RANGES:
            low, high, is_whole = RANGES[name]
            is_number = isinstance(value, int if is_whole else (int, float)) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value) or not low <= value <= high:
                kind = "an integer" if is_whole else "a number"
                raise TrainingError(f"{name}={value!r} is not allowed; it must be {kind} from {low:g} to {high:g}.")
        elif not isinstance(value, bool):
            raise TrainingError(f"{name}={value!r} is not allowed; it must be true or false.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingSettings:
        """Settings of a mapping, such as the part `training` of a YAML file.

        Raises:
            TrainingError: it has a name that is no setting, or a value that is not allowed.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(values.keys() - set(known)):
            raise TrainingError(f"{unknown[0]!r} is no setting of training; there are: {', '.join(known)}.")
        return cls(**values)

    def for_model(self, config: Any) -> TrainingSettings:
        """The same settings with the length of sequences for the model of this configuration.

        Raises:
            TrainingError: sequences are longer than the model has positions.
        """
        longest = getattr(config, "max_position_embeddings", None)
        longest = longest if isinstance(longest, int) and longest > 0 else None
        if self.sequence_length is None:
            return replace(self, sequence_length=min(SEQUENCE_LENGTH, longest or SEQUENCE_LENGTH))
        if longest is not None and self.sequence_length > longest:
            raise TrainingError(
                f"sequence_length={self.sequence_length} is more than the {longest} positions that the model has "
                "(max_position_embeddings); lower it."
            )
        return self

    def learning_rates(self, mode: str, head_width: int = HEAD_WIDTH) -> tuple[float, float]:
        """The peak learning rates of the decoder and of the depth parameters.

        Args:
            mode (`str`): what is trained, one of `MODES` or `"scratch"`.
            head_width (`int`, *optional*, defaults to 192): dimensions of a depth head, `hidden_size / num_heads`.
        """
        rate = LEARNING_RATES[mode] if self.learning_rate is None else self.learning_rate
        if self.depth_learning_rate is not None:
            return rate, self.depth_learning_rate
        if mode == "scratch":
            return rate, rate
        if mode == "depth":
            return rate, DEPTH_ALONE * min(1.0, HEAD_WIDTH / head_width)
        of_decoder = LEARNING_RATES["full"] if mode == "lora" else rate  # an adapter's rate says nothing of theirs
        return rate, of_decoder * HEAD_WIDTH / head_width

    def fixed(self) -> dict[str, Any]:
        """What must be the same when a run is resumed."""
        return {name: value for name, value in asdict(self).items() if name not in FREE_TO_CHANGE}
