"""One file a model family. A backend is loaded from a folder or a hub id at a pinned revision, and called on a
batch."""
