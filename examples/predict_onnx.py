"""Score photographs with an exported detector, without this project: its rows are those of predict.py.

    pip install onnxruntime numpy pillow
    python predict_onnx.py bottle.onnx photo.png ...

For 8-bit photographs without transparency; "resize" in bottle.json says what predict.py does with others.
"""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def main(model: str, *paths: str) -> None:
    facts = json.loads(Path(model).with_suffix(".json").read_text("utf-8"))
    session = onnxruntime.InferenceSession(model)
    (height, width), total = facts["size"], len(facts["calibration_scores"]) + 1
    rows = csv.writer(sys.stdout, lineterminator="\n")
    rows.writerow(["path", "score", "p_value", "anomalous", "x", "y", "width", "height"])
    for path in paths:
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
        scores, p_values, *maps = session.run(None, {"images": pixels[None]})  # of a batch of one
        anomalous = bool(p_values[0] <= facts["rate"])
        box = region(maps[0][0], facts["threshold"], image.size) if maps and anomalous else [None] * 4
        p_value = round(float(p_values[0]) * total) / total  # it is a whole number of (n + 1)-ths
        rows.writerow([path, float(scores[0]), p_value, int(anomalous), *box])


def region(heat: np.ndarray, threshold: float, size: tuple[int, int]) -> list[int]:
    """Return x, y, width, height, in pixels of a file of a size (W, H), of the region of a map (h, w) that holds its
    maximum and is above the threshold, or, where several networks decide, above what is near the maximum."""
    heat = heat.astype(float)
    level = min(threshold, heat.max() - (heat.max() - np.median(heat)) / 4)
    above, waiting, inside = heat > level, [divmod(int(heat.argmax()), heat.shape[1])], set()
    while waiting:
        y, x = waiting.pop()
        if (y, x) not in inside and 0 <= y < heat.shape[0] and 0 <= x < heat.shape[1] and above[y, x]:
            inside.add((y, x))
            waiting += [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
    corner, sides = [], []
    for places, side, cells in zip(list(zip(*inside))[::-1], size, heat.shape[::-1]):
        corner.append(min(places) * side // cells)
        sides.append(-(-(max(places) + 1) * side // cells) - corner[-1])
    return corner + sides


if __name__ == "__main__":
    main(*sys.argv[1:])
