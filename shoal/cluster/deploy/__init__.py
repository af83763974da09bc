"""`shoal deploy`: replicas of models on a Ray cluster, behind a router, as many as the load needs."""
