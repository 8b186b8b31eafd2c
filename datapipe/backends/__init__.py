"""The models behind the stages: one file per model family, and `protocol` for what a stage asks of any of them. A
backend is loaded from a folder, or from a hub id at a pinned revision, and called on a batch."""
