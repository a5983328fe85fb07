"""`scenes`: a procedural data set of toy streets, the default data set and the test data of all systems.

Every scene is a small 3-D street: a ground plane with road and sidewalks, houses and trees along it, and cars, people,
boxes and balls standing on it, mostly in rows, groups and piles, so that objects of one class touch and hide each
other. A model that knows only the class of every pixel therefore cannot tell the objects apart;
`benchmarks/scenes_difficulty.py` measures that.

How a scene is made:

1. `layout.make_scene` draws camera, light and objects at random. It works in the world, in meters: x to the right, y up
   from the ground, z away from the camera. `view.View` projects polygons to the picture plane with a pinhole camera.
2. `render.render_scene` paints the polygons from far to near (the painter's algorithm) into an image and a label map.
3. `texture.add_texture` adds texture, uneven light and sensor noise to the image.

On the picture plane the height is 1 and the width 2 at every image size, so an index shows the same scene at any
size; sizes of another shape than 1:2 stretch it. All random choices about the scene are made before the size matters.

The bytes of a scene depend on the order in which random numbers are drawn: changing that order changes the data set.
"""

from deeplab2_like.data.scenes.classes import scenes_info
from deeplab2_like.data.scenes.render import render_scene

__all__ = ["render_scene", "scenes_info"]
