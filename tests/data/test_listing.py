"""A tree of files is the same from a folder and from the names in an archive."""

from sagan_fast.data.listing import read_tree, tree_of

NAMES = [
    "a/1.png", "a/more/2.JPG", "a/note.txt", "b/3.webp", "b/@eaDir/3.webp", ".hidden/4.png", "b/._3.webp", "top.csv",
]  # fmt: skip


def flat(tree):
    return tree.all_files(), sorted(tree.all_others()), dict(tree.total_passed_over()), sorted(tree.folders)


def test_a_folder_and_an_archive_of_it_are_one_tree(tmp_path):
    for name in NAMES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert flat(read_tree(str(tmp_path))) == flat(tree_of(NAMES)) == (
        ["a/1.png", "a/more/2.JPG", "b/3.webp"],
        ["a/note.txt", "top.csv"],
        {".txt": 1, ".csv": 1, "@eaDir": 1, "hidden": 2},
        ["a", "b"],
    )  # fmt: skip
