"""On what kind of file system a path lies: network ones lie about locks and know no WAL."""

from __future__ import annotations

from pathlib import Path

_MOUNTS = Path("/proc/self/mountinfo")
_REMOTE = frozenset(
    {"nfs", "nfs4", "cifs", "smb", "smb2", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs",
     "lustre", "gpfs", "beegfs", "virtiofs", "davfs", "ocfs2", "gfs2", "orangefs", "pvfs2"}
)  # fmt: skip


def file_system(path: Path, mounts: Path = _MOUNTS) -> tuple[str, bool]:
    """The file system's name, and whether it is known to be local.

    What FUSE serves counts as remote, since nobody can tell. Where the system has no list of
    mounts (it is no Linux), the name is "unknown" and nothing counts as local.
    """
    try:
        lines = mounts.read_text("utf-8", "replace").splitlines()
    except OSError:
        return "unknown", False
    place = path.absolute().resolve()
    best, kind = -1, "unknown"
    for line in lines:
        before, _, after = line.partition(" - ")
        fields, told = before.split(" "), after.split(" ")
        if len(fields) < 5 or not told[0]:
            continue
        mount = Path(fields[4].encode().decode("unicode_escape"))
        # the last of equal ones lies on top
        if place.is_relative_to(mount) and len(mount.parts) >= best:
            best, kind = len(mount.parts), told[0]
    return kind, kind != "unknown" and kind not in _REMOTE and not kind.startswith("fuse")
