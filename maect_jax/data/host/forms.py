"""What a file is that holds no picture of a form that is taken, in words for the error that refuses it."""

import codecs

_CONVERT = "convert it to JPEG or PNG"
_REPLACE = "replace it"

# (offset, first bytes there, what it is, mend)
_FORMS = (
    (0, b"version https://git-lfs", "a Git LFS pointer", "fetch the file itself with `git lfs pull`"),
    (0, b"%PDF", "a PDF document", _CONVERT),
    (0, b"%!PS", "a PostScript drawing", _CONVERT),
    (0, b"8BPS", "a Photoshop document", _CONVERT),
    (0, b"\0\0\1\0", "an icon (ICO)", _CONVERT),
    (0, b"\xff\x0a", "JPEG XL", _CONVERT),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL", _CONVERT),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000", _CONVERT),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000", _CONVERT),
    (4, b"ftypavi", "AVIF", _CONVERT),
    (4, b"ftyphei", "HEIC", _CONVERT),
    (4, b"ftyphev", "HEIC", _CONVERT),
    (4, b"ftypmif1", "HEIC", _CONVERT),
    (4, b"ftyp", "a video", "take single pictures of it"),
    (0, b"\x1aE\xdf\xa3", "a video", "take single pictures of it"),
    (128, b"DICM", "DICOM", "convert it to .npy or PNG"),
    (0, b"\x89HDF", "HDF5", "convert it to .npy or PNG"),
    (0, b"SIMPLE  =", "FITS", "convert it to .npy or PNG"),
    (0, b"PK\3\4", "a zip archive", "unpack it"),
    (0, b"\x1f\x8b", "gzip-compressed", "unpack it"),
    (0, b"BZh", "bzip2-compressed", "unpack it"),
    (0, b"\xfd7zXZ", "xz-compressed", "unpack it"),
)

_TAKEN = (  # what is taken, and did not decode
    (0, b"\xff\xd8", "JPEG"),
    (0, b"\x89PNG", "PNG"),
    (0, b"GIF8", "GIF"),
    (8, b"WEBP", "WebP"),
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"II+\0", "TIFF"),
    (0, b"MM\0+", "TIFF"),
    (0, b"\x93NUMPY", ".npy file"),
    *((0, b"P%d" % kind, "PPM") for kind in range(1, 7)),
)


def foreign(encoded: bytes) -> tuple[str, str]:
    """(what it is, mend) of the bytes of a file that no decoder knows."""
    if not encoded:
        return "the file is empty", _REPLACE
    if not any(encoded[:4096]):
        return "the file begins with zeros alone: it was never written to the end", _REPLACE
    for offset, first, name, mend in _FORMS:
        if encoded.startswith(first, offset):
            return f"it is {name}", mend
    if damaged := taken(encoded):
        return f"damaged {damaged}: its header can not be read", _REPLACE
    start = encoded[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "it is a web page", _REPLACE
    if b"<svg" in start:
        return "it is an SVG drawing", _CONVERT
    if _is_text(start):
        return "it is text", _REPLACE
    return f"no form that is known; it begins with {encoded[:8].hex(' ')}", _REPLACE


def _is_text(start: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(start)  # which may end within a letter
    except UnicodeDecodeError:
        return False
    return all(letter.isprintable() or letter.isspace() for letter in text)


def taken(encoded: bytes) -> str | None:
    """The form of a file by its first bytes, where it is one that is taken."""
    return next((name for offset, first, name in _TAKEN if encoded.startswith(first, offset)), None)
