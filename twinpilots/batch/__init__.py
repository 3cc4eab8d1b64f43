"""Batch files: OpenAI's JSONL in, its output records out, through crashes, signals and full disks."""
