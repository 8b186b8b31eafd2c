"""Published benchmarks of subject-driven generation: what each draws, how it is scored, and whether two results may be
compared."""
