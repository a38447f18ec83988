"""An exclusive lock on a folder, by the file `lock` in it, that ends with the process; on one machine or over NFS."""

import fcntl
import os
import sys
from pathlib import Path
from typing import IO

NAME = "lock"


class FolderLock:
    """Holds `folder`, which is made where it is not there. Close it at the end.

    Raises ValueError where another process holds it, which `held` says, and OSError on a file system without locks.
    """

    def __init__(self, folder: Path, held: str):
        self.folder, self._held = folder, held
        self._file = self._take()

    def _take(self) -> IO:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = open(self.folder / NAME, "w")  # noqa: SIM115 - held until it is closed
        try:
            # no flock: readers that outlive a killed rank by seconds would hold it, as children of a fork do
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            if isinstance(error, BlockingIOError | PermissionError):  # either may be what says that it is held
                raise ValueError(self._held) from None
            raise
        return file

    def renew(self) -> None:
        """Takes the folder again if it was deleted meanwhile, as by rm -rf: the lock went with it.

        Raises ValueError where another process has begun there since.
        """
        try:
            there = os.stat(self.folder / NAME)
        except FileNotFoundError:
            there = None
        if there is not None and os.path.samestat(there, os.fstat(self._file.fileno())):
            return
        before, self._file = self._file, self._take()
        before.close()
        print(f"warning: {self.folder} was deleted while this run trained: what was there is lost", file=sys.stderr)

    def close(self) -> None:
        self._file.close()
