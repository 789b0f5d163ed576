"""Two-view crops with tf.data, as big_vision and TFDS users write them; one side of `benchmarks.input`.

'once' decodes a picture and cuts both views out of it, 'twice' decodes for each view only what it needs.
"""

import os
from importlib import metadata

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import serving
import tensorflow as tf


def crop_window(shape):
    """A random box in pixels: its corner and its size, as Inception's crop."""
    begin, size, _ = tf.image.sample_distorted_bounding_box(
        shape,
        tf.zeros([0, 0, 4], tf.float32),
        area_range=serving.SCALE,
        aspect_ratio_range=serving.RATIO,
        min_object_covered=0,
        use_image_if_no_bounding_boxes=True,
    )
    return begin, size


def finished(crop):
    """Resized, flipped and scaled to -1 … 1."""
    view = tf.image.resize(crop, [serving.SIZE, serving.SIZE], method="bicubic", antialias=True)
    view = tf.image.random_flip_left_right(view)
    return tf.clip_by_value(view, 0, 255) / 127.5 - 1


def views_decoded_once(encoded):
    image = tf.io.decode_jpeg(encoded, channels=3)

    def view():
        begin, size = crop_window(tf.shape(image))
        return finished(tf.slice(image, begin, size))

    return view(), view()


def views_decoded_twice(encoded):
    shape = tf.io.extract_jpeg_shape(encoded)

    def view():
        begin, size = crop_window(shape)
        window = tf.stack([begin[0], begin[1], size[0], size[1]])
        return finished(tf.io.decode_and_crop_jpeg(encoded, window, channels=3))

    return view(), view()


def main() -> None:
    given = serving.arguments(__doc__, ("core-once", "core-twice", "all-once", "all-twice"))
    cores, decoding = given.mode.split("-")
    views = views_decoded_once if decoding == "once" else views_decoded_twice
    options, parallel = tf.data.Options(), tf.data.AUTOTUNE
    if cores == "core":
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)
        options.threading.private_threadpool_size = 1
        options.threading.max_intra_op_parallelism = 1
        parallel = None
    names = serving.files(f"{given.folder}/train")
    data = tf.data.Dataset.from_tensor_slices(names).repeat().shuffle(len(names))
    data = data.map(lambda name: views(tf.io.read_file(name)), num_parallel_calls=parallel)
    data = data.batch(serving.BATCH, drop_remainder=True)
    data = data.prefetch(tf.data.AUTOTUNE if parallel else 1).with_options(options)
    counts = (len(first) for first, _second in data.as_numpy_iterator())
    serving.serve(serving.measured(counts), versions={"tensorflow": tf.__version__, "numpy": metadata.version("numpy")})


if __name__ == "__main__":
    main()
