"""What all benchmarks share: the machine's description, timed blocks, statistics, results as JSON, plots."""
