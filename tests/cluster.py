"""A Ray cluster on this machine, in a process of its own: `python tests/cluster.py NODES`, with RAY_AUTH_… set.

It prints HOST:PORT of its head, which has no CPU for actors, and ends with its standard input. Each line there is a
command, answered with one line:

    remove PID    ends the node below which a process runs
    add           a node more
"""

import sys

import ray
from ray.cluster_utils import Cluster

MEMORY = 80 * 2**20  # bytes of each node's object store, the least there is


def parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": MEMORY})
    try:
        nodes = [cluster.add_node(num_cpus=1, object_store_memory=MEMORY) for _ in range(int(sys.argv[1]))]
        print(cluster.address, flush=True)
        for line in sys.stdin:
            if line.startswith("remove"):
                pid = int(line.split()[1])
                above = set()
                while pid > 1:
                    above.add(pid)
                    pid = parent(pid)
                raylets = {info.process.pid: node for node in nodes for info in node.all_processes["raylet"]}
                (node,) = (node for raylet, node in raylets.items() if raylet in above)
                cluster.remove_node(node, allow_graceful=False)
                nodes.remove(node)
                print("removed", flush=True)
            else:
                nodes.append(cluster.add_node(num_cpus=1, object_store_memory=MEMORY))
                print("added", flush=True)
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
