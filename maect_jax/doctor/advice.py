"""What to change, from what was measured: a line each, with the gain that the measurements promise."""

from maect_jax.data.host.decode import cores
from maect_jax.doctor.feed import Feed

ENOUGH = 1.1  # the input should be this much faster than the model: its rate varies
WORTH = 1.15  # a change that promises less is not advised


def advice(
    feed: Feed, hungriest: tuple[str, float], name: str, pictures: int, channels: int, packed_gain: float | None
) -> list[str]:
    """Lines for the user, the most useful first.

    Args:
      feed: what was measured.
      hungriest: (stage, pictures a second) of the stage that eats most.
      name: of the data set, for commands.
      pictures: of the training set.
      channels: of a picture.
      packed_gain: how many times faster a picture of short side 256 loads; None = not measured.
    """
    stage, eats = hungriest
    ratio = feed.pipeline / eats
    if feed.resident:
        return [
            f"enough: the whole set lies on the devices; a batch is gathered there, {feed.pipeline:,.0f} images/s "
            f"({ratio:.1f} times what '{stage}' eats)"
        ]
    found = []
    if ratio >= ENOUGH:
        found.append(f"enough: this machine feeds {ratio:.1f} times what '{stage}' eats; nothing needs to change")
    else:
        found.append(f"too slow: this machine feeds {ratio:.0%} of what '{stage}' eats")
    fits = feed.one_size and pictures * channels * feed.one_size[0] * feed.one_size[1]
    if fits and fits < (8 << 30) and ratio < ENOUGH:
        gib = fits / 2**30
        found.append(
            f"cache: all pictures are {feed.one_size[1]}x{feed.one_size[0]}; --config.data.resident_gib={gib:.1f} "
            "keeps the set on every device, and no picture is decoded twice"
        )
    if feed.other_pipeline > WORTH * feed.pipeline and ratio < ENOUGH:
        gain = feed.other_pipeline / feed.pipeline
        found.append(f"workers: --config.data.workers={feed.other_workers} is {gain:.1f} times faster here")
    if ratio < ENOUGH and feed.read < WORTH * max(feed.pipeline, feed.other_pipeline):
        needed, have = (rate * feed.bytes_each / 1e6 for rate in (eats, feed.read))
        found.append(
            f"storage: reading alone gives {have:,.0f} MB/s, the model needs {needed:,.0f}; put the pictures on a "
            "local disk, or pack them smaller"
        )
    if packed_gain is not None and packed_gain > WORTH and ratio < ENOUGH:
        found.append(
            f"pack: with short side 256 a picture (now {feed.short_side:.0f}) loads {packed_gain:.1f} times faster: "
            f"python -m maect_jax data pack {name} DST --short-side 256"
        )
    best = max(feed.pipeline, feed.other_pipeline) * (packed_gain or 1.0)
    if best < eats:
        have = cores()
        found.append(
            f"cores: at this rate a core, {have * eats / best:,.0f} cores would feed it (this machine has {have})"
            + ("; after the changes above" if len(found) > 1 else "")
        )
    return found
