"""The node daemon: what a machine says of itself to the others, without Ray (`python -m shoal.cluster.daemon`)."""
