"""Folders that are made where what is written goes."""

from pathlib import Path


def make_folder(folder: Path, setting: str) -> None:
    """Makes `folder` and those above it. Raises ValueError, which names `setting`, where a file is in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        places = [one for one in (folder, *folder.parents) if one.is_symlink() or one.exists()]
        file = next((one for one in places if not one.is_dir()), folder)
        raise ValueError(f"{file} is a file, wanted a folder: give another {setting}") from None
