"""Evaluation: streaming metrics, the COCO panoptic file format, reports, and the evaluation of models."""
