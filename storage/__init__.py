"""Files that a run writes and reads back: checkpoints, metrics.jsonl, run folders, caches."""
