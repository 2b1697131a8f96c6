"""Tar shards in the WebDataset layout, and tar files of one class each.

Members with one key make one sample; the key is the path up to the first dot of its last part
(https://github.com/webdataset/webdataset). KEY.jpg is the image, and KEY.cls or one of `LABEL_ENDINGS` the label; it
may also stand in KEY.json. A label may lie anywhere in its shard, so all labels are read before the work begins.
Plain shards are listed by their headers and read by many processes. Compressed ones can only be read from their
beginning, so the listing process unpacks them and sends the bytes.
"""

import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sagan_fast.data.classes import in_order
from sagan_fast.data.images import BrokenImageError, read_image
from sagan_fast.data.labels import SUSPICIOUS, label_in_json
from sagan_fast.data.listing import EXTENSIONS, HIDDEN, NOT_DATA, kind_of_name
from sagan_fast.data.sources.base import UNLABELLED, FilesSource, Image, check_label
from sagan_fast.data.sources.tar_members import DAMAGE, DAMAGED, FILE, LINK, Member, TarArchive, check_tar, stem
from sagan_fast.errors import InputError
from sagan_fast.words import list_some

LABEL_ENDINGS = ("cls", "class", "label", "index")
"""Last parts of the extensions of members that hold a label, the preferred first."""
UNREAD_LABELS = ("txt", "text", "id", "inx", "tag", "tags", "labels", "target", "cls2", "csv", "tsv", "npy", "pyd")
"""Last parts of the extensions of members that may hold a label in a form that is not read."""
MAX_LABEL_BYTES = 2**20
MOST_FAULTS = 20


@dataclass
class TarItem:
    """One sample: where its image is, or the bytes themselves, or what is wrong with it."""

    file: int
    key: str
    archive: str = ""  # the tar file in the shard that it is in
    name: str = ""  # of the member with the image, once it is found
    offset: int = 0  # of the image in its shard
    size: int = 0
    position: int = 0
    label: Any = None
    rank: int = len(LABEL_ENDINGS) + 1  # of what the label was read from; the least is preferred
    data: bytes | None = None
    broken: str = ""
    cut: bool = False  # the shard ended within the sample: what it lacks may have followed

    def add_image(self, member: Member, position: int, packed: bool) -> None:
        """Take over the image in `member`."""
        if self.name:
            self.broken = f"it has a second image, {member.name} (a key ends at the first dot)"
            return
        self.name, self.size, self.offset, self.position = member.name, member.size, member.offset, position
        if packed:
            self.data = member.content()

    def add_label(self, label: Any, rank: int) -> None:
        """Take over `label`, if there is none that is preferred."""
        if label is not None and rank < self.rank:
            self.label, self.rank = label, rank


