"""The job: what the user wants trained, on what, and which decisions are left to the planner.

These frozen dataclasses are the one schema. Their fields are the legal configuration keys, their defaults are
the defaults, and the text under each field is the configuration reference; `conf/` only says what differs. The groups
`training`, `evaluation` and `generation` are in optimisation.py, `hardware` in hardware.py, `launch` in cluster.py.
Nothing here knows of Hydra, torch or transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from launcher.cluster import LaunchSpec
from launcher.hardware import HardwareSpec
from launcher.model import ModelSpec as ModelSpec
from launcher.model import StoredDtype as StoredDtype
from launcher.model import Task as Task
from launcher.optimisation import EvaluationSpec as EvaluationSpec
from launcher.optimisation import GenerationSpec as GenerationSpec
from launcher.optimisation import Optimizer as Optimizer
from launcher.optimisation import Precision as Precision
from launcher.optimisation import TrainingSpec as TrainingSpec


class Method(StrEnum):
    """What is trained."""

    FULL = "full"
    LORA = "lora"
    QLORA = "qlora"


class Quantization(StrEnum):
    """How the frozen weights of `method=qlora` are stored, by bitsandbytes' names."""

    NF4 = "nf4"
    FP4 = "fp4"
    INT8 = "int8"


class AdapterDtype(StrEnum):
    """Dtype of the adapters' weights."""

    FP32 = "fp32"
    BASE = "base"


class Checkpointing(StrEnum):
    """Activation checkpointing: what the backward pass recomputes."""

    NONE = "none"
    SELECTIVE = "selective"
    FULL = "full"
    OFFLOAD = "offload"


class Attention(StrEnum):
    """Attention implementation, by its transformers name."""

    SDPA = "sdpa"
    EAGER = "eager"
    FLASH_ATTENTION_2 = "flash_attention_2"


class Loss(StrEnum):
    """How the loss is computed from the last hidden states."""

    CHUNKED = "chunked"
    PLAIN = "plain"
    LIGER = "liger"


class OptionalKernel(StrEnum):
    """A kernel of a package that a machine may have: an attention, or a loss."""

    LIGER = "liger"
    FLASH_ATTENTION_2 = "flash_attention_2"


class Engine(StrEnum):
    """What trains on several devices together."""

    NONE = "none"
    DDP = "ddp"
    DEEPSPEED = "deepspeed"
    FSDP2 = "fsdp2"


class OffloadDevice(StrEnum):
    """Where offloaded optimizer states and parameters live."""

    CPU = "cpu"
    NVME = "nvme"


class DataFormat(StrEnum):
    """Layout of one training example."""

    AUTO = "auto"
    MESSAGES = "messages"
    ALPACA = "alpaca"
    SHAREGPT = "sharegpt"
    PROMPT_COMPLETION = "prompt_completion"
    TEXT = "text"
    LABELED = "labeled"
    IMAGES = "images"


class Objective(StrEnum):
    """What makes one plan that fits better than another."""

    SPEED = "speed"
    MEMORY = "memory"
    COST = "cost"


class Grade(StrEnum):
    """How a plan sits on its device."""

    COMFORTABLE = "comfortable"
    TIGHT = "tight"
    SQUEEZED = "squeezed"


class Profile(StrEnum):
    """What a plan is for: how much it leaves free, and what is refused; see conf/profile."""

    EXPERIMENT = "experiment"
    PRODUCTION = "production"


class Action(StrEnum):
    """What `launch` does."""

    RUN = "run"
    PLAN = "plan"
    REPORT = "report"
    MEMORY = "memory"
    EXPLAIN = "explain"
    STATUS = "status"
    CALIBRATE = "calibrate"


class Output(StrEnum):
    """What `launch` prints on stdout."""

    TEXT = "text"
    JSON = "json"


class ReportFormat(StrEnum):
    """How a report is written down, beside what is printed."""

    NONE = "none"
    HTML = "html"
    PNG = "png"


