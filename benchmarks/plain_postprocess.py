"""The post-processing of Panoptic-DeepLab as it is usually written, and made-up network outputs to feed it with.

The speed of the library's own formulation is measured against this one (`benchmarks/postprocess.py`), and its results
are tested against it. Both see the same bilinear upsampling: whole factor, half-pixel centers.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf


def plain_postprocess(
    outputs: Mapping[str, tf.Tensor],
    image_size: tuple[int, int],
    *,
    stride: int,
    thing_classes: Sequence[int],
    label_divisor: int,
    ignore_label: int,
    center_threshold: float,
    nms_kernel: int,
    top_k: int,
    stuff_area_limit: int,
) -> tuple[np.ndarray, list[dict[int, float]]]:
    """Class probabilities at full size, a distance for each pixel and center, and a loop over the instances.

    Args:
        outputs: `semantic_logits` float32 [B, h, w, C], the heat map `center` [B, h, w, 1], and `offset` [B, h, w, 2]
            (y, x) in image pixels.
        image_size: Height and width of the images without padding.
        stride: Image pixels per output pixel.
        thing_classes: Class ids of things.
        label_divisor: Factor between class and instance ids.
        ignore_label: Class id of void.
        center_threshold: Heat that a center must exceed.
        nms_kernel: Side of the window in which a center must be the maximum, in image pixels.
        top_k: Most centers kept per image.
        stuff_area_limit: Stuff segments of fewer pixels become void.

    Returns:
        The panoptic maps, int32 [B, H, W], and for each image the score of each instance by its panoptic value: the
        mean probability of its class over its pixels, at full size, times the heat of its center.
    """
    height, width = image_size

    def upsample(x: tf.Tensor) -> tf.Tensor:
        coarse_height, coarse_width = x.shape[1:3]
        return tf.image.resize(x, (coarse_height * stride, coarse_width * stride))[:, :height, :width]

    probabilities = tf.nn.softmax(upsample(outputs["semantic_logits"]))  # [B, H, W, C]
    heat_maps = upsample(outputs["center"])  # [B, H, W, 1]
    offsets = upsample(outputs["offset"])  # [B, H, W, 2]
    num_classes = probabilities.shape[-1]
    y, x = tf.meshgrid(tf.range(height, dtype=tf.float32), tf.range(width, dtype=tf.float32), indexing="ij")

    maps, scores = [], []
    for probability, heat_map, offset in zip(probabilities, heat_maps, offsets, strict=True):
        classes = tf.argmax(probability, axis=-1, output_type=tf.int32)  # [H, W]
        is_thing = tf.reduce_any(classes[..., tf.newaxis] == tf.constant(list(thing_classes)), axis=-1)  # [H, W]

        highest = tf.nn.max_pool2d(heat_map[tf.newaxis], nms_kernel, 1, "SAME")[0]
        is_peak = (heat_map == highest) & (heat_map > center_threshold)
        peaks = tf.where(is_peak, heat_map, 0.0)[..., 0]  # [H, W]
        number = min(top_k, int(tf.math.count_nonzero(peaks)))
        heat, position = tf.math.top_k(tf.reshape(peaks, [-1]), number)  # [K]

        panoptic = tf.fill((height, width), ignore_label * label_divisor)
        instance_scores: dict[int, float] = {}
        if number:
            center_y = tf.cast(position // width, tf.float32)[:, tf.newaxis, tf.newaxis]  # [K, 1, 1]
            center_x = tf.cast(position % width, tf.float32)[:, tf.newaxis, tf.newaxis]  # [K, 1, 1]
            distance = tf.square(y + offset[..., 0] - center_y) + tf.square(x + offset[..., 1] - center_x)  # [K, H, W]
            nearest = tf.argmin(distance, axis=0, output_type=tf.int32)  # [H, W]
            instance_map = tf.where(is_thing, nearest, -1)
            counts = [0] * num_classes
            for instance in range(number):
                mask = instance_map == instance
                if not tf.reduce_any(mask):
                    continue
                votes = tf.math.bincount(tf.boolean_mask(classes, mask), minlength=num_classes)
                class_id = int(tf.argmax(votes))
                counts[class_id] += 1
                value = class_id * label_divisor + counts[class_id]
                panoptic = tf.where(mask, value, panoptic)
                certainty = tf.reduce_mean(tf.boolean_mask(probability[..., class_id], mask))
                instance_scores[value] = float(heat[instance] * certainty)
        for class_id in set(range(num_classes)) - set(thing_classes):
            mask = classes == class_id
            area = int(tf.math.count_nonzero(mask))
            if area and area >= stuff_area_limit:
                panoptic = tf.where(mask, class_id * label_divisor, panoptic)
        maps.append(panoptic.numpy())
        scores.append(instance_scores)
    return np.stack(maps), scores


def made_up_outputs(
    image_size: tuple[int, int],
    *,
    stride: int,
    num_classes: int,
    thing_classes: Sequence[int],
    num_centers: int,
    thing_share: float = 0.4,
    offset_noise: float = 3.0,
    within: float | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Outputs like those of a trained network: smooth regions of classes, a peak per instance, noisy offsets to it.

    The values are multiples of powers of two, with few enough bits for bilinear upsampling by 2 or 4 to be exact in
    float32: any two ways of computing it agree to the last bit, and results can be compared for equality.

    Args:
        image_size: Height and width of the image.
        stride: Image pixels per output pixel.
        num_classes: Number of classes.
        thing_classes: Class ids of things.
        num_centers: Number of instances.
        thing_share: Share of pixels whose best class is a thing.
        offset_noise: Standard deviation of the error of each offset, in pixels.
        within: Centers lie at most this many pixels from the middle of the image, on each axis; by default anywhere.
        seed: Of the random numbers.

    Returns:
        `semantic_logits` float32 [1, h, w, C], `center` [1, h, w, 1], `offset` [1, h, w, 2], for the image padded to a
        multiple of 32.
    """
    random = np.random.default_rng(seed)
    rows, columns = (-(-side // 32) * 32 // stride for side in image_size)

    # Noise at 1/64 of the image, upsampled, makes regions; a constant on top of the things sets their share.
    coarse = random.standard_normal((1, rows * stride // 64 + 2, columns * stride // 64 + 2, num_classes))
    logits = 3.0 * tf.image.resize(coarse, (rows, columns), method="bicubic").numpy()[0]  # [h, w, C]
    is_thing = np.isin(np.arange(num_classes), thing_classes)
    lead = logits[..., ~is_thing].max(axis=-1) - logits[..., is_thing].max(axis=-1)  # [h, w]
    logits[..., is_thing] += np.quantile(lead, thing_share)

    # No two neighbors may be equally hot, as none of them would be the better center. So a center lies neither at the
    # border, where upsampling repeats values, nor in the middle of a coarse pixel or between two.
    coarse_size = np.array(image_size) // stride
    low, high = np.full(2, 2), coarse_size - 2
    if within is not None:
        reach = int(within // stride)
        low, high = np.maximum(low, coarse_size // 2 - reach), np.minimum(high, coarse_size // 2 + reach)
    coarse_centers = random.integers(low, high, (num_centers, 2)) + random.uniform(0.6, 0.9, (num_centers, 2))
    centers = coarse_centers * stride - 0.5
    y = (np.arange(rows) + 0.5)[:, np.newaxis] * stride - 0.5  # [h, 1]
    x = (np.arange(columns) + 0.5)[np.newaxis, :] * stride - 0.5  # [1, w]
    heat = np.zeros((rows, columns))
    offset = np.zeros((rows, columns, 2))
    best = np.full((rows, columns), np.inf)
    for center_y, center_x in centers:
        distance = (y - center_y) ** 2 + (x - center_x) ** 2  # [h, w]
        heat = np.maximum(heat, random.uniform(0.3, 1.0) * np.exp(-distance / (2 * 8.0**2)))
        closer = distance < best
        best = np.where(closer, distance, best)
        offset[closer] = np.stack(np.broadcast_arrays(center_y - y, center_x - x), axis=-1)[closer]
    offset += offset_noise * random.standard_normal(offset.shape)

    def rounded(values: np.ndarray, unit: float) -> np.ndarray:
        return (np.round(values / unit) * unit).astype(np.float32)[np.newaxis]

    return {
        "semantic_logits": rounded(logits, 2.0**-10),
        # The finest that is exact.
        "center": rounded(heat[..., np.newaxis], stride**2 * 2.0**-22),
        "offset": rounded(offset, 2.0**-7),
    }