class TarSource(FilesSource):
    """Samples of all shards, in the order of the shards and within them.

    Raises InputError if a shard is no tar file, there is no image, or something looks like a label and is not read.
    """

    kind = "tar"

    def __init__(
        self, path: str, shards: Sequence[str], first_label: int | None = None, unlabelled: bool = False
    ) -> None:
        for shard in shards:
            check_tar(shard)
        super().__init__(path, shards, first_label or 0)
        self._archives = [TarArchive(shard) for shard in shards]
        self._detached: list[dict[str, Any]] = [{} for _ in shards]
        self._classes: dict[str, int] = {}
        self._labelled = False
        self._survey(unlabelled)

    def name_of(self, item: TarItem) -> str:
        return f"{self.files[item.file]}/{f'{item.archive}.tar/' if item.archive else ''}{item.name}"

    def read(self, item: TarItem, resolution: int) -> tuple[Image, int]:
        if item.broken:
            raise BrokenImageError(item.broken)
        label = self._number(item)
        data = item.data
        if data is None:
            data = self.bytes_at(item.file, item.offset, item.size)
            if len(data) < item.size:
                raise BrokenImageError("the shard ends within it")
        return read_image(io.BytesIO(data), resolution).numpy(), label

    def items_of(self, file: int, before: int) -> Iterator[TarItem]:
        for item in self._samples(file, before):
            if item.name:
                if item.label is None:
                    item.label = self._detached[file].get(item.archive + "/" + item.key)
                yield item

    def _number(self, item: TarItem) -> int:
        if self._classes:
            return self._classes[item.archive or stem(self.files[item.file])]
        if not self._labelled:
            return 0
        if item.label is None:
            raise BrokenImageError("it has no label, and others have one")
        return check_label(item.label, self.first_label)

    def _survey(self, unlabelled: bool) -> None:
        """Go through all shards for labels, and for what is passed over, before the work begins."""
        surveys = []
        for file, archive in enumerate(self._archives):
            surveys.append(self._survey_file(file))
            if surveys[-1].links:
                archive.find_targets()
                surveys[-1] = self._survey_file(file)
            self._detached[file] = surveys[-1].detached
        whole = [survey.first for survey in surveys if survey.first is not None]
        first = next((item for item in whole if not item.cut), whole[0] if whole else None)
        if first is None:
            fault = next(self.items(), None)
            why = f"{self.name_of(fault)}: {fault.broken}" if fault else "a sample is KEY.jpg and KEY.cls in a tar file"
            raise InputError(f"{self.path} holds no sample whose image ({list_some(EXTENSIONS)}) can be found: {why}")
        total = Survey()
        for survey in surveys:
            total.merge(survey)
        self.passed_over = total.passed_over
        self._labelled = total.labelled and not unlabelled
        if self._labelled:
            self.labels_from = "members beside the images"
            self.label_counts = None if total.damaged else total.labels
            missing = [(name, "it has no label, and others have one") for name in total.missing.values()]
            self.faults = [*total.faults, *missing[:MOST_FAULTS]]
            return
        if not unlabelled:
            self._find_classes(total)
        if self._classes:
            self.class_names, self.labels_from = list(self._classes), "names of the tar files"
            self.label_counts = {label: total.images[name] for name, label in self._classes.items()}
        else:
            self.class_names, self.labels_from = [], "nothing: no labels"

    def _survey_file(self, file: int) -> "Survey":
        survey, spare = Survey(), {}
        for item in self._samples(file, 0, survey):
            place = item.archive + "/" + item.key
            if not item.name:
                spare[place] = item.label
                continue
            if item.broken:
                survey.damaged |= item.key == "*"
                continue
            item.data = None
            survey.first = survey.first or item
            survey.images[item.archive or stem(self.files[file])] += 1
            survey.archives |= bool(item.archive)
            if len(survey.folders) < 2:
                survey.folders.add(os.path.dirname(item.name))
            if item.label is None:
                survey.missing[place] = self.name_of(item)
            else:
                self._count(survey, self.name_of(item), item.label)
        for place in survey.missing.keys() & spare.keys():
            survey.detached[place] = spare.pop(place)
            self._count(survey, survey.missing.pop(place), survey.detached[place])
        survey.passed_over["label without an image"] += sum(label is not None for label in spare.values())
        return survey

    def _count(self, survey: "Survey", name: str, label: Any) -> None:
        survey.labelled = True
        try:
            survey.labels[check_label(label, self.first_label)] += 1
        except BrokenImageError as error:
            if len(survey.faults) < MOST_FAULTS:
                survey.faults.append((name, str(error)))

    def _samples(self, file: int, before: int, survey: "Survey | None" = None) -> Iterator[TarItem]:
        """Yield what belongs together of one file, with an image or not; count in `survey` what is neither."""
        passed_over = Counter[str]() if survey is None else survey.passed_over
        keys: set[tuple[str, str]] = set()
        archive = self._archives[file]
        packed, sample = archive.packed, TarItem(file, "")
        try:
            for member in archive.members():
                if member.kind == LINK:
                    if survey is not None:
                        survey.links = True
                    member = archive.resolved(member) or member
                key, extension = _split(member.name)
                position = before + (0 if packed else member.offset + member.size)
                if not self._is_read(member, extension, passed_over):
                    continue
                if not keys or (sample.archive, sample.key) != (member.archive, key):
                    if keys:
                        yield sample
                    repeated = "another sample of its shard has the same key" if (member.archive, key) in keys else ""
                    sample = TarItem(file, key, member.archive, broken=repeated)
                    keys.add((member.archive, key))
                if f".{extension.rpartition('.')[2]}" in EXTENSIONS:
                    if member.kind == FILE:
                        sample.add_image(member, position, packed)
                    else:
                        why = member.target if member.kind == DAMAGED else f"it links to {member.target}, not in there"
                        sample.name, sample.position, sample.broken = member.name, position, why
                elif not _add_label(sample, member, extension):
                    passed_over[kind_of_name(member.name)] += 1
                    if survey is not None and _looks_like_label(member, extension):
                        survey.suspicious[f".{extension}"] += 1
            if keys:
                yield sample
        except DAMAGE as error:
            if sample.name:
                missing = sample.data is None if packed else sample.offset + sample.size > self._sizes[file]
                if missing and not sample.broken:
                    sample.broken = "the shard ends within it"
                sample.cut = True
                yield sample
            reason = f"the shard is damaged or cut short after {len(keys)} keys ({' '.join(str(error).split())})"
            yield TarItem(file, "*", "", "*", position=before + self._sizes[file], broken=reason)

    def _is_read(self, member: Member, extension: str, passed_over: Counter[str]) -> bool:
        """Return whether `member` may belong to a sample; if not, count it."""
        parts = member.name.split("/")
        if any(part.lower() in NOT_DATA or (part.startswith(".") and part != ".") for part in parts):
            passed_over[HIDDEN] += 1
        elif member.kind in (FILE, LINK, DAMAGED) and extension:
            return True
        elif member.kind != FILE:
            passed_over[member.kind] += member.name != "."
        else:
            passed_over[kind_of_name(member.name)] += 1
        return False

    def _find_classes(self, survey: "Survey") -> None:
        """Take the tar files for classes, if they are; refuse labels that would be passed over."""
        names = in_order(sorted(survey.images))
        by_file = survey.archives or (len(names) == len(self.files) > 1 and _are_classes(names))
        if len(survey.folders) > 1 and not by_file:
            said = ", ".join(folder or "." for folder in sorted(survey.folders))
            raise InputError(
                f"{self.path} has no labels (KEY.cls), but folders of images ({said}, ...): if they are classes, "
                f"unpack it and give the folder; {UNLABELLED}"
            )
        if survey.suspicious:
            said = list_some([f"{number} {kind}" for kind, number in survey.suspicious.most_common()])
            raise InputError(
                f"{self.path} has no labels that are read (KEY.cls, or a label in KEY.json), and {said} may be labels: "
                f"write them to KEY.cls as whole numbers; {UNLABELLED}"
            )
        if by_file:
            self._classes = {name: label for label, name in enumerate(names)}


