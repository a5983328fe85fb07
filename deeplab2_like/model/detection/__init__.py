"""Two-stage detection as in Mask R-CNN (He et al., 2017), in parts that several systems share.

Everything is `keras.ops` in static shapes: tables of boxes have a fixed number of rows and mark the used ones. The
modules, in the order in which they run:

- `config.py`: the config sections `rpn` and `roi`;
- `instances.py`: the table of instances of a panoptic map, and the map of its rows (inside `tf.data`);
- `matching.py`: overlaps of boxes with instances and crowds, and seeded sampling;
- `rpn.py`: anchors, the region proposal network, its losses, proposals;
- `roi_pooling.py`: RoIAlign over a pyramid;
- `roi_heads.py`: samples for training, box head and mask head with their losses, detections;
- `masks.py`: mask targets from the map of rows, and masks pasted into the image;
- `detector.py`: all of them as one layer.
"""
