"""Score photographs with an exported detector, without this project: its rows are those of predict.py.

    pip install onnxruntime numpy pillow
    python predict_onnx.py bottle.onnx photo.png ...

For 8-bit photographs without transparency; "resize" in bottle.json says what predict.py does with others.
"""

import csv
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def main(model: str, *paths: str) -> None:
    graph, facts = Path(model).read_bytes(), json.loads(Path(model).with_suffix(".json").read_text("utf-8"))
    if hashlib.sha256(graph).hexdigest() != facts["sha256"]:
        sys.exit(f"{model}: is not the file that its .json was written with (their sha256 differs)")
    session, rows = onnxruntime.InferenceSession(graph), csv.writer(sys.stdout, lineterminator="\n")
    names = ["scores", "p_values", "maps"][: 2 + facts["has_maps"]]  # there may be more, for other uses
    (height, width), total, errors = facts["size"], len(facts["calibration_scores"]) + 1, []
    rows.writerow(["path", "score", "p_value", "anomalous", "x", "y", "width", "height"])
    for path in paths:
        try:
            image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        except Exception as error:  # of many types, by what is broken; a photograph without a row is told of at the end
            errors.append(f"{path}: {error}")
            continue
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
        scores, p_values, *maps = session.run(names, {"images": pixels[None]})  # of a batch of one
        anomalous = bool(p_values[0] <= facts["rate"])
        box = region(maps[0][0], facts["threshold"], image.size) if maps and anomalous else [None] * 4
        p_value = round(float(p_values[0]) * total) / total  # it is a whole number of (n + 1)-ths
        rows.writerow([path, float(scores[0]), p_value, int(anomalous), *box])
    sys.exit("\n".join(errors) or 0)  # 1 if there are any


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
    axes = zip(list(zip(*inside))[::-1], size, heat.shape[::-1])
    spans = [(min(at) * side // cells, -(-(max(at) + 1) * side // cells)) for at, side, cells in axes]
    return [start for start, _ in spans] + [end - start for start, end in spans]


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) > 2 else sys.exit("usage: python predict_onnx.py bottle.onnx photo.png ...")