@dataclass(frozen=True)
class MethodSpec:
    """Full fine-tuning or adapters."""

    name: Method = Method.LORA
    """`full` trains every weight, `lora` trains low-rank adapters beside frozen weights."""
    rank: Annotated[int, Ge(1)] = 16
    """LoRA rank."""
    alpha: Annotated[int, Ge(1)] | None = None
    """LoRA scale numerator; unset means twice the rank."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Dropout before the adapters; 0 to below 1."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """`all-linear`, or the names of the modules that get adapters."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained whole beside the adapters, say `[embed_tokens, lm_head]`; saved with them."""
    use_dora: bool = False
    """DoRA: the size of each weight column is trained apart from its direction."""
    use_rslora: bool = False
    """Rank-stabilised scale, alpha / sqrt(rank) in place of alpha / rank."""
    adapter_dtype: AdapterDtype = AdapterDtype.FP32
    """`fp32` (PEFT's default), or `base`: that of the weights. With qlora TRL holds adapters in bf16 either way."""
    quantization: Quantization = Quantization.NF4
    """How `qlora` stores the frozen weights: `nf4`, `fp4` or `int8`."""
    double_quantization: bool = True
    """Whether `qlora` quantises the scales of 4-bit blocks too: 0.37 bits per weight less."""
    kbit_preparation: bool = False
    """PEFT's preparation for `qlora`: embeddings, norms and head turned to fp32. Steadier, and up to 4 GiB more."""
    merge: bool = False
    """Merge the adapters at the end, into a model of its own in `merged/`; of `qlora` in full weights, not quantised."""


@dataclass(frozen=True)
class DataSpec:
    """Training examples."""

    path: str = ""
    """JSON or JSONL file, a folder of them, a hub dataset id, or `builtin:python_docs`."""
    format: DataFormat = DataFormat.AUTO
    """Layout of an example; `auto` recognises it by its keys, or takes that of `model.task` (`labeled`, `images`)."""
    split: str = "train"
    """Split of a hub dataset."""
    max_length: Annotated[int, Ge(8)] | Literal["auto"] = 2048
    """Tokens per sequence; longer examples are truncated (or, when packing, split). `auto` reads the data: the smallest
    multiple of 8 that no example exceeds, or where that doesn't fit the longest candidate that does."""
    packing: bool = False
    """Join examples and cut them into rows of exactly `max_length` tokens, instead of padding."""
    num_examples: Annotated[int, Ge(1)] | None = None
    """Use only the first so many examples; unset: all."""
    images_per_example: Annotated[int, Ge(1)] = 1
    """Images in every example of `model.task=image_text_to_text`; an example with another number is refused."""

    @property
    def length(self) -> int:
        """`max_length`, settled.

        Raises:
            ValueError: While it is `auto`: the data were not read yet.
        """
        if isinstance(self.max_length, str):
            raise ValueError(f"data.max_length={self.max_length} is not settled")
        return self.max_length


