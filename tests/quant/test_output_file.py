"""A file that is written appears whole or not at all, and replaces nothing but its own kind."""

import errno
import os
import socket
from pathlib import Path

import pytest

from quant.errors import OutputError, UsageError
from quant.output_file import check_output, replacing, save_output

MARK = b"our kind"
OURS = b"header: our kind, of an earlier run"


def _nothing(folder: Path) -> Path:
    return folder / "out"


def _empty(folder: Path) -> Path:
    (folder / "out").touch()
    return folder / "out"


def _ours(folder: Path) -> Path:
    (folder / "out").write_bytes(OURS)
    return folder / "out"


def _link_to_ours(folder: Path) -> Path:
    (folder / "link").symlink_to(_ours(folder))
    return folder / "link"


def _link_to_nothing(folder: Path) -> Path:
    (folder / "link").symlink_to(folder / "out")
    return folder / "link"


def _longest_name(folder: Path) -> Path:
    return folder / ("n" * 255)


def _null(folder: Path) -> Path:
    return Path("/dev/null")


@pytest.mark.parametrize("place", [_nothing, _empty, _ours, _link_to_ours, _link_to_nothing, _longest_name, _null])
def test_what_can_be_written_is_and_checking_it_leaves_no_trace(place, tmp_path: Path) -> None:
    path = place(tmp_path)
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir() if entry.exists()}
    check_output(path, "--out", MARK)
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir() if entry.exists()} == before
    save_output(path, b"new: our kind", MARK)
    assert path.read_bytes() == (b"" if place is _null else b"new: our kind")
    assert not list(tmp_path.glob(".coldstream-*"))


def _no_folder(folder: Path) -> Path:
    return folder / "no" / "out"


def _file_for_folder(folder: Path) -> Path:
    return _ours(folder) / "out"


def _directory(folder: Path) -> Path:
    return folder


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "out")
    return folder / "out"


def _inherited_pipe(folder: Path) -> Path:
    return Path(f"/dev/fd/{os.pipe()[1]}")


def _socket(folder: Path) -> Path:
    socket.socket(socket.AF_UNIX).bind(str(folder / "out"))
    return folder / "out"


def _foreign(folder: Path) -> Path:
    (folder / "out").write_bytes(b"a thesis")
    return folder / "out"


def _link_to_foreign(folder: Path) -> Path:
    (folder / "link").symlink_to(_foreign(folder))
    return folder / "link"


def _circle(folder: Path) -> Path:
    (folder / "out").symlink_to(folder / "out")
    return folder / "out"


def _long_name(folder: Path) -> Path:
    return folder / ("n" * 256)


def _no_name(folder: Path) -> Path:
    return folder / "a\0b"


def _half_a_character(folder: Path) -> Path:
    return folder / "a\ud800b"


def _full(folder: Path) -> Path:
    return Path("/dev/full")


def _kernels(folder: Path) -> Path:
    return Path("/proc/coldstream")


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
@pytest.mark.parametrize(
    ("place", "said"),
    [
        (_no_folder, "found no directory .*no; make it first"),
        (_file_for_folder, "Not a directory"),
        (_directory, "found a directory: expected the name of a file in it"),
        (_pipe, "found a pipe or a device"),
        (_inherited_pipe, "found a pipe or a device"),
        (_socket, "found a pipe or a device"),
        (_foreign, "found a file that is not of this kind"),
        (_link_to_foreign, "found a file that is not of this kind"),
        (_circle, "Too many levels of symbolic links"),
        (_long_name, "File name too long; choose a shorter one"),
        (_no_name, "no name that a file can have"),
        (_half_a_character, "no name that a file can have"),
        (_full, "no space left to write"),
        (_kernels, "cannot be written|no space left"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_work_and_stays_as_it_is(place, said: str, tmp_path: Path) -> None:
    path = place(tmp_path)
    before = sorted(entry.name for entry in tmp_path.iterdir())
    with pytest.raises(OutputError, match=said) as refusal:
        check_output(path, "--out", MARK)
    assert "\n" not in str(refusal.value)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == before
    if place in (_foreign, _link_to_foreign):
        assert path.read_bytes() == b"a thesis"


def test_stdout_is_no_file() -> None:
    with pytest.raises(UsageError, match="--out -: expected the name of a file"):
        check_output(Path("-"), "--out", MARK)


@pytest.mark.parametrize("place", [_nothing, _ours])
def test_a_write_that_fails_leaves_what_was_there(place, tmp_path: Path) -> None:
    path = place(tmp_path)
    before = path.read_bytes() if path.exists() else None

    def fill_the_disk() -> None:
        with replacing(path) as draft:
            draft.write_bytes(b"half of")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OutputError, match="no space left"):
        fill_the_disk()
    assert (path.read_bytes() if path.exists() else None) == before
    assert not list(tmp_path.glob(".coldstream-*"))


def test_a_file_keeps_its_permissions(tmp_path: Path) -> None:
    path = _ours(tmp_path)
    path.chmod(0o640)
    save_output(path, OURS, MARK)
    assert path.stat().st_mode & 0o777 == 0o640


def test_what_a_killed_run_left_is_taken_over_by_the_next_and_nothing_else_is(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with replacing(path) as draft:
        draft.write_bytes(b"new: our kind")
        usual = draft
    usual.write_bytes(b"half of something, longer than what follows")
    save_output(path, OURS, MARK)
    assert path.read_bytes() == OURS and list(tmp_path.iterdir()) == [path]
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"a thesis")
    for put in (usual.symlink_to, usual.hardlink_to, lambda _: usual.mkdir(), lambda _: os.mkfifo(usual)):
        put(foreign)
        save_output(path, OURS, MARK)
        assert foreign.read_bytes() == b"a thesis" and sorted(tmp_path.iterdir()) == sorted([usual, foreign, path])
        usual.rmdir() if usual.is_dir() and not usual.is_symlink() else usual.unlink()


def test_two_runs_that_write_one_file_have_a_draft_each(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with replacing(path) as first:
        first.write_bytes(b"first")
        with replacing(path) as second:
            second.write_bytes(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]
