"""A listening socket has the rights that were asked for, and no file is lost for it."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore import sockets
from kvstore.errors import ListenError
from kvstore.sockets import listening, peer


@pytest.fixture
def path(tmp_path):
    return tmp_path / "in.sock"


def connected(path):
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(path))
    return client


def left_behind(path):
    """A socket as a killed process leaves it."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))


@pytest.mark.parametrize("mode", [0o660, 0o600, 0o666])
@pytest.mark.parametrize("umask", [0, 0o077])
def test_the_rights_are_those_asked_for_whatever_the_umask(path, mode, umask):
    before = os.umask(umask)
    try:
        with listening(path, mode=mode) as listener:
            assert stat.S_IMODE(path.stat().st_mode) == mode
            assert path.stat().st_gid == path.parent.stat().st_gid
            assert listener.rights == f"mode {mode:04o}, group {path.parent.stat().st_gid}"
    finally:
        os.umask(before)


def test_at_no_moment_has_the_file_more_rights(path, monkeypatch):
    seen = []
    inner = Path.chmod

    def chmod(where, mode):
        seen.append(stat.S_IMODE(where.stat().st_mode))
        inner(where, mode)

    monkeypatch.setattr(Path, "chmod", chmod)
    before = os.umask(0)
    try:
        with listening(path):
            assert seen == [0o600]
    finally:
        os.umask(before)


def test_who_cannot_give_it_to_the_folder_s_group_gives_it_to_no_group(path, monkeypatch):
    def refused(*_):
        raise PermissionError

    monkeypatch.setattr(sockets, "_folder_group", lambda _: 12345)
    monkeypatch.setattr(os, "chown", refused)
    with listening(path) as listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert "mode 0600: not a member" in listener.rights


def test_it_is_removed_at_the_end_and_only_if_it_is_still_ours(path):
    with listening(path):
        assert path.exists()
    assert not path.exists()
    with listening(path):
        path.unlink()
        path.write_text("somebody else's")
    assert path.read_text() == "somebody else's"
    path.unlink()
    with listening(path):
        path.unlink()


def test_what_a_killed_process_left_is_replaced(path):
    left_behind(path)
    with listening(path), connected(path):
        pass


@pytest.mark.parametrize("kind", ["file", "folder", "link", "FIFO"])
def test_anything_else_is_never_replaced(path, kind):
    target = path.with_name("target")
    left_behind(target)
    {
        "file": lambda: path.write_text("x"),
        "folder": path.mkdir,
        "link": lambda: path.symlink_to(target),
        "FIFO": lambda: os.mkfifo(path),
    }[kind]()
    before = path.lstat()
    with pytest.raises(ListenError, match="exists and is no socket"), listening(path):
        pass
    assert os.path.samestat(path.lstat(), before)


def test_a_socket_that_somebody_listens_on_is_left_to_him(path):
    with listening(path):
        with pytest.raises(ListenError, match="somebody listens there"), listening(path):
            pass
        connected(path).close()


def test_a_path_that_cannot_be_bound_says_why(path):
    with pytest.raises(ListenError, match="at most 107 bytes"), listening(path / ("x" * 120)):
        pass
    with pytest.raises(ListenError, match="its folder must exist"), listening(path / "none"):
        pass


def test_the_kernel_says_who_is_at_the_other_end(path):
    with listening(path) as listener, connected(path):
        accepted, _ = listener.socket.accept()
        with accepted:
            assert peer(accepted) == (os.getpid(), os.getuid())


# ---- handed over by systemd ----

CHILD = """
import os, sys
from pathlib import Path
os.environ["LISTEN_PID"] = str(os.getpid())
from kvstore.errors import ListenError
from kvstore.sockets import listening
try:
    with listening(Path(sys.argv[1])):
        pass
except ListenError as error:
    print(error)
"""


def with_socket_3(passed, path):
    """What a child prints that is started as systemd does, with a socket as its file 3."""
    done = subprocess.run(
        ["bash", "-c", f'exec 3<&{passed.fileno()}; exec "$@"', "-", sys.executable, "-c", CHILD,
         path],
        pass_fds=[passed.fileno()],
        env={**os.environ, "LISTEN_FDS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )  # fmt: skip
    return done.stdout


def test_systemd_s_socket_at_another_path_is_an_error(path):
    with socket.socket(socket.AF_UNIX) as passed:
        passed.bind(str(path))
        passed.listen()
        said = with_socket_3(passed, path.with_name("other.sock"))
    assert f"systemd passed the sockets ['{path}'], none of them" in said
