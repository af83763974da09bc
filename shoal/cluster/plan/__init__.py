"""Planning: from a model's config.json and a machine to every layout that fits, its predictions, and the one to take.

Pure arithmetic without torch. `planner.make_plan` is the way in.
"""

# What is planned for where nothing is said.
DEFAULT_MAX_MODEL_LEN = 4096
DEFAULT_CONCURRENCY = 32
