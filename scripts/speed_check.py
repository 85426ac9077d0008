"""Predicted against measured order of plans: 24 plans of SmolLM2-135M with LoRA, on this machine's CPU.

Each plan trains in a process of its own: the same workload, real tensors, random weights. One process runs at a time
(with six that took turns, a step each, the same step took up to half as long again), and all of them run again in another
order, so that a slow moment of the machine doesn't fall on one plan alone. A plan's step time is the
shortest of its steps after the first: on a shared machine that is what repeats, and what the calibration takes too.
Predictions come from traces and from the calibration of this CPU (`launch action=calibrate`), never from a step that was
timed.

    python -m scripts.speed_check             prints the table
    python -m scripts.speed_check --write     also writes docs/accuracy/<date>-speed.json and docs/speed.md; what was
                                              measured of the same job before, on the same day, counts as well
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from itertools import combinations, product
from pathlib import Path
from typing import Any

from launcher.config import load_job
from launcher.documents import from_json, to_json
from launcher.job import JobSpec
from launcher.plan import Plan
from launcher.planner.forecast import Forecaster
from launcher.planner.objective import Price
from launcher.planner.search import search
from launcher.planner.space import batch_splits, checkpointing_modes, losses, semantic_plans
from launcher.planner.trace_cache import TraceCache
from launcher.planner.tracer import Tracer
from launcher.planning import resolve
from launcher.run.cache import cache_folder
from launcher.run.calibrate import device_rates
from launcher.run.render import heap_environment

ROOT = Path(__file__).resolve().parent.parent
JOB = (
    "recipe=smollm_lora",
    "hardware=cpu",
    "data.max_length=128",
    "training.global_batch_size=8",
    "planner.headroom=0.05",
)
PASSES = 2
"""How often every plan gets a process, each time in another order."""
ROUNDS = 2
"""Optimizer steps of a process that count; one before them, in which memory is claimed and states are made, does not."""
MARK = "step seconds: "
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate")


def plans_of(job: JobSpec) -> list[Plan]:
    """Every loss that is searched, with every checkpointing mode and every micro batch."""
    semantic = next(semantic_plans(job))
    return [
        replace(
            semantic,
            loss=loss,
            activation_checkpointing=mode,
            micro_batch_size=micro,
            gradient_accumulation_steps=steps,
        )
        for loss, mode, (micro, steps) in product(losses(job), checkpointing_modes(job), batch_splits(job))
    ]


def predict(job: JobSpec, plans: Sequence[Plan]) -> tuple[list[Price], Plan | None]:
    """Memory and time of each plan, read off the regimes' traces, and the plan that the search takes."""
    rates = device_rates(job.hardware, cache_folder("rates"))
    with Tracer() as tracer:
        forecaster = Forecaster(job, tracer, TraceCache(cache_folder("traces")), 0, rates)
        forecaster.prepare(plans)
        prices = [Price(plan, forecaster.estimate(plan), forecaster.step_time(plan)) for plan in plans]
        return prices, search(job, forecaster).plan


