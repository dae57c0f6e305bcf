"""Which adapters a client may have loaded: folders within some roots, and organisations of the Hugging Face hub."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from slora_jax.errors import BadAdapter, SLoRAError, shown

_MOST_FILES = 1000
_HUB_ID = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,95})/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@+=-]*(/[A-Za-z0-9_][A-Za-z0-9._@+=-]*)*")
_LONGEST_NAME = 200


class Place(NamedTuple):
    """Where an adapter is: in the folder ``path``, or in the hub's repository of that id."""

    path: str
    is_hub: bool


class NoSuchFolder(SLoRAError, LookupError):
    """No adapter that this server may load is there; ``param`` names the field."""

    param = "lora_path"


class AdapterFolders:
    """The paths that a client may name.

    Args:
      roots: folders within which adapters must be, with all of their files, after symbolic links are followed; None
        for anywhere on this machine.
      hubs: organisations (or users) of the hub whose adapters may be downloaded.
    """

    def __init__(self, roots: Iterable[str] | None = None, hubs: Iterable[str] = ()):
        self._roots = None if roots is None else [Path(os.path.realpath(os.path.expanduser(root))) for root in roots]
        self._hubs = frozenset(hubs)

    def checked(self, path: str) -> str:
        """The path to load: of a folder the real one, so that no link of it can be changed in between; or a hub id.

        Raises:
          NoSuchFolder: nothing is there, or nothing that may be loaded. The words are the same: a client learns nothing
            of what else is on this machine.
          BadAdapter: a folder of more than 1000 files, which is no adapter.
        """
        try:
            folder = Path(os.path.realpath(os.path.expanduser(path)))
            is_folder = folder.is_dir()
        except (OSError, ValueError):  # a path too long, or with a NUL
            is_folder = False
        if is_folder and self._roots is None:
            return str(folder)
        if is_folder and self._is_within(folder):
            self._check_links(path, folder)
            return str(folder)
        hub_id = _HUB_ID.fullmatch(path)
        if not is_folder and hub_id is not None and hub_id[1] in self._hubs:
            return path
        raise self._refusal(path)

    def find(self, name: str) -> Place | None:
        """Where the adapter of this name is: in the folder ``ROOT/NAME``, or in the hub's repository ``NAME``.

        None where there is no such folder, nor one that may be loaded; whether the hub has it is not asked.

        Raises:
          BadAdapter: a folder of more than 1000 files, which is no adapter.
        """
        if len(name) > _LONGEST_NAME or not _NAME.fullmatch(name):
            return None
        for root in self._roots or ():
            folder = root / name
            try:
                if (folder / "adapter_config.json").is_file():
                    return Place(self.checked(str(folder)), is_hub=False)
            except (OSError, NoSuchFolder):  # it cannot be looked into, or leads out of the root
                continue
        hub_id = _HUB_ID.fullmatch(name)
        # A folder of that name goes first when it is loaded, and this one may not be.
        if hub_id is not None and hub_id[1] in self._hubs and not Path(name).exists():
            return Place(name, is_hub=True)
        return None

    def _check_links(self, path: str, folder: Path) -> None:
        seen = 0
        for parent, subfolders, files in os.walk(folder):
            seen += len(subfolders) + len(files)
            if seen > _MOST_FILES:
                raise BadAdapter(f"the folder {shown(path)} holds more than {_MOST_FILES} files; is it an adapter?")
            for name in (*subfolders, *files):
                if not self._is_within(Path(os.path.realpath(Path(parent, name)))):
                    raise self._refusal(path)

    def _is_within(self, path: Path) -> bool:
        assert self._roots is not None, "without roots every path is allowed"
        return any(path.is_relative_to(root) for root in self._roots)

    def _refusal(self, path: str) -> NoSuchFolder:
        return NoSuchFolder(
            f"no adapter is at {shown(path)}, or this server may not load it from there: folders must be within an "
            "--adapter-root, and ids of the Hugging Face hub belong to an --adapter-hub"
        )