@dataclass
class Survey:
    """What is known of the samples of some shards before the work begins.

    Attributes:
        first: the first sample whose image can be found.
        images: number of images by the tar file that they are in.
        archives: whether there are tar files in the tar files.
        folders: up to two folders that hold images.
        labels: number of images by label, from 0.
        labelled: whether there is any label.
        missing: names of images without a label, by archive and key.
        detached: labels that do not lie beside their image, by archive and key.
        faults: names and reasons of images whose label is none.
        suspicious: number of members that may hold labels and are not read, by extension.
        links: whether there are links.
        damaged: whether a shard ends too early.
    """

    first: TarItem | None = None
    images: Counter[str] = field(default_factory=Counter)
    archives: bool = False
    folders: set[str] = field(default_factory=set)
    labels: Counter[int] = field(default_factory=Counter)
    labelled: bool = False
    missing: dict[str, str] = field(default_factory=dict)
    detached: dict[str, Any] = field(default_factory=dict)
    faults: list[tuple[str, str]] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)
    suspicious: Counter[str] = field(default_factory=Counter)
    links: bool = False
    damaged: bool = False

    def merge(self, other: "Survey") -> None:
        """Add what is known of further shards."""
        for mine, theirs in (
            (self.images, other.images),
            (self.labels, other.labels),
            (self.passed_over, other.passed_over),
            (self.suspicious, other.suspicious),
        ):
            mine.update(theirs)  # type: ignore[arg-type]
        self.passed_over = +self.passed_over
        self.archives |= other.archives
        self.labelled |= other.labelled
        self.damaged |= other.damaged
        self.folders |= other.folders
        self.missing |= {f"{len(self.missing)} {place}": name for place, name in other.missing.items()}
        self.faults += other.faults


def _are_classes(names: list[str]) -> bool:
    """Return whether tar files of these names are one class each, and not numbered parts of one set."""
    if all(re.fullmatch(r"n\d{8}", name) for name in names):  # WordNet's, of ImageNet
        return True
    return len({re.sub(r"\d+", "", name) for name in names}) == len(names)


def _add_label(sample: TarItem, member: Member, extension: str) -> bool:
    """Take over the label in `member`, if it holds one; return whether it does."""
    last = extension.rpartition(".")[2]
    if last not in (*LABEL_ENDINGS, "json") or member.size > MAX_LABEL_BYTES or member.kind != FILE:
        return False
    text = member.content().decode("utf-8", "replace")
    if last != "json":
        sample.add_label(text.strip(), LABEL_ENDINGS.index(last))
        return True
    try:
        label = label_in_json(json.loads(text))
    except (ValueError, RecursionError):
        return False
    sample.add_label(label, len(LABEL_ENDINGS))
    return label is not None


def _looks_like_label(member: Member, extension: str) -> bool:
    """Return whether a member that is not read may hold a label, by its name, and JSON by its content."""
    last = extension.rpartition(".")[2]
    if last == "json" and member.size <= MAX_LABEL_BYTES and member.kind == FILE:
        return bool(SUSPICIOUS.search(member.content().decode("utf-8", "replace") + member.name))
    return last in UNREAD_LABELS


def _split(name: str) -> tuple[str, str]:
    """Return key and extension, lower case, of a member."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()
