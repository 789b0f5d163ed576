"""Pictures of every form, and files that are none: made here, small, each under a name that tests show."""

import base64
import io
import struct
import zlib

import numpy as np
from PIL import Image

_MIX = np.array([[0.6, 0.5, 0.3], [0.6, 0.1, -0.4], [0.6, -0.5, 0.3]])


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A picture with the spectrum (amplitude 1 / frequency) and the correlated colours of photographs.

    Returns:
      uint8 [height, width, 3].
    """
    noise = np.fft.rfft2(np.random.RandomState(seed).randn(3, height, width))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1 / max(height, width)
    planes = np.fft.irfft2(noise / frequency, s=(height, width))
    planes *= 55 / planes.std()
    return np.ascontiguousarray(np.clip(128 + np.tensordot(planes, _MIX, (0, 1)), 0, 255).astype(np.uint8))


def encoded(image: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    """By Pillow."""
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def with_orientation(orientation, **others) -> Image.Exif:
    exif = Image.Exif()
    exif[0x010F] = "A camera"
    exif[0x0112] = orientation
    return exif


# ------------------------------------------------------------------------------- forms that Pillow reads, not writes


def chunk(name: bytes, content: bytes) -> bytes:
    """Of a PNG file."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(image: np.ndarray, interlaced: bool = False, chunks: bytes = b"", behind: bytes = b"") -> bytes:
    """uint8 or uint16 [h, w] or [h, w, 2..4]; `chunks` go before the pixels, `behind` behind them."""
    image = image[:, :, None] if image.ndim == 2 else image
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[image.shape[2]]
    header = struct.pack(">IIBBBBB", image.shape[1], image.shape[0], 8 * image.itemsize, colour, 0, 0, interlaced)
    adam7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = b""
    for top, left, down, across in adam7 if interlaced else ((0, 0, 1, 1),):
        part = image[top::down, left::across]
        if part.size:
            rows += b"".join(b"\0" + row.astype(row.dtype.newbyteorder(">")).tobytes() for row in part)
    content = chunk(b"IHDR", header) + chunks + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + content + behind + chunk(b"IEND", b"")


def tiff16(image: np.ndarray) -> bytes:
    """uint16 [h, w, 3], not compressed."""
    height, width, colours = image.shape
    pixels = image.astype("<u2").tobytes()
    at = 8 + len(pixels)
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, at), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 8)]
    tags += [(277, 3, 1, colours), (278, 4, 1, height), (279, 4, 1, len(pixels))]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + b"\0" * 4
    return struct.pack("<2sHI", b"II", 42, at + 6) + pixels + struct.pack("<3H", 16, 16, 16) + directory


