"""Labels a folder of images and writes one JSON line per image: `python examples/label_folder.py photos labels.jsonl`.

Recipe `toy` runs without a download and knows the toy world's 32 nouns only; `--recipe sdd` uses the paper's models.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from subject_diffusion import Labeler

BATCH = 64
ENDINGS = {".jpg", ".jpeg", ".png", ".webp"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipe", default="toy")
    asked = parser.parse_args()
    paths = sorted(path for path in asked.folder.rglob("*") if path.suffix.lower() in ENDINGS)
    labeler = Labeler(asked.recipe)
    with asked.out.open("w", encoding="utf-8") as file:
        for start in range(0, len(paths), BATCH):
            for sample in labeler(paths[start : start + BATCH]):
                entities = [{"tag": e.tag, "box": e.box, "score": e.score} for e in sample.entities]
                line = {"file": sample.url, "caption": sample.caption, "entities": entities}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    print(f"{len(paths)} images labeled in {asked.out}")


if __name__ == "__main__":
    main()
