"""Tar files as people make them: in each other, in a row, full of links, damaged in the midst."""

import io
import tarfile

import pytest

from sagan_fast.data.sources.tar_members import FILE, FOLDER, LINK, TarArchive, stem


def add(tar, name, data=b"", kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, target
    tar.addfile(info, io.BytesIO(data))


def made(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for member in members:
            add(tar, *member)
    return path


def read(archive):
    """Name and content of every file, links among them."""
    archive.find_targets()
    found = {}
    for member in archive.members():
        if member.kind == LINK:
            member = archive.resolved(member) or member
        found[f"{member.archive}:{member.name}"] = member.content() if member.kind == FILE else member.kind
    return found


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_links_lead_to_their_files(tmp_path, mode):
    members = [
        ("a/1", b"one"), ("a/2", b"", tarfile.LNKTYPE, "a/1"), ("b/3", b"", tarfile.SYMTYPE, "../a/1"),
        ("b/4", b"", tarfile.SYMTYPE, "3"), ("b/early", b"", tarfile.SYMTYPE, "./later"), ("b/later", b"late"),
        ("b/lost", b"", tarfile.SYMTYPE, "/etc/passwd"), ("b/up", b"", tarfile.SYMTYPE, "../../x"),
        ("b/loop", b"", tarfile.SYMTYPE, "loop"), ("c", b"", tarfile.DIRTYPE),
    ]  # fmt: skip
    assert read(TarArchive(str(made(tmp_path / "t", members, mode)))) == {
        ":a/1": b"one", ":a/2": b"one", ":b/3": b"one", ":b/4": b"one", ":b/early": b"late", ":b/later": b"late",
        ":b/lost": LINK, ":b/up": LINK, ":b/loop": LINK, ":c": FOLDER,
    }  # fmt: skip


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_tar_files_in_a_tar_file(tmp_path, mode):
    inner = [
        (f"{name}.tar", made(tmp_path / name, [(f"{name}_{i}.JPEG", bytes([i]) * 700) for i in range(3)]).read_bytes())
        for name in ("n01440764", "n01443537")
    ]
    archive = TarArchive(str(made(tmp_path / "t", [*inner, ("last", b"x"), ("broken.tar", b"no tar" * 99)], mode)))
    found = read(archive)
    assert found["n01443537:n01443537_2.JPEG"] == b"\2" * 700 and found[":last"] == b"x" and len(found) == 8
    assert found[":broken.tar"] == "damaged"
    if mode == "w":
        content = (tmp_path / "t").read_bytes()
        for member in archive.members():
            if member.kind == FILE:
                assert content[member.offset : member.offset + member.size] == member.content()


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_what_follows_the_end_mark_is_read(tmp_path, mode):
    """As `cat a.tar b.tar` makes it."""
    one, two = (made(tmp_path / name, [(name, name.encode())], mode).read_bytes() for name in ("one", "two"))
    (tmp_path / "t").write_bytes(one + two)
    assert read(TarArchive(str(tmp_path / "t"))) == {":one": b"one", ":two": b"two"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data + b"garbage" * 100, r"what begins at byte \d+ is no tar file"),
        (lambda data: data[:1024] + b"\xff" * 512 + data[1536:], "its header at byte 1024 is damaged"),
        (lambda data: data[:2048], "it has no end mark"),
        (lambda data: data[:1400], "."),
    ],
)
def test_damage_is_an_error_and_not_an_end(tmp_path, change, message):
    data = made(tmp_path / "t", [("one", b"1"), ("two", b"2"), ("three", b"3")]).read_bytes()
    (tmp_path / "t").write_bytes(change(data))
    with pytest.raises(tarfile.TarError, match=message):
        list(TarArchive(str(tmp_path / "t")).members())


def test_stems():
    assert [stem(f"a/{name}") for name in ("n01.tar", "n01.tar.gz", "x.TGZ", "plain")] == ["n01", "n01", "x", "plain"]