@dataclass(frozen=True)
class PinSpec:
    """Knobs the user fixed; an unset knob is the planner's to turn."""

    micro_batch_size: Annotated[int, Ge(1)] | None = None
    """Sequences per forward pass."""
    gradient_accumulation_steps: Annotated[int, Ge(1)] | None = None
    """Forward and backward passes per optimizer step."""
    activation_checkpointing: Checkpointing | None = None
    """`none`, `selective` (attention is kept), `full`, or `offload` (full; layers' inputs wait in host memory)."""
    attention: Attention | None = None
    """`sdpa`, `eager` or `flash_attention_2`."""
    loss: Loss | None = None
    """`chunked` (TRL's tiles), `plain` (all logits at once) or `liger` (Liger's fused kernel, of the extra `liger`)."""
    optimizer: Optimizer | None = None
    """`training.optimizer` itself, or another one that makes the same update: `adamw_torch` for `adamw_torch_fused`, or
    the `paged_*` one of an optimizer of bitsandbytes, whose states go to host memory where the device is full."""
    max_length: Annotated[int, Ge(8)] | None = None
    """Overrides `data.max_length`."""
    method: Method | None = None
    """Overrides `method.name`."""
    rank: Annotated[int, Ge(1)] | None = None
    """Overrides `method.rank`."""
    engine: Engine | None = None
    """`ddp`, `deepspeed` or `fsdp2` on several devices; `none` on one."""
    zero_stage: Annotated[int, Ge(0), Le(3)] | None = None
    """What is sharded over the devices: 0 nothing, 1 optimizer states, 2 gradients too, 3 parameters too."""
    offload_optimizer: bool | None = None
    """Whether optimizer states live in host memory: DeepSpeed, ZeRO stage 2 or 3."""
    offload_parameters: bool | None = None
    """Whether parameters live there too: ZeRO stage 3, together with optimizer states."""
    offload_device: OffloadDevice | None = None
    """Where offloaded optimizer states live: `cpu` (host memory), or `nvme` (below `hardware.nvme_path`; ZeRO stage 3, no
    checkpoints). Offloaded parameters live in host memory either way."""
    shard_within_node: bool | None = None
    """FSDP2: shard over the devices of a node and repeat over nodes, in place of sharding over all."""
    reduce_bucket_elements: Annotated[int, Ge(1)] | None = None
    """Elements per bucket in which gradients are reduced; see `Buckets` in launcher/plan.py for this and the next."""
    allgather_bucket_elements: Annotated[int, Ge(1)] | None = None
    """Elements per bucket in which updated parameters are gathered (ZeRO 1 and 2)."""
    prefetch_bucket_elements: Annotated[int, Ge(0)] | None = None
    """Elements of parameters fetched ahead (ZeRO 3)."""
    persistence_threshold_elements: Annotated[int, Ge(0)] | None = None
    """Parameters below so many elements stay on every device (ZeRO 3)."""
    max_live_elements: Annotated[int, Ge(0)] | None = None
    """Elements of gathered parameters that may stay for their next use (ZeRO 3)."""
    max_reuse_distance_elements: Annotated[int, Ge(0)] | None = None
    """A gathered parameter is kept when its next use is fewer elements away (ZeRO 3)."""
    sub_group_elements: Annotated[int, Ge(1)] | None = None
    """Elements of a rank that are updated at a time, each with a gradient in fp32 (ZeRO 3)."""
    overlap_exchange: bool | None = None
    """DeepSpeed: whether ranks exchange while they compute; if not, buckets are small but for sizes that are pinned."""


@dataclass(frozen=True)
class ChoicesSpec:
    """Values of the knobs that change the result, best first; empty: only the job's own value."""

    method: tuple[Method, ...] = ()
    """Acceptable methods."""
    max_length: tuple[Annotated[int, Ge(8)], ...] = ()
    """Acceptable lengths."""
    rank: tuple[Annotated[int, Ge(1)], ...] = ()
    """Acceptable LoRA ranks."""


@dataclass(frozen=True)
class PlannerSpec:
    """How the planner searches."""

    pin: PinSpec = field(default_factory=PinSpec)
    """Knobs the user fixed."""
    choices: ChoicesSpec = field(default_factory=ChoicesSpec)
    """Acceptable values of the knobs that change the result."""
    kernels: tuple[OptionalKernel, ...] = ()
    """Kernels of packages that are there where the job runs, weighed beside torch's: `liger` (liger-kernel) for the loss,
    `flash_attention_2` (flash-attn) for attention."""
    headroom: Annotated[float, Ge(0), Le(0.9)] | Literal["auto"] = "auto"
    """Share of the usable memory kept free; `auto` asks the runs measured here, and keeps 0.05 while they are few."""
    refused_grades: tuple[Grade, ...] = ()
    """Plans of these grades, and of tighter ones, are not taken though they fit; `profile=production`: `[squeezed]`."""
    objective: Objective = Objective.SPEED
    """`speed` (tokens per second), `memory` (lowest peak), or `cost` (dollars per token, from your price per hour)."""
    prices: dict[str, Annotated[float, Gt(0)]] = field(default_factory=dict)
    """US dollars per device and hour, by name of the hardware, `{l4_24g: 0.8}`: to compare devices by price."""


