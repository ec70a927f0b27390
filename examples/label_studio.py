"""Convert the polygons that `eval.py --save polygons` writes to tasks with predictions for Label Studio.

python eval.py --images images --output results --save polygons
python examples/label_studio.py results/*.polygons.json --root "/data/local-files/?d=images/" --output tasks.json

Needs only the standard library. Label Studio's polygons have no holes, so holes are filled; parts of one instance
become separate polygons.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def task(labelme: dict[str, Any], root: str, from_name: str, to_name: str) -> dict[str, Any]:
    """Return one task: the address of the image, and a prediction with coordinates in percent of its size."""
    width, height = labelme["imageWidth"], labelme["imageHeight"]
    result = []
    for number, shape in enumerate(labelme["shapes"]):
        if shape["flags"].get("hole"):
            continue
        points = [[100 * x / width, 100 * y / height] for x, y in shape["points"]]
        result.append(
            {
                "id": f"polygon{number}",
                "type": "polygonlabels",
                "from_name": from_name,
                "to_name": to_name,
                "original_width": width,
                "original_height": height,
                "value": {"points": points, "polygonlabels": [shape["label"]], "closed": True},
            }
        )
    image = root + Path(labelme["imagePath"]).name
    return {"data": {"image": image}, "predictions": [{"model_version": "YOLACT", "result": result}]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", help="files written by --save polygons")
    parser.add_argument("--root", default="/data/local-files/?d=", help="address of the images' folder (%(default)s)")
    parser.add_argument("--from_name", default="label", help="name of the PolygonLabels tag (%(default)s)")
    parser.add_argument("--to_name", default="image", help="name of the Image tag (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("tasks.json"))
    args = parser.parse_args()
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in args.files]
    tasks = [task(content, args.root, args.from_name, args.to_name) for content in contents]
    args.output.write_text(json.dumps(tasks), encoding="utf-8")
    print(f"{len(tasks)} tasks -> {args.output}")


if __name__ == "__main__":
    main()
