"""A Slurm cluster whose nodes have host names and networks of their own, with links that can be cut."""

import os
import subprocess

from tests.cluster import BLOCK, FIRST_PORT, Cluster, why_not
from tests.processes import PATH


def why_no_network():
    """Why no NetworkCluster can be started here, with the remedy; None if one can."""
    if reason := why_not():
        return reason
    trial = "ip link add bridge0 type bridge && ip link add veth0 type veth peer name veth1"
    command = ["unshare", "--net", "--uts", "--mount", "sh", "-ec", trial]
    done = subprocess.run(command, env=os.environ | {"PATH": PATH}, capture_output=True, text=True)
    return f"no virtual networks here: {done.stderr.strip()}" if done.returncode else None


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

    def place_nodes(self):
        number = (self.ports[0] - FIRST_PORT) // BLOCK
        network = f"198.18.{number}"  # from the addresses that are kept for tests of networks
        self.address, self.nodes = f"{network}.1", (f"{network}.2", f"{network}.3")
        self.bridge = f"slurm{number}"
        self.run("ip", "link", "add", self.bridge, "type", "bridge")
        self.run("ip", "address", "add", f"{self.address}/24", "dev", self.bridge)
        self.run("ip", "link", "set", self.bridge, "up")

    def remove_nodes(self):
        links = [self.bridge, *(self.link(name) for name in self.nodes)]  # a node's dying connections may keep its own
        return ["sh", "-c", 'for link; do ip link delete "$link"; done', "remove", *links]

    def slurmd(self, name):
        arguments = [str(os.getpid()), self.bridge, self.link(name), name]
        return ["unshare", "--net", "--uts", "--mount", "bash", "-euc", self.NODE, "node", *arguments]

    def link(self, name):
        return f"{self.bridge}-{name.rpartition('.')[2]}"

    def cut(self, name):
        """Nothing reaches the node or leaves it, and nobody is told; what runs there goes on."""
        self.run("ip", "link", "set", self.link(name), "down")

    def mend(self, name):
        """Slurm sees it after up to a minute, or when the node is started anew."""
        self.run("ip", "link", "set", self.link(name), "up")

    def clear(self):
        for name in self.nodes:
            if self.daemons[name].poll() is None:
                self.mend(name)
            if not self.is_up(name):  # and it would take a minute to be
                self.crash_node(name)
        super().clear()
