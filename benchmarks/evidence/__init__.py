"""Does the guard keep refusals, and at what price: GuardSpace beside its rivals, over seeds, tasks, shares of poison.

``python -m benchmarks.evidence run --budget 150m`` works through the cells that are missing; ``report`` prints tables
of whatever cells there are. A cell is one fine-tuning run with its evaluation, in a JSON file of its own.
"""