@dataclass(frozen=True)
class ReportSpec:
    """Files for people about a plan, of `action=plan`, `explain` and `memory`; and which past runs `action=report` is
    about."""

    format: ReportFormat = ReportFormat.NONE
    """`html`: one page that needs no network, with the bill, a step over time, what fits, and sliders over batch, length
    and memory; `png`: pictures of the first three; `none`: no file."""
    file: str = ""
    """The page; pictures are put beside it, `<name>-bill.png` and so on. Empty: `<recipe>-<hardware>.html`, in `run_dir`
    where that names a past run, whose measured step the page then shows too."""
    recipe: str = ""
    """Only runs of this recipe."""
    model: str = ""
    """Only runs of this model, by its path."""
    hardware: str = ""
    """Only runs on this hardware."""
    status: Literal["", "done", "interrupted", "terminated", "out_of_memory", "data_error", "failed"] = ""
    """Only runs that ended so."""
    export: str = ""
    """File for the runs that are listed: `.csv` or `.json`."""
    compare: tuple[str, ...] = ()
    """Two run directories, or files that `output=json action=plan` printed: what is different."""
    check: str = ""
    """Recipe: is its newest run predicted today as it was then, and measured as the run before? Exit code 1 when not."""
    tolerance: Annotated[float, Ge(0), Lt(1)] = 0.005
    """By which share a peak may move in `check`."""


@dataclass(frozen=True)
class JobSpec:
    """One fine-tuning job, complete."""

    recipe: str = ""
    """Name of the recipe the job came from."""
    profile: Profile = Profile.EXPERIMENT
    """`experiment`, or `production` for runs that must last: more headroom, and squeezed plans are refused. Sets
    `planner.headroom` and `planner.refused_grades` (conf/profile); what is typed on the command line wins."""
    action: Action = Action.RUN
    """`plan` stops after the plan; `run` runs it too; `report` lists past runs; `status`: how far the run in `run_dir`
    is; `memory`: where the memory of a plan, or of the past run in `run_dir`, goes; `explain`: what each knob buys, and
    whether more memory would help; `calibrate` measures this machine's
    device, for the step times of later plans."""
    output: Output = Output.TEXT
    """`text` for people, `json` for programs."""
    run_dir: str = ""
    """Folder of this run (or, for `report`, of past runs); empty: a new one under `runs/`."""
    resume: str = ""
    """Run directory whose last checkpoint is continued; of other keys only those that make no other model are legal
    beside it (`CHANGEABLE` in launcher/resume_limits.py)."""
    plot: str = ""
    """PNG file of the timeline that `memory` draws; empty: in the past run's folder, or none."""
    trace_cache: str = ""
    """Folder of cached traces; empty: the user's cache folder; `off`: none."""
    model: ModelSpec = field(default_factory=ModelSpec)
    """What is trained."""
    method: MethodSpec = field(default_factory=MethodSpec)
    """How it is trained."""
    data: DataSpec = field(default_factory=DataSpec)
    """On which examples."""
    training: TrainingSpec = field(default_factory=TrainingSpec)
    """The optimisation."""
    evaluation: EvaluationSpec = field(default_factory=EvaluationSpec)
    """Loss on held-out examples."""
    generation: GenerationSpec = field(default_factory=GenerationSpec)
    """Text generated while training."""
    hardware: HardwareSpec = field(default_factory=HardwareSpec)
    """Where it runs."""
    planner: PlannerSpec = field(default_factory=PlannerSpec)
    """How the planner decides."""
    launch: LaunchSpec = field(default_factory=LaunchSpec)
    """How it is started."""
    report: ReportSpec = field(default_factory=ReportSpec)
    """What is written about it."""
