"""Gathers the facts of this machine: for a doctor here, or for another machine's, which asks the node daemon."""

from shoal.cluster.doctor.gather.node import gather_node

__all__ = ["gather_node"]
