"""Find the pictures below a folder or in an archive, and what else is there: ignored and odd files, folders of runs."""

import errno
import os
import stat
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from zipfile import ZIP_DEFLATED, ZIP_STORED

from dataset import labels
from dataset.decode import FORMATS, HEIF, SUFFIXES, printable
from errors import DataError

NAMED = 10  # files listed in a message, at most
_PAGE = b'<script type="application/json" id="summary">'  # near the beginning of every page of the gallery


@dataclass
class Found:
    """What is below `folder`, or in the archive of this name: the sorted `paths` of the pictures; the number of
    `ignored` files of each ending; the dataset.jsons in `label_files`; {path: reason} of what was `left_out`, such as
    links to nothing; folders that runs write to, in `own`.
    """

    folder: str
    paths: list = field(default_factory=list)
    ignored: Counter = field(default_factory=Counter)
    label_files: list[str] = field(default_factory=list)
    left_out: dict = field(default_factory=dict)
    own: list = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return what a user should know about this folder besides the number of pictures, one line each."""
        lines = []
        if self.ignored:
            lines.append(f"pictures: {self.kinds()}")
        if self.left_out:
            odd = [f"{printable(path)}: {reason}" for path, reason in self.left_out.items()]
            more = f"\n  and {len(odd) - NAMED} more" if len(odd) > NAMED else ""
            lines.append(f"pictures: {len(odd)} left out:\n  " + "\n  ".join(odd[:NAMED]) + more)
        if self.own:
            own = [printable(os.path.relpath(path, self.folder)) for path in self.own]
            more = f" and {len(own) - NAMED} more" if len(own) > NAMED else ""
            lines.append(f"pictures: folders that runs write to are not read: {', '.join(own[:NAMED])}{more}")
        return lines

    def kinds(self) -> str:
        """Return the ignored files in words: `40 files ignored: 30 .heic, 10 .mp4`."""
        count, shown = self.ignored.total(), sorted(self.ignored.items(), key=lambda kind: (-kind[1], kind[0]))
        kinds = [f"{number} {printable(ending) or 'without an ending'}" for ending, number in shown[:NAMED]]
        rest = sum(number for _, number in shown[NAMED:])
        kinds += [f"{rest} of other endings"] * bool(rest)
        hint = "; `pip install pillow-heif` lets them be read" if "HEIF" not in FORMATS and any(
            ending in HEIF for ending in self.ignored) else ""
        return f"{count} file{'s' * (count > 1)} ignored: {', '.join(kinds)}{hint}"


def find_pictures(folder: Path, own: dict | None = None) -> Found:
    """Return what is below `folder`, links to folders included; hidden files and folders are skipped.

    `own` {real path: anything} are folders that the run writes to: they are not searched, nor are the folders of other
    runs. `folder` itself always is. Raise DataError if there are no pictures.
    """
    if not os.path.isdir(folder):
        raise DataError(f"{printable(folder)} is a file" if os.path.exists(folder) else
                        f"there is no folder {printable(folder)}")
    found, own = Found(str(folder)), own or {}
    seen, folders = {os.path.realpath(folder)}, [found.folder]
    while folders:
        inside = _list(folders.pop(), found, bool(own))  # {real path: path} of the folders in this one
        found.own += [path for real, path in inside.items() if real in own]
        # no folder twice, and so no loops of links
        folders += reversed([path for real, path in inside.items() if real not in seen and real not in own])
        seen.update(inside)
    return _sorted(found)


def _sorted(found: Found) -> Found:
    """Sort the paths; count label files that are not theirs as ignored. Raise DataError if there are none."""
    found.paths.sort()
    ends = [path.replace(os.sep, "/") for path in (*found.paths[:1], *found.paths[-1:])]
    used = {f"{top}{labels.FILE}" for top in labels.tops(ends)} if ends else ()
    found.ignored.update(".json" for path in found.label_files if path.replace(os.sep, "/") not in used)
    if not found.paths:
        problem = (f"holds {found.ignored.total()} files, but no picture ({found.kinds()})" if found.ignored else
                   "holds no picture" if found.left_out or found.own else "is empty")
        raise DataError("\n".join([f"{printable(found.folder)} {problem}", *found.lines()[bool(found.ignored):]]))
    return found


def _list(folder: str, found: Found, training: bool) -> dict:
    """Add the files of one folder to `found`. Return {real path: path} of its subfolders.

    Raise DataError if it is the folder of the whole search and cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            entries = sorted((entry for entry in entries if entry.name[0] != "."), key=lambda entry: entry.name)
    except OSError as error:
        if folder == found.folder:
            raise DataError(f"cannot read {printable(folder)} ({error.strerror})") from None
        found.left_out[folder] = error.strerror
        return {}
    if training and folder != found.folder and _is_of_a_run(entries):
        found.own.append(folder)
        return {}
    inside = {}
    for entry in entries:
        path, kind = os.path.join(folder, entry.name), _kind(entry)
        ending = os.path.splitext(entry.name)[1].lower()
        if kind == "folder":
            inside[os.path.realpath(path)] = path
        elif kind != "file":
            found.left_out[path] = kind
        elif ending in SUFFIXES:
            found.paths.append(path)
        elif entry.name == labels.FILE:
            found.label_files.append(path)
        else:
            found.ignored[ending] += 1
    return inside


