"""Steps that are revisions of a repository on the Hub: one after another is fetched, stored, compared, and deleted.

They are deleted after a comparison with the digests of what was committed: they can be fetched again.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from relexio.atomic import PARTIAL
from relexio.checkpoints.layout import open_step
from relexio.engine.resources import Resources
from relexio.errors import MissingError, RequestError, StorageError
from relexio.progress import Stages
from relexio.verbs.convert.before import require_same
from relexio.verbs.convert.follow import Added, Looked
from relexio.verbs.convert.request import Request, existing_store, prepare
from relexio.verbs.convert.write import convert
from relexio.words import stem

SCHEME = "hf://"
_STEP = "{step}"
#: Files of a repository that are fetched; the rest is the same at every step, or no part of the model.
_LEFT = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.msgpack", "*.h5", "optimizer*", "original/*", "runs/*"]


@dataclass(frozen=True)
class Repository:
    """A repository of models on the Hub, and what its revisions are called, with ``{step}`` for the number."""

    name: str
    pattern: str

    @classmethod
    def parse(cls, address: str, pattern: str) -> "Repository":
        """Of ``hf://ORG/NAME``. Raises RequestError with the accepted forms."""
        name = address.removeprefix(SCHEME).strip("/")
        if name.count("/") != 1:
            raise RequestError(f"{address}: not a repository; write hf://ORG/NAME")
        if pattern.count(_STEP) != 1:
            raise RequestError(f"--revisions {pattern}: write {_STEP} once, for the number, as in 'step_{_STEP}'")
        return cls(name, pattern)

    def steps(self) -> dict[int, str]:
        """The revisions (branches and tags) that are steps, by step, ascending. Raises MissingError where there is none."""
        before, after = map(re.escape, self.pattern.split(_STEP))
        with _hub_errors(self.name):
            from huggingface_hub import HfApi

            refs = HfApi().list_repo_refs(self.name)
        names = [ref.name for ref in (*refs.branches, *refs.tags)]
        found = {
            int(match[1]): name for name in names if (match := re.fullmatch(rf"{before}(\d{{1,15}}){after}", name))
        }
        if not found:
            some = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
            raise MissingError(f"{SCHEME}{self.name}: no revision is called {self.pattern}; it has {some or 'none'}")
        return dict(sorted(found.items()))

    def fetch(self, revision: str, directory: Path) -> None:
        """Fetch a revision's model into a directory; what an interrupted run has fetched is kept."""
        with _hub_errors(f"{self.name}, revision {revision}"):
            from huggingface_hub import snapshot_download

            snapshot_download(self.name, revision=revision, local_dir=directory, ignore_patterns=_LEFT)


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    """Turn an error of the Hub's library into one clear error."""
    try:
        from huggingface_hub.errors import HTTPError
    except ImportError as error:
        raise RequestError(f"{SCHEME} needs huggingface_hub ({error}); pip install 'relexio[hub]'") from error
    try:
        yield
    except (OSError, HTTPError) as error:
        text = " ".join(str(error).split())[:300]
        raise StorageError(f"{SCHEME}{what}: {text}; run the same command again to go on") from error


def convert_revisions(
    repository: Repository, request: Request, resources: Resources, stages: Stages
) -> Iterator[Added | Looked | str]:
    """Add the revisions that are not stored yet, one at a time on the disk; each is deleted when the store gives it back.

    They lie beside the store, or in the working directory for one on object storage. Raises a RelexioError as ``prepare`` and
    ``convert`` do; the same call goes on.
    """
    out = str(request.out)
    place = Path(f"{stem(out)}.zarr") if "://" in out else Path(out)
    work = place.with_name(f"{place.name}.hub{PARTIAL}")
    store = existing_store(request.out)
    for step, revision in repository.steps().items():
        chosen = request.selection is None or step in request.selection
        if not chosen or (store is not None and step in store.steps):
            continue
        directory = work / f"step-{step}"
        repository.fetch(revision, directory)
        checkpoint = open_step(step, directory, work, {})
        checkpoint.source = f"{SCHEME}{repository.name}@{revision}"
        base = request.base if store is None or len(store.steps) < 2 else None
        wanted = Request(request.out, base, named={step: checkpoint}, dtype=request.dtype)
        conversion = prepare(wanted, resources, stages)
        result = convert(conversion, stages)
        store = result.store
        require_same(store, conversion.by_step[step], "run the same command again")
        yield Added(conversion, result)
        shutil.rmtree(directory)
    if work.exists():
        shutil.rmtree(work)
    yield Looked(store, {})
