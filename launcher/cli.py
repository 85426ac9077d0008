"""The command line: `launch [key=value ...]`. Turns errors into messages and exit codes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from launcher.comparison import compared_jobs, listed_hardware
from launcher.config import group_choices, groups, read_job
from launcher.contradictions import checked_job
from launcher.errors import ConfigError, Interrupted, LauncherError
from launcher.job import Action, JobSpec, Output
from launcher.overrides import resume_changes
from launcher.redaction import redacted, redacted_document
from launcher.stored_secrets import known_secrets
from launcher.sweep import Point, is_sweep, sweep_points
from launcher.terminal import waiting, write_text

INTRODUCTION = """\
launch [key=value ...]     plans a fine-tuning job's memory, then runs it

  launch                      a real LoRA run on this machine's CPU or GPU
  launch recipe=llama_lora hardware=a100_40g action=plan
                              plan for a device you don't have
  launch action=memory recipe=llama_lora hardware=a100_40g
                              where every GiB of that plan goes, and when
  launch action=explain recipe=llama_lora hardware=a100_40g
                              what each knob buys, and more memory
  launch action=plan recipe=llama_lora hardware=any
                              which device is best for a job
  launch action=plan recipe=llama_full hardware=any hardware.num_devices=[1,8]
                              which device, and how many of it
  launch action=explain recipe=llama_lora hardware=a100_40g report=html
                              all of that in one page, with sliders
  launch action=plan data.max_length=auto
                              reads the data: what each length costs, and keeps
  launch profile=production recipe=llama_lora hardware=a100_40g action=plan
                              for runs of weeks: refuses squeezed plans
  launch -m recipe=llama_lora max_length=2048,8192 action=plan
                              one table of all combinations
  launch action=report        past runs, predicted and measured
  launch action=status run_dir=<run>
                              where a run stands, on this machine or a cluster

Every key, its default and its meaning: launcher/job.py
"""


def help_text() -> str:
    """What `launch --help` prints."""
    lines = [INTRODUCTION]
    for group in groups():
        choices = ", ".join(group_choices(group))
        lines.append(f"{group}=")
        lines += _wrap(choices)
    lines += ["action=", f"    {', '.join(action.value for action in Action)}", "output=", "    text, json"]
    return "\n".join(lines)


def _wrap(text: str, width: int = 76) -> list[str]:
    lines, line = [], "   "
    for word in text.split():
        if len(line) + 1 + len(word) > width:
            lines.append(line)
            line = "   "
        line += " " + word
    return [*lines, line]


def main() -> None:
    """Entry point of the `launch` command."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs one command line; returns the exit code. Data goes to stdout, everything else to stderr."""
    if any(argument in ("-h", "--help", "help") for argument in arguments):
        sys.stdout.write(help_text() + "\n")
        return 0
    try:
        if is_sweep(arguments):
            return _sweep(sweep_points(arguments))
        listed = listed_hardware(arguments)
        if listed.is_comparison:
            return _compare(compared_jobs(listed))
        return _act(checked_job(read_job(arguments)), resume_changes(arguments))
    except KeyboardInterrupt:
        return _fail(Interrupted("stopped"))
    except LauncherError as failure:
        return _fail(failure)


def _act(job: JobSpec, changes: Mapping[str, Any]) -> int:
    from launcher import advice, history, workflow  # noqa: PLC0415  # --help and configuration errors must not wait for the planner

    write = _print_line if job.output is Output.TEXT else _log_line
    if job.action is Action.REPORT:
        answer = history.report_answer(job)
    elif job.action is Action.STATUS:
        answer = workflow.status_answer(job)
    elif job.action is Action.CALIBRATE:
        answer = workflow.calibrate_answer(write)
    else:
        with waiting("planning", sys.stderr) as stop_waiting:

            def show(line: str) -> None:
                stop_waiting()
                write(line)

            if job.action is Action.PLAN:
                answer = advice.plan_answer(job)
            elif job.action is Action.MEMORY:
                answer = advice.memory_answer(job)
            elif job.action is Action.EXPLAIN:
                answer = advice.explain_answer(job)
            elif job.resume:
                answer = workflow.resume_answer(job, changes, show)
            else:
                answer = workflow.run_answer(job, show)
    return _show(answer.text, answer.document, answer.failure, job.output)


def _compare(jobs: Sequence[JobSpec]) -> int:
    from launcher import advice  # noqa: PLC0415  # as above

    with waiting("planning", sys.stderr):
        answer = advice.cards_answer(jobs)
    return _show(answer.text, answer.document, answer.failure, jobs[0].output)


def _sweep(points: Sequence[Point]) -> int:
    from launcher import advice  # noqa: PLC0415  # as above

    with waiting("planning", sys.stderr):
        answer = advice.sweep_answer(points)
    return _show(answer.text, answer.document, answer.failure, points[0].job.output)


def _show(text: str, document: Mapping[str, Any], failure: LauncherError | None, output: Output) -> int:
    """Prints what an action had to say; returns the exit code."""
    if output is Output.TEXT and text:
        _print_line(text)
    elif output is Output.JSON:
        sys.stdout.write(json.dumps(redacted_document(document, known_secrets(os.environ))) + "\n")
    return 0 if failure is None else _fail(failure)


def _print_line(line: str) -> None:
    write_text(redacted(line, known_secrets(os.environ)), sys.stdout)


def _log_line(line: str) -> None:
    write_text(redacted(line, known_secrets(os.environ)), sys.stderr)


def _fail(failure: LauncherError) -> int:
    kind = "configuration" if isinstance(failure, ConfigError) else "error"
    _log_line(f"{kind}: {failure}")
    return failure.exit_code


if __name__ == "__main__":
    main()
