"""Evaluation: streaming metrics, the COCO panoptic file format, reports. Needs NumPy, no deep learning stack."""