def _kind(entry: os.DirEntry) -> str:
    """Return "folder", "file", or why the entry is neither."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        os.stat(entry.path)
    except OSError as error:
        if entry.is_symlink():
            kinds = {errno.ENOENT: "a link to nothing", errno.ELOOP: "a link that leads back to itself"}
            return kinds.get(error.errno, f"a link that cannot be followed ({error.strerror})")
        return error.strerror
    return "not a file (a pipe, a socket or a device)"


def _is_of_a_run(entries: list) -> bool:
    """Return whether a run of this program has written this folder: it has our page, or attention maps."""
    for entry in entries:
        if entry.name == "index.html":
            try:
                with open(entry.path, "rb") as file:
                    if _PAGE in file.read(4096):
                        return True
            except OSError:
                continue
        elif entry.name[7:13] == "_attn_" and entry.name[:7].isdecimal() and entry.name.endswith(".png"):
            return True
    return False


def own_folders(config) -> dict:
    """Return {real path: flag} of the folders that a run of this config writes to.

    Of one that is --image_path itself only the subfolder --version counts.
    """
    top, own = os.path.realpath(config.image_path), {}
    for flag in ("sample_path", "model_save_path", "log_path", "cache_path", "attn_path", "cache_dir"):
        path = getattr(config, flag, None)
        if path:
            real = os.path.realpath(path)
            own[os.path.join(real, config.version) if real == top else real] = flag
    return own


# ---- zip archives ----

_DAMAGED = "its checksum is wrong: the archive is damaged there"
_HEADER = 30  # bytes before a file's name; its name and further fields follow, then its data
_ENCRYPTED, _UTF_8, _UNIX = 0x1, 0x800, 3  # flags of a file, and the system that packed it


class Member(NamedTuple):
    """A file in an archive: where its header begins, its packed and unpacked `size` in bytes, checksum, compression."""

    offset: int
    packed: int
    size: int
    crc: int
    method: int


def find_in_archive(path: Path) -> tuple[Found, dict[str, Member]]:
    """Return what is in a zip archive, as `find_pictures` does of a folder, and {name: Member} of its files.

    Names are as in the unpacked folder. If all files are in one folder at the top, names are relative to it. Only the
    directory at the end of the archive is read. Raise DataError if there are no pictures, or not all can be read.
    """
    found, files = Found(str(path)), {}
    for entry in _directory(path):
        name = _name(entry)
        parts = [part for part in name.split("/") if part not in ("", ".", "..")]
        if parts and name[-1] != "/" and parts[0] != "__MACOSX" and not any(part[0] == "." for part in parts):
            files[tuple(parts)] = entry
    skip = int(len({parts[0] for parts in files}) == 1 and min(map(len, files)) > 1)  # a single folder at the top
    files = {"/".join(parts[skip:]): entry for parts, entry in files.items()}
    for name, entry in list(files.items()):
        ending = os.path.splitext(name)[1].lower()
        if stat.S_ISLNK(entry.external_attr >> 16):
            found.left_out[os.path.join(path, name)] = "a link, which is not followed in an archive"
            del files[name]
        elif ending in SUFFIXES:
            found.paths.append(name)
        elif os.path.basename(name) == labels.FILE:
            found.label_files.append(name)
        else:
            found.ignored[ending] += 1
    _sorted(found)
    _refuse_unreadable(path, [files[name] for name in (*found.paths, *found.label_files)])
    return found, {name: Member(entry.header_offset, entry.compress_size, entry.file_size, entry.CRC,
                                entry.compress_type) for name, entry in files.items()}


def _directory(path: Path) -> list[zipfile.ZipInfo]:
    try:
        with open(path, "rb") as file:
            begins = file.read(4) == b"PK\x03\x04"
            try:
                with zipfile.ZipFile(file) as archive:
                    return archive.infolist()
            except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OverflowError) as error:
                name = printable(path)
                raise DataError(f"{name} is truncated or damaged: its end, the directory of a zip archive, is missing "
                                f"or wrong ({printable(error)})" if begins else
                                f"{name} is a file, but no zip archive") from None
    except OSError as error:
        raise DataError(f"cannot read {printable(path)} ({error.strerror})") from None


def _name(entry: zipfile.ZipInfo) -> str:
    """Return the name that a file has once it is unpacked. Without a note of its encoding it is of any bytes."""
    name = entry.filename
    if entry.create_system != _UNIX:
        return name.replace("\\", "/")
    if entry.flag_bits & _UTF_8 or name != entry.orig_filename:  # which has a second name, in Unicode
        return name
    return os.fsdecode(name.encode("cp437"))


def _refuse_unreadable(path: Path, entries: list[zipfile.ZipInfo]):
    """Raise DataError if files are encrypted, compressed in a way that is unknown here, or beyond the file's end."""
    end = os.path.getsize(path)
    reasons = {
        "encrypted; pack it without a password": lambda entry: entry.flag_bits & _ENCRYPTED,
        "compressed in an unusual way; zip it again, with `zip -0` or `zip`":
            lambda entry: entry.compress_type not in (ZIP_STORED, ZIP_DEFLATED),
        "missing: the archive is truncated or damaged; get it again":
            lambda entry: not 0 <= entry.header_offset <= end - _HEADER - entry.compress_size,
    }
    for reason, applies in reasons.items():
        wrong = [entry.filename for entry in entries if applies(entry)]
        if wrong:
            count = f"{len(wrong)} of the {len(entries)} files in it {'is' if len(wrong) == 1 else 'are'}"
            raise DataError(f"{printable(path)}: {count} {reason}\nthe first is {printable(wrong[0])}")


def unpack(member: Member, read: Callable[[int, int], bytes]) -> bytes:
    """Return the content of a file in an archive; `read(count, offset)` reads from the archive.

    Raises ValueError if it is damaged, OSError if it cannot be read.
    """
    header = read(_HEADER, member.offset)
    if header[:4] != b"PK\x03\x04" or len(header) < _HEADER:
        raise ValueError(_DAMAGED)
    data = read(member.packed, member.offset + _HEADER + sum(struct.unpack("<HH", header[26:])))
    if member.method == ZIP_DEFLATED:
        try:  # one byte more than there should be, and no more, whatever the damage
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, member.size + 1)
        except zlib.error:
            raise ValueError(_DAMAGED) from None
    if len(data) != member.size or zlib.crc32(data) != member.crc:
        raise ValueError(_DAMAGED)
    return data
