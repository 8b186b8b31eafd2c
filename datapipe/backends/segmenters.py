"""Which types of models give masks for boxes. Apart from `sam`, because a recipe is checked without torch."""

PADDED = ("sam", "sam_hq")
"""Their images keep their proportions, and are padded to a square."""
STRETCHED = ("sam2", "sam2_video", "edgetam", "edgetam_video")
"""Their images are stretched to the square."""
SEGMENTERS = (*PADDED, *STRETCHED)
