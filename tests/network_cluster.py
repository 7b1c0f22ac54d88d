"""A Slurm cluster whose nodes have host names and networks of their own, with links that can be cut."""

import os
import subprocess

from tests.cluster import BLOCK, FIRST_PORT, Cluster, unavailable_reason
from tests.processes import PATH


def network_unavailable_reason():
    """Why no NetworkCluster can be started here, with the remedy; None if one can."""
    if reason := unavailable_reason():
        return reason
    trial = "ip link add bridge0 type bridge && ip link add veth0 type veth peer name veth1"
    command = ["unshare", "--net", "--uts", "--mount", "sh", "-ec", trial]
    completed = subprocess.run(command, env=os.environ | {"PATH": PATH}, capture_output=True, text=True)
    return f"no virtual networks here: {completed.stderr.strip()}" if completed.returncode else None


class NetworkCluster(Cluster):
    """Each node has a host name (its address), a network of its own, and a link that can be cut."""

    # In the node's namespaces. The link's other end goes to this process's network ($1).
    NODE = """
    outside() { nsenter --net=/proc/$1/ns/net ip link "${@:2}"; }
    hostname "$4"
    ip link set lo up
    outside $1 delete "$3" 2>/dev/null || true
    ip link add eth0 type veth peer name "$3" netns $1
    ip address add "$4/24" dev eth0
    ip link set eth0 up
    outside $1 set "$3" master "$2" up
    exec slurmd -D -N "$4"
    """

    def set_up_network(self):
        number = (self.ports[0] - FIRST_PORT) // BLOCK
        network = f"198.18.{number}"  # in the range reserved for network tests (RFC 2544)
        self.address, self.nodes = f"{network}.1", (f"{network}.2", f"{network}.3")
        self.bridge = f"slurm{number}"
        self.run("ip", "link", "add", self.bridge, "type", "bridge")
        self.run("ip", "address", "add", f"{self.address}/24", "dev", self.bridge)
        self.run("ip", "link", "set", self.bridge, "up")

    def network_removal(self):
        # By name, also the nodes' ends: a closing connection may keep a node's network alive
        links = [self.bridge, *(self.link(name) for name in self.nodes)]
        return ["sh", "-c", 'for link; do ip link delete "$link"; done', "remove", *links]

    def slurmd(self, name):
        arguments = [str(os.getpid()), self.bridge, self.link(name), name]
        return ["unshare", "--net", "--uts", "--mount", "bash", "-euc", self.NODE, "node", *arguments]

    def link(self, name):
        return f"{self.bridge}-{name.rpartition('.')[2]}"

    def cut(self, name):
        """Drop all traffic to and from the node, without any notification; its processes keep running."""
        self.run("ip", "link", "set", self.link(name), "down")

    def mend(self, name):
        """Restore the link. Slurm notices after up to a minute, or when the node is restarted."""
        self.run("ip", "link", "set", self.link(name), "up")

    def clear(self):
        for name in self.nodes:
            if self.daemons[name].poll() is None:
                self.mend(name)
            if not self.is_up(name):  # else Slurm would take a minute to notice
                self.crash_node(name)
        super().clear()