class Runner:
    """A process that trains one plan, a step at a time, when it is told to."""

    def __init__(self, job: JobSpec, plan: Plan, steps: int) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed with the process
        self._child = subprocess.Popen(
            [sys.executable, "-m", "scripts.speed_check", "--child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=ROOT,
            env={**os.environ, **heap_environment(os.environ)},
        )
        self._say(json.dumps({"job": to_json(job), "plan": to_json(plan), "steps": steps}))

    def step(self) -> float:
        """Seconds of the next optimizer step."""
        self._say("step")
        assert self._child.stdout is not None
        for line in self._child.stdout:
            if line.startswith(MARK):
                return float(line.removeprefix(MARK))
        self._log.seek(0)
        raise SystemExit(self._log.read())

    def end(self) -> None:
        """Ends the process."""
        self._child.kill()
        self._child.wait()
        self._log.close()

    def _say(self, line: str) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(line + "\n")
        self._child.stdin.flush()


def measure(job: JobSpec, plans: Sequence[Plan], passes: int, rounds: int) -> list[list[float]]:
    """Times of the steps of each plan that count."""
    order = random.Random(0)
    times: list[list[float]] = [[] for _ in plans]
    for number in range(passes):
        for place in order.sample(range(len(plans)), len(plans)):
            runner = Runner(job, plans[place], rounds + 1)
            try:
                runner.step()
                times[place] += [runner.step() for _ in range(rounds)]
            finally:
                runner.end()
        print(f"pass {number + 1} of {passes}", file=sys.stderr)
    return times


def train_here(job: JobSpec, plan: Plan, steps: int) -> None:
    """Trains one plan in this process: a step for each line on stdin, whose time is printed."""
    import torch  # noqa: PLC0415  # only the child process needs these
    from datasets import Dataset  # noqa: PLC0415
    from transformers import PrinterCallback, TrainerCallback  # noqa: PLC0415

    from launcher import workload  # noqa: PLC0415
    from launcher.planner.rehearsal import blank_tokenizer  # noqa: PLC0415

    class Gate(TrainerCallback):
        """Waits before each step until it is told to go on, and says how long the step took."""

        began = 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            """Waits for a line."""
            sys.stdin.readline()
            self.began = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            """The step has ended."""
            print(f"\n{MARK}{time.perf_counter() - self.began}", flush=True)

    torch.manual_seed(0)
    model = workload.build_model(workload.model_config("", job.model), plan, "", job)
    model = workload.attach_adapters(model, job, plan)
    tokens = torch.randint(3, 49_000, (steps * plan.global_batch_size, plan.max_length)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        changes = {
            "use_cpu": True,
            "max_steps": steps,
            "save_strategy": "no",
            "report_to": [],
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "dataloader_pin_memory": False,
        }
        trainer = workload.build_trainer(
            model,
            job,
            plan,
            workload.training_arguments(job, plan, Path(folder), changes),
            Dataset.from_dict({"input_ids": tokens}),
            None,
            blank_tokenizer(),
            [Gate()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def kendall_tau(pairs: Sequence[tuple[float, float]]) -> float:
    """Share of pairs in the same order less share in the other; ties count as neither."""
    signs = [
        (a[0] > b[0]) - (a[0] < b[0]) if (a[1] > b[1]) else (b[0] > a[0]) - (b[0] < a[0])
        for a, b in combinations(pairs, 2)
    ]
    return sum(signs) / len(signs)


def summary(results: Sequence[dict[str, Any]]) -> str:
    """What it comes to, in one line."""
    tau = kendall_tau([(item["predicted_seconds"], item["measured_seconds"]) for item in results])
    chosen = next(item for item in results if item["is_chosen"])
    fastest = min(item["measured_seconds"] for item in results)
    share = fastest / chosen["measured_seconds"]
    return (
        f"Kendall tau {tau:.2f} over {len(results)} plans; the chosen plan reaches {share:.2f} of the speed of the "
        "fastest measured one."
    )


def table(results: Sequence[dict[str, Any]]) -> str:
    """The plans, the fastest measured one first."""
    lines = ["| plan | predicted s | measured s | error | |", "|---|--:|--:|--:|---|"]
    for item in sorted(results, key=lambda item: float(item["measured_seconds"])):
        error = 100 * (item["predicted_seconds"] / item["measured_seconds"] - 1)
        lines.append(
            f"| {item['loss']} loss, {item['checkpointing']}, {item['micro_batch_size']} x {item['accumulation']} | "
            f"{item['predicted_seconds']:.2f} | {item['measured_seconds']:.2f} | {error:+.0f} % | "
            f"{'chosen' if item['is_chosen'] else ''} |"
        )
    return "\n".join(lines)


def check(passes: int, rounds: int) -> dict[str, Any]:
    """Predicts, measures, compares."""
    job = resolve(load_job(JOB), ())
    prices, chosen = predict(job, plans_of(job))
    load_before = os.getloadavg()[0]
    results = []
    for price, times in zip(
        prices, measure(job, [price.plan for price in prices], passes, rounds), strict=True
    ):
        assert price.step is not None  # a CPU has rates
        plan = price.plan
        results.append(
            {
                "loss": plan.loss.value,
                "checkpointing": plan.activation_checkpointing.value,
                "micro_batch_size": plan.micro_batch_size,
                "accumulation": plan.gradient_accumulation_steps,
                "predicted_seconds": price.step.seconds,
                "measured_seconds": min(times),
                "steps_seconds": times,
                "processes": passes,
                "peak_bytes": price.estimate.peak_device_bytes,
                "is_chosen": plan == chosen,
            }
        )
    step = prices[0].step
    return {
        "date": datetime.date.today().isoformat(),
        "job": list(JOB),
        "rates": "" if step is None else step.rates,
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
        "load_before_and_after": [load_before, os.getloadavg()[0]],
        "versions": {name: version(name) for name in LIBRARIES},
        "results": results,
    }


def joined(found: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """Today's findings with the steps that were measured earlier of the same job; predictions and loads are today's.

    A plan's processes differ by up to a quarter, each alike from step to step: more of them tell more.
    """
    if any(found[key] != earlier[key] for key in ("date", "job", "threads", "versions")):
        return found
    known = {_knobs(item): item for item in earlier["results"]}
    if set(known) != {_knobs(item) for item in found["results"]}:
        return found
    results = []
    for item in found["results"]:
        before = known[_knobs(item)]
        times = [*before["steps_seconds"], *item["steps_seconds"]]
        processes = before["processes"] + item["processes"]
        results.append(
            item | {"measured_seconds": min(times), "steps_seconds": times, "processes": processes}
        )
    return found | {"results": results}


def _knobs(item: dict[str, Any]) -> tuple[Any, ...]:
    return item.get("loss"), item["checkpointing"], item["micro_batch_size"]


def write(found: dict[str, Any]) -> None:
    """Writes the data file and the page."""
    target = ROOT / "docs" / "accuracy" / f"{found['date']}-speed.json"
    if target.exists():
        found = joined(found, json.loads(target.read_text(encoding="utf-8")))
    target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    page = [
        "# Predicted and measured speed",
        "",
        f"Generated by `python -m scripts.speed_check --write`, {found['date']}: SmolLM2-135M, LoRA rank 16, fp32, eight "
        f"sequences of 128 tokens per step, {found['threads'] or 'all'} threads; {versions}. Rates: {found['rates']}. "
        f"Load average of the machine before and after: {found['load_before_and_after'][0]:.1f} and "
        f"{found['load_before_and_after'][1]:.1f}. Measured: the shortest step; "
        f"processes per plan: {found['results'][0]['processes']}.",
        "",
        summary(found["results"]),
        "",
        table(found["results"]),
        "",
    ]
    (ROOT / "docs" / "speed.md").write_text("\n".join(page), encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--passes", type=int, default=PASSES)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--child", action="store_true", help="train one plan, read from stdin, as told there")
    options = parser.parse_args()
    if options.child:
        order = json.loads(sys.stdin.readline())
        train_here(from_json(JobSpec, order["job"]), from_json(Plan, order["plan"]), order["steps"])
        return
    found = check(options.passes, options.rounds)
    print(table(found["results"]))
    print(summary(found["results"]))
    if options.write:
        write(found)


if __name__ == "__main__":
    main()
