"""Converters: they turn a published data set into a folder of TFRecords with a `dataset_info.json`.

Each converter is one file. `common.py` writes a split, `labeled_images.py` makes records of images and label maps, and
`unfinished.py` keeps what an interrupted conversion has finished.
"""
