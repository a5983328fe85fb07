"""Converters: from a data set as it is published to a folder of TFRecords with its `dataset_info.json`.

Each converter is one file; what they share is in `common.py`.
"""
