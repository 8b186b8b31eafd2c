"""Images that people have labelled already -> shards, without a model."""

from datapipe.labelled.coco import read_coco
from datapipe.labelled.images import LabelledImage, LabelledObject, digest_of
from datapipe.labelled.openimages import read_openimages
from datapipe.labelled.write import import_images

__all__ = ["LabelledImage", "LabelledObject", "digest_of", "import_images", "read_coco", "read_openimages"]
