"""Two-stage detection as in Mask R-CNN (He et al. 2017), in parts that the systems with boxes put together.

Everything is `keras.ops` in static shapes: tables of boxes have a fixed number of rows and say which of them are used.
The parts, in the order in which they are run:

- `instances.py`: the table of instances and the map of its rows, from a panoptic map (inside `tf.data`);
- `matching.py`: overlaps of boxes with instances and crowds, seeded sampling;
- `rpn.py`: anchors, region proposal network, its losses, proposals;
- `roi_pooling.py`: features of boxes from a pyramid;
- `roi_heads.py`: training samples, box head and mask head with their losses, final detections;
- `masks.py`: mask targets from the map of rows, and masks pasted into the image;
- `detector.py`: all of them as one layer.
"""
