"""Judging a trained model: its samples for held-out subjects, their scores, and the paper's ablation."""
