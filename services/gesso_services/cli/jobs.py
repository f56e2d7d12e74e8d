"""``gesso jobs``: look at the queue of a server, watch a job, withdraw one."""

from typing import Annotated

import typer
from gesso_contracts import JobProgress, JobState, JobStateChanged, JobStatus

from gesso_services.cli.common import (
    Key,
    Url,
    complain,
    one_sentence,
    out,
    progress_bars,
    server,
)
from gesso_services.client import DEFAULT_URL

app = typer.Typer(no_args_is_help=True, help="List, watch and cancel jobs.")
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="The id of a job.")]


@app.command("list")
@one_sentence
def list_jobs(
    status: Annotated[JobStatus | None, typer.Option(help="Only jobs in this state.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=200)] = 20,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Show the jobs that changed last."""
    with server(url, key) as gesso:
        jobs = gesso.jobs(status=status, limit=limit)
    if not jobs:
        out.print("no jobs")
        return
    width = max(len(job.id) for job in jobs)
    for job in jobs:
        changed = job.updated_at.astimezone().strftime("%H:%M:%S")
        line = f"{job.id:<{width}}  {job.status:<9}  {job.progress:>4.0%}  {changed}  {job.kind}"
        out.print(line, highlight=False, soft_wrap=True)  # whole ids, so that they can be copied


@app.command()
@one_sentence
def watch(job_id: JobArgument, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Follow a job until it is final; exit code 1 unless it succeeds."""
    last: JobState | None = None
    with server(url, key) as gesso, progress_bars() as bars:
        line = bars.add_task(job_id, total=1.0, note="")
        for event in gesso.watch(job_id):
            if isinstance(event, JobStateChanged):
                last = event.state
                bars.update(line, completed=last.progress, note=last.status)
            elif isinstance(event, JobProgress):
                bars.update(
                    line, completed=event.progress, note=f"step {event.step}/{event.total_steps}"
                )
    if last is None or last.status != "succeeded":
        complain(_ending(job_id, last))
        raise typer.Exit(1)
    out.print(f"{job_id} succeeded", highlight=False)


@app.command()
@one_sentence
def cancel(job_id: JobArgument, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Withdraw a job; a running one stops at its next step."""
    with server(url, key) as gesso:
        state = gesso.cancel(job_id)
    done = "cancelled" if state.status == "cancelled" else "will stop at its next step"
    out.print(f"{job_id} {done}", highlight=False)


def _ending(job_id: str, state: JobState | None) -> str:
    if state is None:
        return f"the server said nothing about job {job_id}; look with `gesso jobs list`"
    reason = f": {state.problem.detail}" if state.problem else ""
    return f"job {job_id} {state.status}{reason}"
