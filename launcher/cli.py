"""The command line: `launch [key=value ...]`. Turns errors into messages and exit codes."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from launcher.config import group_choices, groups, load_job
from launcher.errors import ConfigError, Interrupted, LauncherError
from launcher.job import Action, JobSpec, Output

INTRODUCTION = """\
launch [key=value ...]     plans a fine-tuning job's memory, then runs it

  launch                      a real LoRA run on this machine's CPU or GPU
  launch recipe=llama_lora hardware=a100_40g action=plan
                              plan for a device you don't have
  launch action=memory recipe=llama_lora hardware=a100_40g
                              where every GiB of that plan goes, and when
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
        job = load_job(arguments)
        return _act(job)
    except KeyboardInterrupt:
        return _fail(Interrupted("stopped"))
    except LauncherError as failure:
        return _fail(failure)


def _act(job: JobSpec) -> int:
    from launcher import advice, workflow  # noqa: PLC0415  # --help and configuration errors must not wait for the planner

    as_text = job.output is Output.TEXT
    show = _print_line if as_text else _log_line
    if job.action is Action.PLAN:
        answer = workflow.plan_answer(job)
    elif job.action is Action.REPORT:
        answer = workflow.report_answer(job)
    elif job.action is Action.STATUS:
        answer = workflow.status_answer(job)
    elif job.action is Action.MEMORY:
        answer = advice.memory_answer(job)
    elif job.action is Action.EXPLAIN:
        answer = advice.explain_answer(job)
    elif job.action is Action.CALIBRATE:
        answer = workflow.calibrate_answer(show)
    else:
        answer = workflow.run_answer(job, show)
    if as_text and answer.text:
        _print_line(answer.text)
    elif not as_text:
        sys.stdout.write(json.dumps(answer.document) + "\n")
    return 0 if answer.failure is None else _fail(answer.failure)


def _print_line(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _log_line(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _fail(failure: LauncherError) -> int:
    kind = "configuration" if isinstance(failure, ConfigError) else "error"
    _log_line(f"{kind}: {failure}")
    return failure.exit_code


if __name__ == "__main__":
    main()
