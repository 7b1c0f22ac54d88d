"""What the nodes of a partition have, by sinfo, and what follows for a job that does not say it."""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

from ssl_dist.errors import UserError
from ssl_dist.slurm.script import Site


@dataclass(frozen=True)
class Node:
    cores: int
    gpus: int


def settle(site: Site) -> Site:
    """The site with the cores of a rank: where GPUs are asked for, their share of a node's cores.

    Slurm itself gives a rank one core, on which all its images would be decoded. Raises `UserError` where the cores of
    a rank are left open and no share tells them, and where neither GPUs nor ranks are asked of nodes that have GPUs.
    """
    nodes = of_partition(site.partition)
    where = f"partition {site.partition}" if site.partition else "the default partition"
    most_gpus = max((node.gpus for node in nodes), default=0)
    if nodes and min(node.gpus for node in nodes) > 0 and site.gpus_per_node is None:
        if site.tasks_per_node is None:
            raise UserError(
                f"--gpus-per-node: the nodes of {where} have {most_gpus} GPUs each and the job asks for none; give "
                f"--gpus-per-node {most_gpus}, or --tasks-per-node 1 for a rank on the CPU"
            )
        print(f"note: the nodes of {where} have GPUs, and these ranks run on CPUs", file=sys.stderr, flush=True)
    if site.cpus_per_task is not None:
        return site
    if site.gpus_per_node is None or not nodes:
        raise UserError(_cores_left_open(site, nodes, where))
    fit = [node for node in nodes if node.gpus >= site.gpus_per_node]
    if not fit:
        raise UserError(f"--gpus-per-node {site.gpus_per_node}: no node of {where} has more than {most_gpus}")
    cores = min(node.cores * site.gpus_per_node // node.gpus for node in fit)
    cores_of_rank = max(1, cores // site.ranks_per_node)
    print(f"note: --cpus-per-task {cores_of_rank}, by the share of the GPUs in a node", file=sys.stderr, flush=True)
    return site.model_copy(update={"cpus_per_task": cores_of_rank})


def _cores_left_open(site: Site, nodes: list[Node], where: str) -> str:
    if nodes:
        cores = min(node.cores for node in nodes)
        example = max(1, cores // site.ranks_per_node)
        known = f"a node of {where} has {cores}"
    else:
        example, known = 8, "no Slurm here tells what the nodes have"
    return (
        "--cpus-per-task: Slurm would give a rank one core for all its images; give its number of cores, for example "
        f"--cpus-per-task {example}, or cpus_per_task in the site file ({known})"
    )


def of_partition(partition: str | None) -> list[Node]:
    """The nodes of a partition, or of the default one. None where no Slurm answers, or where the name is wrong: what
    submits says so."""
    if shutil.which("sinfo") is None:
        return []
    command = ["sinfo", "--noheader", "--Node", "--format=%P|%c|%G"]
    done = subprocess.run(
        [*command, *([f"--partition={partition}"] if partition else [])], capture_output=True, text=True, check=False
    )
    lines = [line.split("|") for line in done.stdout.split()] if done.returncode == 0 else []
    return [Node(int(cores), _gpus(gres)) for name, cores, gres in lines if partition or name.endswith("*")]


def _gpus(gres: str) -> int:
    """Of 'gpu:h100:8(S:0-1),tmpfs:1': 8."""
    return sum(int(count) for count in re.findall(r"(?:^|,)gpu(?::[^:,(]+)?:(\d+)", gres))
