"""Lengths of time as people read them."""


def clock(seconds: float) -> str:
    """Seconds as 0:42, 12:05 or 3:07:30."""
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
