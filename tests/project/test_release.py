"""The version in one place, CHANGELOG in the form of keepachangelog.com, and a README that stays short."""

import re
from datetime import date
from pathlib import Path

import yaml

import klfast

ROOT = Path(__file__).parents[2]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
KINDS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")


def test_changelog_lists_versions_newest_first():
    first, *versions = re.findall(r"^## (.*)$", CHANGELOG, re.MULTILINE)
    assert first == "[Unreleased]"
    found = [re.fullmatch(r"\[(\d+)\.(\d+)\.(\d+)\] - (\d{4}-\d\d-\d\d)", heading).groups() for heading in versions]
    assert found == sorted(found, key=lambda one: (*map(int, one[:3]), date.fromisoformat(one[3])), reverse=True)


def test_changelog_groups_changes_by_kind():
    for version in CHANGELOG.split("\n## ")[1:]:
        kinds = re.findall(r"^### (.*)$", version, re.MULTILINE)
        assert kinds == [kind for kind in KINDS if kind in kinds], version.splitlines()[0]


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    released, day = re.search(r"^## \[(\d[^\]]*)\] - (\S+)$", CHANGELOG, re.MULTILINE).groups()
    assert (citation["version"], str(citation["date-released"])) == (released, day) == (klfast.__version__, day)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
