"""Whether all nodes have the same files: what `shoal verify --cluster` asks of daemons, and what it makes of it."""
