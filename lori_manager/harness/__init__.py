"""Tasks of lm-evaluation-harness: what it asks is frozen as rows, what it says is stored."""
