"""Models with a memory under lm-evaluation-harness."""
