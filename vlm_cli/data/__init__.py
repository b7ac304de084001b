"""Read JSONL files: prompts for `vlm batch`, and records for `vlm train` and `vlm eval`."""
