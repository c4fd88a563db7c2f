"""Run any job on a Ray cluster: send it, follow its log, end with its exit status.

Without --address a cluster of this machine is started for the time of the job. With one, the current folder is
uploaded (less what .gitignore names) and the job runs there; Ctrl-C then leaves it running.

examples:
  blues submit train tiny --data-cache-dir data/notes
  blues submit train blues01 --data-cache-dir /shared/data --address http://127.0.0.1:8265 --no-wait
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from blues.config import nearest
from blues.errors import ClusterError

if TYPE_CHECKING:
    from blues.cluster.jobs import JobServer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", help="the job to run there, followed by its own arguments")
    parser.add_argument("--address", metavar="URL", help="the cluster's job server, e.g. http://HOST:8265 (default: "
                        "$RAY_ADDRESS if set, else a local cluster)")  # fmt: skip
    parser.add_argument(
        "--working-dir", metavar="DIR", default=".", help="folder to upload to the cluster of --address"
    )
    parser.add_argument("--submission-id", metavar="ID", help="a name for the job (default: chosen by Ray)")
    parser.add_argument("--num-cpus", type=int, metavar="N", help="CPUs of the local cluster (default: all)")
    parser.add_argument("--driver-cpus", type=float, metavar="N", default=0, help="CPUs reserved for the job's driver")
    parser.add_argument("--no-wait", action="store_true", help="return once the job is accepted (needs --address)")
    parser.set_defaults(job_arguments=())


def run(args: argparse.Namespace) -> int:
    from blues.cluster import jobs

    args.job = _check_job(args.job, args.job_arguments)
    address = args.address or next((os.environ[name] for name in jobs.ADDRESS_VARIABLES if os.environ.get(name)), None)
    if address is not None:
        return _run_remote(args, jobs.server_at(address))
    if args.no_wait:
        raise ClusterError("--no-wait needs --address: a local cluster ends with the command that started it")
    with jobs.local_cluster(num_cpus=args.num_cpus) as server:
        name = jobs.submit(server, args.job, args.job_arguments, submission_id=args.submission_id)
        try:
            return jobs.follow(server, name)
        except KeyboardInterrupt:
            print("\nStopping the job; Ctrl-C again stops at once.", file=sys.stderr)
            print(jobs.stop(server, name))
            raise


def _check_job(job: str, arguments: list[str]) -> str:
    """Refuse here and now what the job would refuse there in a minute; returns the module of the job."""
    from blues.cli import job_names, job_parser, module_name

    names = [name for name in job_names() if name != "submit"]
    if job not in names:
        raise ClusterError(f"{job!r} is not a job that can be submitted.{nearest(job, names)}")
    job_parser(job).parse(arguments)
    return module_name(job)


def _run_remote(args: argparse.Namespace, server: JobServer) -> int:
    from blues.cluster import jobs

    name = jobs.submit(
        server,
        args.job,
        args.job_arguments,
        working_dir=args.working_dir,
        submission_id=args.submission_id,
        num_cpus=args.driver_cpus,
    )
    remedy = (
        f"  follow it: ray job logs --follow --address {server.address} {name}\n"
        f"  stop it:   ray job stop --address {server.address} {name}"
    )
    print(f"Submitted job {name!r} to {server.address}")
    if args.no_wait:
        print(remedy)
        return 0
    try:
        return jobs.follow(server, name)
    except KeyboardInterrupt:
        print(f"\nJob {name!r} goes on running.\n{remedy}", file=sys.stderr)
        raise


if __name__ == "__main__":
    from blues.cli import run_job

    raise SystemExit(run_job("submit"))
