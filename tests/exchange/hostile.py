"""Parts of hostile files, written byte by byte, as no library would write them."""

import struct
import zlib


def word(value: str | bytes) -> bytes:
    """The opcode that pushes a text."""
    value = value if isinstance(value, bytes) else value.encode()
    return b"X" + struct.pack("<I", len(value)) + value


def whole(number: int) -> bytes:
    """The opcode that pushes a whole number."""
    content = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def wholes(numbers) -> bytes:
    return b"(" + b"".join(map(whole, numbers)) + b"t"


def storage(key="0", count=6, kind="FloatStorage") -> bytes:
    return b"(" + word("storage") + f"ctorch\n{kind}\n".encode() + word(key) + word("cpu") + whole(count) + b"tQ"


def tensor(offset=0, shape=(2, 3), strides=(3, 1), count=6, key="0", kind="FloatStorage") -> bytes:
    """Pickle of {'x': a float32 tensor} whose storage declares `count` elements."""
    hooks = b"ccollections\nOrderedDict\n)R"
    place = storage(key, count, kind) + whole(offset) + wholes(shape) + wholes(strides)
    return b"\x80\x02}" + word("x") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + place + b"\x89" + hooks + b"tRs."


def remembered(index: int) -> bytes:
    return b"r" + struct.pack("<I", index)


def recalled(index: int) -> bytes:
    return b"j" + struct.pack("<I", index)


def colliding(key: int, bits: int, count: int) -> set[int]:
    """The first `count` places at which CPython looks for a key in a dictionary of 2**bits places.

    Whole numbers below 2**bits are kept in the place of their own value, so that with these as keys every look-up of
    `key` passes all of them.
    """
    mask = (1 << bits) - 1
    place, rest, places = key & mask, key, {key & mask}
    while len(places) < count:
        rest >>= 5
        place = (5 * place + rest + 1) & mask
        places.add(place)
    return places


def greedy_programs() -> dict[str, tuple[bytes, str]]:
    """Pickles of a few megabytes that would take minutes or gigabytes if they were followed without limits.

    Returns:
      name -> pickle, and why it is refused, or '' where it is read.
    """
    key = (1 << 30) + 12345
    crowd = colliding(key, 18, 110_000)
    call = b"h\0h\1R" * 30_000
    doubled = b"]q\x000" + b"".join(b"](" + recalled(i) * 2 + b"e" + remembered(i + 1) + b"0" for i in range(50))
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    empty = b"(" + storage(count=0) + b"K\0" + wholes([0] * 16) * 2 + b"\x89}t"

    def held(*items):
        return b"}" + word("x") + b"(" + b"".join(items) + b"ts."

    def keyed(*items):
        return b"}(" + b"".join(items) + b"u."

    programs = {
        # time
        "colliding keys": (
            whole(key) + b"q\x000" + keyed(*(whole(n) + b"N" for n in crowd), b"h\0N" * 120_000),
            "entries in its pickle whose keys are no text",
        ),
        "colliding numbers of objects": (
            b"N" + b"".join(map(remembered, [*crowd, key])) + recalled(key) * 350_000 + b"}.",
            "numbers its objects",
        ),
        "long number": (
            b"}(\x8b" + struct.pack("<i", 1 << 22) + b"\xff" * (1 << 22) + b"q\0N" + b"h\0N" * 100_000 + b"u.",
            "opcode LONG4",
        ),
        "keys that are doubled and doubled": (keyed(b")" + b"q\0h\0\x86" * 60 + b"N"), ""),
        "billion laughs": (doubled + held(recalled(50)), ""),
        # memory
        "long names joined": (
            held(word("a" * (1 << 19)) + b"q\0" + word("b" * (1 << 19)) + b"q\1" + b"h\0h\1\x93" * 150_000),
            "a name that is no text of 1 to 250",
        ),
        "one long text": (held(word(b"a" * (1 << 22) + "\U0001f600".encode())), "a text of 4194305 characters"),
        "texts": (held(word(b"a" * ((1 << 22) - 1) + "\U0001f600".encode()) * 3), ""),
        "long keys": (keyed(*(word(f"{i:0100000}") + b"N" for i in range(70))), ""),
        "keys": (keyed(*(word(f"{i}") + b"N" for i in range(120_000))), ""),
        "objects": (
            b"ca\nb\nq\x000)q\x010"
            + held(b"}" * 200_000, b"]Na" * 30_000, b"\x8f" * 50_000, b"ca\nb\n" * 50_000, call),
            "",
        ),
        "marks": (b"(" * 499_990 + b"}.", ""),
        "no end": (b"N0" * 300_000, "more than 500000 operations"),
        # depth
        "nested lists": (held(b"]" * 200_000 + b"a" * 199_999), "nested more than 64 deep"),
        "nested tuples": (held(b")" + b"\x85" * 450_000), "nested more than 64 deep"),
        "a list that holds itself": (held(b"]q\0h\0a"), "holds itself"),
        # tensors without bytes
        "one empty tensor": (
            rebuild + empty + b"Rq\x000" + keyed(*(word(f"{i}") + b"h\0" for i in range(20_001))),
            "more than 20000 tensors",
        ),
        "empty tensors": (
            rebuild + b"q\x000" + empty + b"q\x010" + held(b"h\0h\1R" * 20_001),
            "more than 20000 tensors",
        ),
    }
    return {name: (b"\x80\x04" + program, why) for name, (program, why) in programs.items()}


def directory(entries: list[tuple[bytes, int, int, int, int, int]]) -> bytes:
    """A zip file's list of members: name, method, checksum, packed and unpacked bytes, start."""
    return b"".join(
        struct.pack(
            "<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, method, 0, 0, checksum, packed, size, len(name), *[0] * 5, start
        )
        + name
        for name, method, checksum, packed, size, start in entries
    )


def directory_end(members: int, listed: bytes, start: int) -> bytes:
    """A list of members, and what follows it: its number of members, bytes and start, in 64 bits."""
    at, numbers = start + len(listed), (members, members, len(listed), start)
    end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, *numbers) + struct.pack("<4sLQL", b"PK\6\7", 0, at, 1)
    return listed + end + struct.pack("<4s4H2LH", b"PK\5\6", *[0xFFFF] * 4, *[0xFFFFFFFF] * 2, 0)


def with_directory(body: bytes, entries) -> bytes:
    """A zip file of these bytes and whatever its directory says of them."""
    return body + directory_end(len(entries), directory(entries), len(body))


def local(name: bytes, method: int, checksum: int, packed: int, size: int) -> bytes:
    """The header before a member of a zip file."""
    return struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, method, 0, 0, checksum, packed, size, len(name), 0) + name


def quoting_bomb(members: int, size: int) -> bytes:
    """A zip file whose members all end in the same bytes: each quotes the header of the next and runs on through it.

    Source: Fifield, A better zip bomb (WOOT 2019), section 3.
    """
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(bytes(size)) + packer.flush()
    content, body, entries = bytes(size), packed, []
    for i in reversed(range(members)):
        name = f"archive/data/{i}".encode()
        numbers = (8, zlib.crc32(content), len(body), len(content))
        header = local(name, *numbers)
        entries.append((name, *numbers, len(header) + len(body)))  # its start, for now from the end
        content = header + content
        body = b"\0" + struct.pack("<HH", len(header), len(header) ^ 0xFFFF) + header + body
    body = body[5:]
    return with_directory(body, [(*entry[:5], len(body) - entry[5]) for entry in entries])
