"""Does the guard keep refusals, and at what price: GuardSpace beside its rivals, over seeds, tasks, shares of poison.

``python -m benchmarks.evidence run --budget 150m`` works through the cells that are missing; ``report`` prints tables
of whatever cells there are, and draws figures. A cell is one fine-tuning run with its evaluation, in its own JSON file.
"""
