"""Segment an image with an exported model, without PyTorch and without this project.

pip install onnxruntime numpy opencv-python
python onnxruntime_only.py model.onnx street.jpg out.png         # model.onnx: from python -m tools.export
"""

import json
import sys

import cv2
import numpy as np
import onnxruntime

MIN_SCORE = 0.3


def main(model_path: str, image_path: str, output_path: str) -> None:
    session = onnxruntime.InferenceSession(model_path, providers=["CPUExecutionProvider"])
    class_names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])

    image = cv2.imread(image_path)
    if image is None:
        sys.exit(f"error: {image_path}: cannot be read as an image")
    batch = np.ascontiguousarray(image[None, :, :, ::-1].transpose(0, 3, 1, 2))  # uint8 RGB [1, 3, H, W]
    # Models that score their masks have a sixth output, which ranks the detections.
    score = "mask_scores" if "mask_scores" in [output.name for output in session.get_outputs()] else "scores"
    names = ["boxes", score, "labels", "masks", "count"]
    boxes, scores, labels, masks, count = session.run(names, {"image": batch})

    colors = np.random.default_rng(0).integers(64, 256, (len(class_names), 3))
    for i in range(count[0]):  # further slots are unused
        if scores[0, i] < MIN_SCORE:
            continue
        x1, y1, x2, y2 = boxes[0, i].round().astype(int).tolist()
        name = class_names[labels[0, i]]
        color = colors[labels[0, i]]
        mask = masks[0, i]  # bool [H, W]
        image[mask] = (0.5 * image[mask] + 0.5 * color).astype(np.uint8)
        cv2.rectangle(image, (x1, y1), (x2, y2), color.tolist(), 2)
        cv2.putText(image, f"{name} {scores[0, i]:.2f}", (x1, y1 + 16), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255, 255, 255))
        print(f"{name} {scores[0, i]:.2f} box {x1},{y1},{x2},{y2} mask {int(mask.sum())} pixels")
    cv2.imwrite(output_path, image)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python onnxruntime_only.py model.onnx street.jpg out.png")
    main(*sys.argv[1:4])
