"""Numbers with their nouns, short lists, and guesses at what was meant."""

from sagan_fast.words import counted, list_some, nearest


def test_a_number_has_its_noun():
    assert counted(1, "image") == "1 image"
    assert counted(0, "image") == "no images"
    assert counted(2, "class") == "2 classes" and counted(2, "process") == "2 processes"
    assert (
        counted(1, "image is", "images are") == "1 image is" and counted(3, "image is", "images are") == "3 images are"
    )


def test_a_long_list_is_cut_short():
    assert list_some(["a", "b"]) == "a, b"
    assert list_some(list("abcdef")) == "a, b, c, d, ..."


def test_the_nearest_name_is_offered():
    assert nearest("trane", ["train", "sample"]) == ": did you mean 'train'?"
    assert nearest("xyz", ["train", "sample"]) == ""


def test_a_last_part_means_all_names_that_end_in_it():
    known = ["--batch-size", "--generator.z-dim", "--generator.base-channels", "--discriminator.base-channels"]
    meant = "'--generator.base-channels' or '--discriminator.base-channels'"
    assert nearest("--base-channels", known) == f": did you mean {meant}?"
