"""From a user's data set to batches: dataset facts, TFRecords, augmentation, the input pipeline, converters."""
