"""Convert annotations of other tools to COCO JSON: YOLO, LabelMe, VIA, Pascal VOC, and COCO exports."""