def npy(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


def npy_claiming(header: str, content: bytes = b"") -> bytes:
    """A .npy file with that text as its header."""
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode() + content


_QUANTISATION = """
/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxOUlNSMj5aYV
pQYEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT0//"""

# 21x13 pixels, written by libjpeg-turbo's cjpeg with -arithmetic and with -sample; Pillow can write neither.
RARE_JPEGS = {
    name: base64.b64decode(_QUANTISATION + rest)
    for name, rest in {
        "arithmetic coding": """
yQARCAANABUDASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD/AGBnf08/upszXCjeMBIP63K4TFkx539eLopQPwrk/lVTdIX/AKprE
84uuPf8ywNjzrz/2Q==""",
        "arithmetic coding, progressive": """
ygARCAANABUDASIAAhEBAxEB/8wABgAQARD/2gAMAwEAAhADEAAAAf653ou7qsVLRzQS9nX/zAAEEAX/2gAIAQEAAQUCEvwJJuC+nuD/zAAEEQX/2
gAIAQMBAT8BFQ9dRv/MAAQRBf/aAAgBAgEBPwE48ur1A4j/zAAEEAX/2gAIAQEABj8CwP/MAAQQBf/aAAgBAQABPyHTQI0mTcD/2gAMAwEAAgADAA
AAEOPo/8wABBEF/9oACAEDAQE/EN7ZwP/MAAQRBf/aAAgBAgEBPxAisP/MAAQQBf/aAAgBAQABPxAfFhP/2Q==""",
        "sampling 1x4": """
wAARCAANABUDARQAAhEBAxEB/8QAFQABAQAAAAAAAAAAAAAAAAAAAAb/xAAcEAACAgIDAAAAAAAAAAAAAAAAAwQFAmISIjL/xAAWAQEBAQAAAAAAA
AAAAAAAAAAFBAb/xAAdEQACAgIDAQAAAAAAAAAAAAADBAAFUVIREjEy/9oADAMBAAIRAxEAPwCeTWalemIsAoPYsbTMLOmzJ5NZqVyYiwAY9ixt
HlnTZk9hWdfJXYRF8QAglixz9RsTpuvs/9k=""",
        "sampling 3x1": """
wAARCAANABUDATEAAhEBAxEB/8QAFgABAQEAAAAAAAAAAAAAAAAABAUG/8QAHBAAAgICAwAAAAAAAAAAAAAAAAMEBQJiEiIy/8QAFQEBAQAAAAAAA
AAAAAAAAAAABQb/xAAbEQACAgMBAAAAAAAAAAAAAAAAAQQFAhEhA//aAAwDAQACEQMRAD8AzyazUcms1G4VnXyJWk3rEKeVxFRMRY1MRY3CIviS1p
Iy2wCn9stI/9k=""",
        "sampling 2x2, 1x2, 2x1": """
wAARCAANABUDASIAAhIBAyEB/8QAFgABAQEAAAAAAAAAAAAAAAAABgAE/8QAHBAAAgICAwAAAAAAAAAAAAAAAAMEBQJiEiIy/8QAFwEBAQEBAAAAA
AAAAAAAAAAABQYAAv/EAB0RAAICAwADAAAAAAAAAAAAAAAEAQIFEiEDIjH/2gAMAwEAAhEDEQA/ADyazU3JrNRCmIs2piLHnnfpLPMW6BLZGR5b
IyHsKzr5IXYRF8SO7u+09Ja7FtpHPFkZ1Mf/2Q==""",
    }.items()
}


# --------------------------------------------------------------------------------------------------- what is decoded


def jpegs() -> dict[str, bytes]:
    """JPEGs of every form that is taken, of sides that are no multiple of a block."""
    image = photo(45, 67)
    colour, grey, inks = Image.fromarray(image), Image.fromarray(image).convert("L"), Image.fromarray(image)
    forms = {
        f"{name}{', progressive' * progressive}": encoded(colour, "JPEG", subsampling=s, progressive=progressive)
        for s, name in enumerate(("4:4:4", "4:2:2", "4:2:0"))
        for progressive in (False, True)
    }
    forms |= {
        "4:4:0": _sampled(0x12),
        "grey": encoded(grey, "JPEG"),
        "RGB": encoded(colour, "JPEG", keep_rgb=True),
        "CMYK": encoded(inks.convert("CMYK"), "JPEG"),
        "restart markers": encoded(colour, "JPEG", restart_marker_blocks=2),
        "ICC profile, comment": encoded(colour, "JPEG", icc_profile=b"profile" * 20_000, comment=b"no comment"),
        "quality 1": encoded(colour, "JPEG", quality=1),
        "1x1": encoded(photo(1, 1), "JPEG"),
        "something after the end": encoded(colour, "JPEG") + b"appended",
    }
    forms["YCCK"] = _transformed(forms["CMYK"], 2)
    return forms | RARE_JPEGS


def _sampled(luma: int) -> bytes:
    """As 4:2:2, with other sampling factors of the first colour: a valid file of the turned picture."""
    file = bytearray(encoded(np.ascontiguousarray(photo(64, 64)), "JPEG", subsampling=1))
    file[file.index(b"\xff\xc0") + 11] = luma
    return bytes(file)


def _transformed(cmyk: bytes, transform: int) -> bytes:
    """A CMYK file with another colour transform in its Adobe segment."""
    at = cmyk.index(b"Adobe") + 11
    return cmyk[:at] + bytes([transform]) + cmyk[at + 1 :]


def others() -> dict[str, bytes]:
    """Files of every other form that is taken and that Pillow converts as is wanted here."""
    image = photo(29, 43, 1)
    colour = Image.fromarray(image)
    grey, palette = colour.convert("L"), colour.quantize(16)
    faded = np.dstack([image, np.arange(43, dtype=np.uint8) * np.ones((29, 1), np.uint8)])
    frames = [Image.fromarray(photo(29, 43, seed)) for seed in (2, 3)]
    moving = {"save_all": True, "append_images": frames}
    wide = (image.astype(np.uint16) << 8) + 77
    forms = {
        "PNG": encoded(colour, "PNG"),
        "PNG grey": encoded(grey, "PNG"),
        "PNG 1 bit": encoded(grey.convert("1"), "PNG"),
        "PNG 2 bit palette": encoded(colour.quantize(4), "PNG", bits=2),
        "PNG 4 bit palette": encoded(palette, "PNG", bits=4),
        "PNG palette, transparent colour": encoded(palette, "PNG", transparency=3),
        "PNG palette, alpha for each": encoded(palette, "PNG", transparency=bytes(range(16))),
        "PNG alpha": encoded(faded, "PNG"),
        "PNG grey alpha": encoded(Image.fromarray(faded).convert("LA"), "PNG"),
        "PNG transparent colour": encoded(colour, "PNG", transparency=tuple(image[3, 4].tolist())),
        "PNG 16 bit": png(wide),
        "PNG 16 bit alpha": png(np.dstack([wide, wide[:, :, :1]])),
        "PNG interlaced": png(image, interlaced=True),
        "PNG animated": encoded(colour, "PNG", **moving),
        "WebP": encoded(colour, "WEBP"),
        "WebP lossless": encoded(colour, "WEBP", lossless=True),
        "WebP alpha": encoded(faded, "WEBP", lossless=True, exact=True),
        "WebP animated": encoded(colour, "WEBP", **moving),
        "GIF": encoded(palette, "GIF"),
        "GIF transparent": encoded(palette, "GIF", transparency=2),
        "GIF animated": encoded(colour, "GIF", **moving),
        "BMP": encoded(colour, "BMP"),
        "BMP grey": encoded(grey, "BMP"),
        "PPM": encoded(colour, "PPM"),
        "PGM": encoded(grey, "PPM"),
        "PPM 16 bit": b"P6 43 29 65535\n" + wide.astype(">u2").tobytes(),
        "PPM in digits": b"P3 2 1 255\n" + b"1 2 3\n 250 251 252",
        "TIFF": encoded(colour, "TIFF"),
        "TIFF grey": encoded(grey, "TIFF"),
        "TIFF LZW": encoded(colour, "TIFF", compression="tiff_lzw"),
        "TIFF deflate": encoded(colour, "TIFF", compression="tiff_deflate"),
        "TIFF JPEG": encoded(colour, "TIFF", compression="jpeg"),
        "TIFF CMYK": encoded(colour.convert("CMYK"), "TIFF"),
        "TIFF pages": encoded(colour, "TIFF", **moving),
        "TIFF 16 bit": tiff16(wide),
    }
    for orientation in range(1, 9):
        exif = with_orientation(orientation)
        forms[f"PNG orientation {orientation}"] = encoded(colour, "PNG", exif=exif)
        raw = exif.tobytes()
        if orientation in (3, 6):
            profile = f"Raw profile type exif\0\nexif\n{len(raw):8}\n{raw.hex()}\n".encode()
            forms[f"PNG orientation {orientation} behind"] = png(
                image, behind=chunk(b"eXIf", raw.removeprefix(b"Exif\0\0"))
            )
            forms[f"PNG orientation {orientation} as text"] = png(image, chunks=chunk(b"tEXt", profile))
            xmp = b"XML:com.adobe.xmp\0\0\0\0\0" + b'<x tiff:Orientation="%d"/>' % orientation
            forms[f"PNG orientation {orientation} in XMP"] = png(image, chunks=chunk(b"iTXt", xmp))
        forms[f"WebP orientation {orientation}"] = encoded(colour, "WEBP", exif=exif)
        forms[f"TIFF orientation {orientation}"] = encoded(colour, "TIFF", exif=exif)
    return forms


# --------------------------------------------------------------------------------------------------- what is refused


def _frame(file: bytes, marker: int | None = None, bits: int | None = None, sides=None, colours=None) -> bytes:
    """A JPEG with other numbers in the header of its frame."""
    file = bytearray(file)
    at = file.index(b"\xff\xc0")
    if marker is not None:
        file[at + 1] = marker
    if bits is not None:
        file[at + 4] = bits
    if sides is not None:
        file[at + 5 : at + 9] = struct.pack(">HH", *sides)
    if colours is not None:
        file[at + 9] = colours
    return bytes(file)


def _png_claiming(width: int, height: int, chunks: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunks + pixels + chunk(b"IEND", b"")


def refused() -> dict[str, tuple[bytes, str]]:
    """{name: (file, what the error says of it)}: no picture, or of a form that is not taken."""
    image = photo(33, 47, 4)
    jpeg, plain = encoded(image, "JPEG"), encoded(image, "PNG")
    bomb = zlib.compress(bytes(1 << 26))
    whole = "{'descr': '|u1', 'fortran_order': False, 'shape': (%s), }"
    objects = npy(np.array([[{}]], object), allow_pickle=True)
    flipped = bytearray(plain)
    flipped[plain.index(b"IDAT") + 40] ^= 4
    exif = encoded(image, "JPEG", exif=with_orientation(1))
    floats = encoded(Image.fromarray(image[:, :, 0].astype(np.float32)), "TIFF")
    return {
        "empty": (b"", "the file is empty"),
        "zeros": (bytes(5000), "zeros alone"),
        "text": (b"a picture of a cat\n", "it is text"),
        "web page": (b"<!DOCTYPE html>\n<html><h1>404 Not Found", "it is a web page"),
        "web page with a mark": (b"\xef\xbb\xbf\r\n<HTML><body>403", "it is a web page"),
        "SVG": (b'<?xml version="1.0"?>\n<svg xmlns="x"/>', "SVG"),
        "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        "PDF": (b"%PDF-1.7\n\xe2\xe3", "PDF"),
        "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        "zip": (b"PK\3\4rest", "zip archive"),
        "gzip": (b"\x1f\x8b\x08rest", "gzip"),
        "AVIF": (b"\0\0\0\x1cftypavif\0\0\0\0", "AVIF"),
        "HEIC": (b"\0\0\0\x1cftypheic\0\0\0\0", "HEIC"),
        "JPEG 2000": (encoded(image, "JPEG2000"), "JPEG 2000"),
        "Photoshop": (b"8BPS\0\1" + bytes(50), "Photoshop"),
        "DICOM": (bytes(127) + b"\1DICM", "no form that is known|DICOM"),
        "video": (b"\0\0\0\x20ftypisom\0\0\2\0", "video"),
        "noise": (bytes(range(140, 255)), "no form that is known; it begins with 8c 8d"),
        "JPEG of 12 bits": (_frame(jpeg, 0xC1, 12), "JPEG of 12 bits is not taken; convert"),
        "JPEG without loss": (_frame(jpeg, 0xC3), "lossless JPEG is not taken"),
        "JPEG hierarchical": (_frame(jpeg, 0xC5), "hierarchical JPEG is not taken"),
        "JPEG of 2 colours": (_frame(jpeg, colours=2), "JPEG of 2 colours|damaged JPEG"),
        "JPEG without height": (_frame(jpeg, sides=(0, 47)), "JPEG"),
        "JPEG that claims 65535x65535": (_frame(jpeg, sides=(65535, 65535)), "pixels"),
        "JPEG that claims more than it holds": (_frame(jpeg, sides=(330, 47)), "cut off or damaged|damaged JPEG"),
        "JPEG header alone": (jpeg[:20], "JPEG"),
        "JPEG first bytes": (jpeg[:3], "damaged JPEG: its header can not be read"),
        "JPEG with EXIF, header alone": (exif[:200], "JPEG"),
        "PNG that claims 30000x30000": (_png_claiming(30_000, 30_000), "more than 89478485"),
        "PNG that claims 9500x9500": (_png_claiming(9500, 9500), "9500x9500 pixels are more than 89478485"),
        "PNG that claims more than it holds": (_png_claiming(900, 900), "damaged PNG: image file is truncated"),
        "PNG with a bomb for a profile": (png(image, chunks=chunk(b"iCCP", b"x\0\0" + bomb)), ""),
        "PNG with a bomb for a text": (png(image, chunks=chunk(b"zTXt", b"x\0\0" + bomb)), ""),
        "PNG with a flipped bit": (bytes(flipped), "damaged PNG: the check sum of its pixels is wrong"),
        "GIF that claims 65535x65535": (
            b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b";",
            "GIF|more than",
        ),
        "GIF of nothing": (b"GIF89a" + struct.pack("<HHBBB", 9, 9, 0, 0, 0) + b";", "damaged GIF"),
        "TIFF that claims 60000x60000": (_tiff_claiming(tiff16(image.astype(np.uint16))), "more than 89478485 pixels"),
        "TIFF of floats": (floats, "32 bits|floats have no fixed range"),
        "TIFF of integers": (encoded(Image.fromarray(image[:, :, 0].astype(np.int32)), "TIFF"), "no fixed range"),
        "TIFF LAB": (encoded(Image.fromarray(image, "LAB"), "TIFF"), "colours are LAB"),
        ".npy of objects": (objects, r"type '\|O' and shape \[1, 1\] is no picture"),
        ".npy of floats": (npy(np.ones((4, 5, 3))), "type '<f8'"),
        ".npy of one axis": (npy(np.ones(5, np.uint8)), r"shape \[5\] is no picture"),
        ".npy of no pixels": (npy(np.ones((0, 5, 3), np.uint8)), r"shape \[0, 5, 3\] is no picture"),
        ".npy of fields": (npy(np.zeros((3, 3), [("a", "u1")])), "does not describe an array of numbers"),
        ".npy that claims gigabytes": (npy_claiming(whole % "9000, 9000, 3"), "cut off: 0 of 243000000 bytes"),
        ".npy that claims 99999x99999": (npy_claiming(whole % "99999, 99999, 3"), "99999x99999 pixels are more than"),
        ".npy cut off": (npy(image)[:-1], "cut off"),
        ".npy with a huge header": (npy_claiming(whole % "2, 2, 3" + " " * 60_000, bytes(12)), "does not describe"),
        ".npy with a calculating header": (npy_claiming("{'shape': (2,)*9**9}"), "does not describe"),
        ".npy with a space for a comma": (npy_claiming(whole % "9 3"), "does not describe"),
        ".npy first bytes": (b"\x93NUMPY\1", "header can not be read"),
        ".npy of a later version": (b"\x93NUMPY\7\0" + bytes(90), "header can not be read"),
    }


def _tiff_claiming(file: bytes) -> bytes:
    for tag in (256, 257):
        at = file.rindex(struct.pack("<HHI", tag, 4, 1)) + 8
        file = file[:at] + struct.pack("<I", 60_000) + file[at + 4 :]
    return file
