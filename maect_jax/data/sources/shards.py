"""ArrayRecord files of a split as one list of records, read in any order by any thread or process.

Every record is a chunk of its own (`group_size:1`) with a hash of its header and one of its data, so that a byte that
was changed is noticed when the record is read. A file that was cut off has lost its footer, the index of its records.
"""

import os
import re
import resource
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

from array_record.python.array_record_module import ArrayRecordReader

from maect_jax.errors import BadPicture, DataError

_RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"
_BUFFER = 1 << 15  # bytes of a file that are read at once, beyond those of a record
_MEND = "copy the shard anew or prepare the set anew"


class Shards:
    """Records by index over several files, in the order of the files.

    Each process opens the files it reads from. `read` may be called by several threads at once.

    Args:
      paths: of the files.
      counts: records in each of them, as the set's description says.

    Raises:
      DataError: a file is missing, can not be opened, or does not hold that many records. (Not again after unpickling:
        a loader process finds out when it reads.)
    """

    def __init__(self, paths: list[str], counts: list[int]):
        self.paths, self.counts = list(paths), list(counts)
        self._ends = list(accumulate(counts))
        self._readers: list[ArrayRecordReader | None] = [None] * len(self.paths)
        allow_open_files(len(self.paths))
        with ThreadPoolExecutor(16) as pool:
            for _ in pool.map(self._reader, range(len(self.paths))):
                pass

    def __getstate__(self):
        return self.__dict__ | {"_readers": [None] * len(self.paths)}

    def __setstate__(self, state):
        self.__dict__ |= state
        allow_open_files(len(self.paths))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def where(self, index: int) -> str:
        """File of a record and its number in that file, counted from 0."""
        shard, position = self._place(index)
        return f"{self.paths[shard]}: record {position}"

    def read(self, index: int) -> bytes:
        """A record's bytes.

        Raises:
          BadPicture: the record is damaged; says at which byte of the file.
          DataError: its file can not be opened.
        """
        shard, position = self._place(index)
        reader = self._readers[shard] or self._reader(shard)
        try:
            return reader.read(position, position + 1)[0]  # a list of positions takes time with the shard's length
        except Exception as error:  # RuntimeError, IndexError; which ones is not documented
            raise BadPicture(self.where(index), f"damaged ({_reason(error)})", _MEND) from error

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = bisect_right(self._ends, index)
        return shard, index - self._ends[shard] + self.counts[shard]

    def _reader(self, shard: int) -> ArrayRecordReader:
        path, count = self.paths[shard], self.counts[shard]
        try:
            size = os.stat(path).st_size
            reader = ArrayRecordReader(path, options=_RANDOM_ACCESS, file_reader_buffer_size=_BUFFER)
            found = reader.num_records()
        except Exception as error:
            raise DataError(f"{path}: not a readable shard ({_reason(error)}); {_MEND}") from error
        if found != count:
            raise DataError(
                f"{path}: {size} bytes with {found} readable records, not {count} ({_no_index(reader)}); {_MEND}"
            )
        self._readers[shard] = reader  # two threads may both come here; either reader will do
        return reader


def _no_index(reader: ArrayRecordReader) -> str:
    """Why a file holds another number of records than it should: mostly that its footer is damaged or cut off."""
    try:
        reader.read([0])
    except Exception as error:
        return _reason(error)
    return "it is of another version of the set"


def _reason(error: Exception) -> str:
    """What array_record says, in one short line, with the place in the file if it names one."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.removeprefix("Corrupted Riegeli/records file: ")
    what = re.sub(r" \(computed [^)]*\)", "", text)
    places = re.findall(r"(?:chunk at|at byte) (\d+)", what)
    what = re.split(r", chunk at|; at byte", what)[0]
    return f"{what} at byte {places[0]}" if places else what[:200]


def allow_open_files(count: int) -> None:
    """ImageNet is 1,024 files, as many as a process may usually have open without asking for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * count + 512  # training and evaluation sets, and what else is open
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
